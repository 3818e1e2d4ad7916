// What kernels call: who the thread is, barriers, warp operations, shared memory.
#include "machine.h"

#include <algorithm>

#include "scheduler.h"

namespace emulator {

uint3 thread_index() { return machine->thread().index; }

uint3 block_index() { return machine->block(); }

dim3 block_size() { return dim3(machine->launch().threads); }

dim3 grid_size() { return machine->launch().grid; }

bool is_removed(Site site) {
    std::vector<Site>& met = machine->met();
    const auto is_same = [&](const Site& other) { return other.line == site.line && other.file == site.file; };
    if (std::none_of(met.begin(), met.end(), is_same)) {
        met.push_back(site);
    }
    const Site& removed = machine->launch().removed;
    return removed.file != nullptr && removed == site;
}

void block_barrier(Site site) {
    if (!is_removed(site)) {
        machine->block_barrier(site);
    }
}

void warp_barrier(unsigned mask, Site site) {
    if (is_removed(site)) {
        return;
    }
    const auto order = [](void* const*, unsigned) { machine->watch().order_warp(machine->current() / LANES); };
    machine->warp_collective(mask, order, nullptr, "__syncwarp", site);
}

void warp_collective(unsigned mask, WarpOperation operation, void* argument, const char* name, Site site) {
    machine->warp_collective(mask, operation, argument, name, site);
}

namespace {

struct ShuffleLane {
    uint64_t value;
    uint64_t result;
    unsigned source;
};

void shuffle_all(void* const* arguments, unsigned mask) {
    for (unsigned i = 0; i < LANES; i++) {
        if (!(mask >> i & 1)) {
            continue;
        }
        ShuffleLane& lane = *static_cast<ShuffleLane*>(arguments[i]);
        if (!(mask >> lane.source & 1)) {
            fail(FaultKind::LaneMismatch, "lane %u shuffles from lane %u, which mask %08x leaves out", i, lane.source, mask);
        }
        lane.result = static_cast<const ShuffleLane*>(arguments[lane.source])->value;
    }
}

// A lane that would read beyond its segment of `width` lanes reads itself.
unsigned shuffle_source(Shuffle kind, unsigned lane, int operand, int width) {
    const int begin = static_cast<int>(lane) & ~(width - 1);
    const int end = begin + width;
    const int self = static_cast<int>(lane);
    int source = self;
    switch (kind) {
        case Shuffle::FromLane:
            source = begin + (operand & (width - 1));
            break;
        case Shuffle::Up:
            source = self - operand;
            break;
        case Shuffle::Down:
            source = self + operand;
            break;
        case Shuffle::Xor:
            return static_cast<unsigned>((self ^ operand) < end ? self ^ operand : self);
    }
    return static_cast<unsigned>(source >= begin && source < end ? source : self);
}

const char* shuffle_name(Shuffle kind) {
    switch (kind) {
        case Shuffle::FromLane:
            return "__shfl_sync";
        case Shuffle::Up:
            return "__shfl_up_sync";
        case Shuffle::Down:
            return "__shfl_down_sync";
        case Shuffle::Xor:
            return "__shfl_xor_sync";
    }
    return "";
}

struct BallotLane {
    bool predicate;
    unsigned result;
};

void ballot_all(void* const* arguments, unsigned mask) {
    unsigned result = 0;
    for (unsigned i = 0; i < LANES; i++) {
        if (mask >> i & 1 && static_cast<const BallotLane*>(arguments[i])->predicate) {
            result |= 1u << i;
        }
    }
    for (unsigned i = 0; i < LANES; i++) {
        if (mask >> i & 1) {
            static_cast<BallotLane*>(arguments[i])->result = result;
        }
    }
}

}  // namespace

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
    ShuffleLane lane{value, 0, shuffle_source(kind, machine->lane(), operand, width)};
    machine->warp_collective(mask, shuffle_all, &lane, shuffle_name(kind), site);
    return lane.result;
}

unsigned ballot(unsigned mask, bool predicate, Site site) {
    BallotLane lane{predicate, 0};
    machine->warp_collective(mask, ballot_all, &lane, "__ballot_sync", site);
    return lane.result;
}

void* shared_array(const void* declaration, const char* name, size_t bytes) {
    void* array = machine->shared().array(declaration, name, bytes);
    if (array == nullptr) {
        fail(FaultKind::SharedTooLarge, "no room for %s (%zu bytes) in the %zu bytes of shared memory that every GPU has", name,
             bytes, machine->launch().shared_limit);
    }
    return array;
}

void* dynamic_shared() { return machine->shared().dynamic(); }

void watch_access(Access access, const void* address, size_t bytes) {
    if (machine != nullptr && machine->launch().watched) {
        machine->watch().check(access, address, bytes, machine->current());
    }
}

void watch_access_of_lane(unsigned lane, Access access, const void* address, size_t bytes) {
    if (machine->launch().watched) {
        machine->watch().check(access, address, bytes, machine->current() - machine->lane() + lane);
    }
}

Site last_synchronization() { return machine->thread().waits_at; }

bool is_on_a_stack(const void* address) { return machine->stacks().contain(address); }

bool copy_lands_at_once() {
    if (machine->launch().watched) {
        return false;
    }
    switch (machine->launch().order.kind) {
        case Order::Forward:
            return false;
        case Order::Reverse:
            return true;
        case Order::Random:
            return machine->random() % 2 == 0;
    }
    return false;
}

GroupQueue<Copy>& copies_of_this_thread() { return machine->thread().copies; }

// The same for all lanes of a warp, which compute it together.
bool products_end_at_once() { return !machine->launch().watched && machine->launch().order.kind == Order::Reverse; }

GroupQueue<Product>& products_of_this_thread() { return machine->thread().products; }

void fail(FaultKind kind, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    machine->fail(kind, format, arguments);
}

}  // namespace emulator
