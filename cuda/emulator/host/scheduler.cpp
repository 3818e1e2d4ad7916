#include "scheduler.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>

#include "trap.h"

namespace emulator {

__thread Machine* machine = nullptr;

namespace {

// SplitMix64: the random orders depend on nothing but their seed and the block.
uint64_t next_random(uint64_t& state) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

}  // namespace

const char* base_name(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash == nullptr ? path : slash + 1;
}

bool operator==(const Site& a, const Site& b) {
    return a.line == b.line && std::strcmp(base_name(a.file), base_name(b.file)) == 0;
}

uint64_t Machine::random() { return next_random(random_); }

void Machine::thread_main() {
    announce_fiber_start();
    machine->launch_->body(machine->launch_->arguments);
    machine->set_state(machine->current_, State::Exited);
    machine->alive_--;
    if (machine->at_barrier_ > 0 && machine->at_barrier_ == machine->alive_) {
        machine->release_barrier();
    }
    suspend_fiber(machine->thread().execution, machine->scheduler_, true);
    __builtin_unreachable();
}

bool Machine::run(const Launch& launch, Fault& fault) {
    launch_ = &launch;
    fault_ = &fault;
    fault = Fault{};
    met_.clear();
    stacks_.reserve(launch.threads);
    threads_.resize(std::max<size_t>(threads_.size(), launch.threads));
    prepare_threads();
    if (!shared_.begin_launch(launch.shared_bytes, launch.shared_limit)) {
        report(FaultKind::SharedTooLarge, "the launch asks for %zu bytes of shared memory; every GPU has %zu",
               launch.shared_bytes, launch.shared_limit);
        return false;
    }
    if (launch.watched) {
        watch_.begin_launch(launch.memory, launch.memory_count, shared_);
    }
    const uint64_t blocks = static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
    for (uint64_t i = 0; i < blocks && fault.kind == FaultKind::None; i++) {
        run_block(launch.order.kind == Order::Reverse ? blocks - 1 - i : i);
    }
    if (fault.kind != FaultKind::None) {
        stacks_.forget_frames();
        return false;
    }
    return true;
}

void Machine::run_block(uint64_t number) {
    const dim3& grid = launch_->grid;
    block_ = uint3{static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
                   static_cast<unsigned>(number / grid.x / grid.y)};
    random_ = launch_->order.seed ^ (number * 0xd1342543de82ef95u);
    shared_.begin_block();
    watch_.begin_block();
    prepare_threads();
    while (alive_ > 0 && fault_->kind == FaultKind::None) {
        const unsigned chosen = choose_warp();
        if (chosen == warps()) {
            report_deadlock();
            return;
        }
        run_warp(warps_[chosen], chosen * LANES);
    }
    if (fault_->kind != FaultKind::None) {
        return;
    }
    if (const SharedMemory::Array* array = shared_.find_overrun()) {
        report(FaultKind::SharedOverrun, "bytes behind the end of %s were written (%zu bytes long)", array->name, array->bytes);
    }
}

void Machine::prepare_threads() {
    const unsigned count = launch_->threads;
    alive_ = count;
    at_barrier_ = 0;
    for (unsigned i = 0; i < count; i++) {
        Thread& thread = threads_[i];
        thread.index = uint3{i, 0, 0};
        thread.state = State::Ready;
        thread.waits_at = Site{};
        thread.copies.clear();
        thread.products.clear();
        prepare_fiber(thread.execution, stacks_.bottom(i), thread_main);
    }
    for (unsigned w = 0; w < warps(); w++) {
        const unsigned lanes = std::min(LANES, count - w * LANES);
        const unsigned present = lanes == LANES ? ~0u : (1u << lanes) - 1;
        warps_[w].present = warps_[w].ready = present;
        warps_[w].waiting = warps_[w].exited = 0;
    }
}

// The warp to run next, or warps() if none has a thread that can run.
unsigned Machine::choose_warp() {
    const unsigned count = warps();
    if (launch_->order.kind == Order::Random) {
        unsigned candidates[MAX_THREADS / LANES];
        unsigned found = 0;
        for (unsigned w = 0; w < count; w++) {
            if (warps_[w].ready != 0) {
                candidates[found++] = w;
            }
        }
        return found == 0 ? count : candidates[random() % found];
    }
    for (unsigned i = 0; i < count; i++) {
        const unsigned w = launch_->order.kind == Order::Reverse ? count - 1 - i : i;
        if (warps_[w].ready != 0) {
            return w;
        }
    }
    return count;
}

// Gives each lane of a warp one turn, in the launch's order.
void Machine::run_warp(Warp& warp, unsigned first_thread) {
    unsigned flip = 0;
    if (launch_->order.kind == Order::Reverse) {
        flip = LANES - 1;
    } else if (launch_->order.kind == Order::Random) {
        flip = random() % LANES;
    }
    for (unsigned i = 0; i < LANES && fault_->kind == FaultKind::None; i++) {
        const unsigned lane = i ^ flip;
        if (warp.ready >> lane & 1) {
            resume(first_thread + lane);
        }
    }
}

void Machine::resume(unsigned thread) {
    current_ = thread;
    is_in_a_thread_ = true;
    resume_fiber(scheduler_, threads_[thread].execution, stacks_.bottom(thread));
    is_in_a_thread_ = false;
    // What lands in shared memory after its block has ended may land in that of the next one.
    const Thread& resumed = threads_[thread];
    const bool has_work = !resumed.copies.is_empty() || !resumed.products.is_empty();
    if (has_work && resumed.state == State::Exited && fault_->kind == FaultKind::None) {
        report(FaultKind::UnderWay, "the thread ended while a copy or a product of a warpgroup was under way");
    }
}

void Machine::wait_for_others() { suspend_fiber(thread().execution, scheduler_, false); }

void Machine::set_state(unsigned thread, State state) {
    threads_[thread].state = state;
    Warp& warp = warps_[thread / LANES];
    const unsigned bit = 1u << thread % LANES;
    warp.ready = state == State::Ready ? warp.ready | bit : warp.ready & ~bit;
    warp.waiting = state == State::InWarpOperation ? warp.waiting | bit : warp.waiting & ~bit;
    warp.exited = state == State::Exited ? warp.exited | bit : warp.exited & ~bit;
}

void Machine::block_barrier(Site site) {
    thread().waits_at = site;
    set_state(current_, State::AtBarrier);
    at_barrier_++;
    // As since compute capability 7.0, a barrier waits for the threads that have not exited.
    if (at_barrier_ == alive_) {
        release_barrier();
    } else {
        wait_for_others();
    }
}

void Machine::release_barrier() {
    const Thread* first = nullptr;
    for (unsigned i = 0; i < launch_->threads; i++) {
        if (threads_[i].state != State::AtBarrier) {
            continue;
        }
        if (first == nullptr) {
            first = &threads_[i];
        } else if (!(threads_[i].waits_at == first->waits_at)) {
            const Site here = threads_[i].waits_at;
            emulator::fail(FaultKind::DivergentBarrier, "thread %u waits in __syncthreads() at %s:%u, thread %u at %s:%u", i,
                           base_name(here.file), here.line, static_cast<unsigned>(first - threads_.data()),
                           base_name(first->waits_at.file), first->waits_at.line);
        }
    }
    for (unsigned i = 0; i < launch_->threads; i++) {
        if (threads_[i].state == State::AtBarrier) {
            set_state(i, State::Ready);
        }
    }
    at_barrier_ = 0;
    watch_.order_block();
}

void Machine::warp_collective(unsigned mask, WarpOperation operation, void* argument, const char* name, Site site) {
    const unsigned first = current_ - lane();
    Warp& warp = warps_[current_ / LANES];
    mask &= warp.present;
    if (!(mask >> lane() & 1)) {
        emulator::fail(FaultKind::LaneMismatch, "lane %u calls %s at %s:%u with mask %08x, which leaves it out", lane(), name,
                       base_name(site.file), site.line, mask);
    }
    if (warp.exited & mask) {
        emulator::fail(FaultKind::LaneMismatch, "%s at %s:%u waits with mask %08x for lanes %08x, which have exited", name,
                       base_name(site.file), site.line, mask, warp.exited & mask);
    }
    if (const unsigned others = warp.waiting & mask) {
        const unsigned other = static_cast<unsigned>(__builtin_ctz(others));
        const Warp::Lane& its = warp.lanes[other];
        if (its.mask != mask || its.operation != operation) {
            const Site there = threads_[first + other].waits_at;
            emulator::fail(FaultKind::LaneMismatch, "lane %u calls %s at %s:%u with mask %08x, lane %u %s at %s:%u with %08x",
                           lane(), name, base_name(site.file), site.line, mask, other, its.name, base_name(there.file),
                           there.line, its.mask);
        }
    }
    warp.lanes[lane()] = Warp::Lane{mask, operation, name, argument};
    thread().waits_at = site;
    set_state(current_, State::InWarpOperation);
    if ((warp.waiting & mask) != mask) {
        wait_for_others();
        return;
    }
    void* arguments[LANES];
    for (unsigned i = 0; i < LANES; i++) {
        arguments[i] = mask >> i & 1 ? warp.lanes[i].argument : nullptr;
    }
    operation(arguments, mask);
    for (unsigned i = 0; i < LANES; i++) {
        if (mask >> i & 1) {
            set_state(first + i, State::Ready);
        }
    }
}

void Machine::report_deadlock() {
    char waits[256];
    size_t length = 0;
    waits[0] = 0;
    // The first thread of each kind of waiting says enough.
    for (State state : {State::AtBarrier, State::InWarpOperation}) {
        for (unsigned i = 0; i < launch_->threads; i++) {
            if (threads_[i].state != state) {
                continue;
            }
            const char* what = state == State::AtBarrier ? "__syncthreads()" : warps_[i / LANES].lanes[i % LANES].name;
            const Site& site = threads_[i].waits_at;
            const int written = std::snprintf(waits + length, sizeof waits - length, "; thread %u waits in %s at %s:%u", i, what,
                                              base_name(site.file), site.line);
            length += static_cast<size_t>(written);
            length = std::min(length, sizeof waits - 1);
            break;
        }
    }
    report(FaultKind::Deadlock, "no thread can go on%s", waits);
}

void Machine::report(FaultKind kind, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    report(kind, format, arguments);
    va_end(arguments);
}

void Machine::report(FaultKind kind, const char* format, va_list arguments) {
    fault_->kind = kind;
    fault_->block = block_;
    fault_->thread = current_;
    for (unsigned i = 0; i < launch_->threads && i < threads_.size(); i++) {
        switch (threads_[i].state) {
            case State::Ready:
                fault_->ready++;
                break;
            case State::InWarpOperation:
                fault_->in_warp_operation++;
                break;
            case State::AtBarrier:
                fault_->at_barrier++;
                break;
            case State::Exited:
                fault_->exited++;
                break;
        }
    }
    std::vsnprintf(fault_->message, sizeof fault_->message, format, arguments);
}

// The thread that fails is never resumed: the scheduler sees the fault and leaves the block as it is.
void Machine::fail(FaultKind kind, const char* format, va_list arguments) {
    report(kind, format, arguments);
    suspend_fiber(thread().execution, scheduler_, true);
    __builtin_unreachable();
}

namespace {

// Machines are kept for later launches: their stacks are already mapped.
class MachinePool {
 public:
    std::unique_ptr<Machine> take() {
        std::lock_guard<std::mutex> lock(mutex_);
        if (idle_.empty()) {
            return std::make_unique<Machine>();
        }
        std::unique_ptr<Machine> taken = std::move(idle_.back());
        idle_.pop_back();
        return taken;
    }

    void put_back(std::unique_ptr<Machine> taken) {
        std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(taken));
    }

 private:
    std::mutex mutex_;
    std::vector<std::unique_ptr<Machine>> idle_;
};

MachinePool& pool() {
    static MachinePool* const shared = new MachinePool;  // never destroyed: a launch may outlive main's statics
    return *shared;
}

}  // namespace

bool run(const Launch& launch, Fault& fault, void (*visit)(void*, Site), void* context) {
    catch_traps();
    std::unique_ptr<Machine> taken = pool().take();
    machine = taken.get();
    const bool succeeded = taken->run(launch, fault);
    machine = nullptr;
    if (visit != nullptr) {
        for (const Site& site : taken->met()) {
            visit(context, site);
        }
    }
    pool().put_back(std::move(taken));
    return succeeded;
}

char* stack_of_running_thread() {
    return machine != nullptr && machine->is_in_a_thread() ? machine->stack_bottom() : nullptr;
}

}  // namespace emulator
