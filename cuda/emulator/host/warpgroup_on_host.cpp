// wgmma.mma_async as the PTX ISA describes it, for factors in panels with a swizzle of 128 bytes: which lane holds which element,
// where an element lies in shared memory, and when a product may read and write.
#include "warpgroup_on_host.h"

#include "group_queue.h"

namespace emulator {

namespace {

constexpr unsigned GROUP_BYTES = 1024;  // eight rows of 128 bytes
constexpr unsigned K = 16;
constexpr unsigned MAX_COLUMNS = 128;

struct ProductLane {
    const Product* product;
    unsigned first_row;
};

float widen(uint16_t bits) { return __uint_as_float(static_cast<unsigned>(bits) << 16); }

// The element at a row and a column of the panel that begins at `start`, read by a lane.
float element(const unsigned char* start, unsigned row, unsigned column, unsigned lane) {
    uintptr_t address = reinterpret_cast<uintptr_t>(start) + row / 8 * GROUP_BYTES + row % 8 * 128 + column * 2;
    address ^= (address >> 7 & 7) << 4;
    const uint16_t* const place = reinterpret_cast<const uint16_t*>(address);
    watch_access_of_lane(lane, Access::Read, place, sizeof *place);
    return widen(*place);
}

// The 16 rows of a warp.
void multiply_rows_of_warp(void* const* arguments, unsigned) {
    const Product& first = *static_cast<const ProductLane*>(arguments[0])->product;
    const unsigned columns = static_cast<unsigned>(first.columns);
    float a[16][K];
    static thread_local float b[K][MAX_COLUMNS];  // the stack of a fiber is small
    for (unsigned i = 0; i < LANES; i++) {
        const ProductLane& lane = *static_cast<const ProductLane*>(arguments[i]);
        for (unsigned r = 0; r < 4; r++) {
            const unsigned row = i / 4 + 8 * (r % 2), column = 2 * (i % 4) + 8 * (r / 2);
            for (unsigned half = 0; half < 2; half++) {
                a[row][column + half] = lane.product->a_registers
                                            ? widen(static_cast<uint16_t>(lane.product->a_registers[r] >> (16 * half)))
                                            : element(first.a, lane.first_row + row, column + half, i);
            }
        }
        for (unsigned n = i; n < columns; n += LANES) {
            for (unsigned k = 0; k < K; k++) {
                b[k][n] = first.a_registers ? element(first.b + n / 64 * static_cast<unsigned>(first.b_panel_bytes), k, n % 64, i)
                                            : element(first.b, n, k, i);
            }
        }
    }
    for (unsigned i = 0; i < LANES; i++) {
        const Product& product = *static_cast<const ProductLane*>(arguments[i])->product;
        for (unsigned r = 0; r < columns / 2; r++) {
            const unsigned row = i / 4 + 8 * (r / 2 % 2), n = r / 4 * 8 + 2 * (i % 4) + r % 2;
            float sum = product.add ? product.d[r] : 0.0f;
            for (unsigned k = 0; k < K; k++) {
                sum += a[row][k] * b[k][n];
            }
            product.d[r] = sum;
        }
    }
}

void finish(const Product& product, Site site) {
    ProductLane lane{&product, thread_index().x / LANES % 4 * 16};
    warp_collective(~0u, multiply_rows_of_warp, &lane, "a product of a warpgroup", site);
}

}  // namespace

void start_warpgroup_product(float* d, int columns, const unsigned* a_registers, SharedFactor a, SharedFactor b, bool add,
                             Site site) {
    // A start within a row moves along the columns; what is below it is the place of a panel.
    const auto is_in_panels = [](const unsigned char* start) { return reinterpret_cast<uintptr_t>(start) % GROUP_BYTES < 128; };
    if (!is_in_panels(b.start) || (a_registers == nullptr && !is_in_panels(a.start))) {
        fail(FaultKind::Misaligned, "a product of a warpgroup at line %u: its panels begin at no multiple of 1024 bytes",
             site.line);
    }
    const Product product{d, columns, a_registers, a.start, b.start, b.panel_bytes, add};
    if (products_end_at_once()) {
        finish(product, site);
    } else {
        products_of_this_thread().start(product);
    }
}

void commit_warpgroup_products(Site site) {
    if (!is_removed(site)) {
        products_of_this_thread().commit();
    }
}

void wait_for_warpgroup_products(int newest_to_leave, Site site) {
    if (!is_removed(site)) {
        products_of_this_thread().end_all_but(newest_to_leave, [&](const Product& product) { finish(product, site); });
    }
}

}  // namespace emulator
