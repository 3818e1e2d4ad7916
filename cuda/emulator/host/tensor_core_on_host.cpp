// mma.sync.m16n8k16, ldmatrix and cp.async as the PTX ISA describes them: which lane holds which element, what must be
// aligned, and when a copy may land.
#include "tensor_core_on_host.h"

#include "group_queue.h"

namespace emulator {

namespace {

float low_half(unsigned packed) { return __uint_as_float(packed << 16); }
float high_half(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }

struct MultiplyLane {
    float* d;
    const unsigned* a;
    const unsigned* b;
};

// Lane 4 g + t holds rows g and g + 8, columns 2t, 2t + 1 (and 8 further) of A and D; column g of B.
void multiply_all(void* const* arguments, unsigned) {
    float a[16][16];
    float b[16][8];
    float d[16][8];
    for (unsigned i = 0; i < LANES; i++) {
        const MultiplyLane& lane = *static_cast<const MultiplyLane*>(arguments[i]);
        const unsigned g = i / 4;
        const unsigned t = i % 4;
        for (unsigned r = 0; r < 4; r++) {
            const unsigned row = g + 8 * (r % 2);
            const unsigned column = 2 * t + 8 * (r / 2);
            a[row][column] = low_half(lane.a[r]);
            a[row][column + 1] = high_half(lane.a[r]);
            d[g + 8 * (r / 2)][2 * t + r % 2] = lane.d[r];
        }
        for (unsigned r = 0; r < 2; r++) {
            b[2 * t + 8 * r][g] = low_half(lane.b[r]);
            b[2 * t + 8 * r + 1][g] = high_half(lane.b[r]);
        }
    }
    for (unsigned row = 0; row < 16; row++) {
        for (unsigned k = 0; k < 16; k++) {
            for (unsigned column = 0; column < 8; column++) {
                d[row][column] += a[row][k] * b[k][column];
            }
        }
    }
    for (unsigned i = 0; i < LANES; i++) {
        float* mine = static_cast<const MultiplyLane*>(arguments[i])->d;
        for (unsigned r = 0; r < 4; r++) {
            mine[r] = d[i / 4 + 8 * (r / 2)][2 * (i % 4) + r % 2];
        }
    }
}

struct LoadLane {
    unsigned* registers;
    const uint16_t* row;
};

// Matrix m has its rows at the addresses of lanes 8 m to 8 m + 7. The PTX ISA does not say which lane reads an element: both the
// one that gives the address and the one that receives it must be ordered with whoever writes it.
template <int COUNT, bool TRANSPOSED>
void load_all(void* const* arguments, unsigned) {
    for (unsigned i = 0; i < LANES; i++) {
        for (unsigned m = 0; m < COUNT; m++) {
            const auto element = [&](unsigned row, unsigned column) -> unsigned {
                const uint16_t* address = static_cast<const LoadLane*>(arguments[8 * m + row])->row + column;
                watch_access_of_lane(i, Access::Read, address, sizeof *address);
                return *address;
            };
            const unsigned line = i / 4;
            const unsigned pair = 2 * (i % 4);
            const unsigned low = TRANSPOSED ? element(pair, line) : element(line, pair);
            const unsigned high = TRANSPOSED ? element(pair + 1, line) : element(line, pair + 1);
            static_cast<const LoadLane*>(arguments[i])->registers[m] = low | high << 16;
        }
    }
}

bool is_aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void land(const Copy& copy) {
    watch_access(Access::EndCopy, copy.shared, 16);
    if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
    } else {
        std::memset(copy.shared, 0, 16);
    }
}

}  // namespace

void multiply_matrices(float* d, const unsigned* a, const unsigned* b, Site site) {
    MultiplyLane lane{d, a, b};
    warp_collective(~0u, multiply_all, &lane, "mma_m16n8k16", site);
}

void load_matrices(unsigned* registers, int count, const void* shared_row, bool transposed, Site site) {
    const bool gives_a_row = thread_index().x % LANES < 8u * static_cast<unsigned>(count);
    if (gives_a_row && !is_aligned_16(shared_row)) {
        fail(FaultKind::Misaligned, "load_matrix_x%d at line %u: the row at %p is not 16-byte aligned", count, site.line,
             shared_row);
    }
    if (gives_a_row) {
        watch_access(Access::Read, shared_row, 16);
    }
    LoadLane lane{registers, static_cast<const uint16_t*>(shared_row)};
    if (count == 4) {
        warp_collective(~0u, transposed ? load_all<4, true> : load_all<4, false>, &lane, "load_matrix_x4", site);
    } else {
        warp_collective(~0u, transposed ? load_all<2, true> : load_all<2, false>, &lane, "load_matrix_x2", site);
    }
}

void start_copy(void* shared, const void* global, bool valid) {
    if (!is_aligned_16(shared) || !is_aligned_16(global)) {
        fail(FaultKind::Misaligned, "copy_async_16 from %p to %p: both must be 16-byte aligned", global, shared);
    }
    watch_access(Access::StartCopy, shared, 16);
    if (valid) {
        watch_access(Access::Read, global, 16);
    }
    const Copy copy{shared, global, valid};
    if (copy_lands_at_once()) {
        land(copy);
    } else {
        copies_of_this_thread().start(copy);
    }
}

void commit_copies(Site site) {
    if (!is_removed(site)) {
        copies_of_this_thread().commit();
    }
}

void wait_for_copies(int newest_to_leave, Site site) {
    if (!is_removed(site)) {
        copies_of_this_thread().end_all_but(newest_to_leave, land);
    }
}

}  // namespace emulator
