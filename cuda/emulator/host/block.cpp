#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace emulator {

__thread Thread* current_thread = nullptr;
__thread uint3 current_block_idx = {};
__thread dim3 current_block_dim;
__thread dim3 current_grid_dim;

namespace {

constexpr unsigned LANES = 32;

// The shared memory of a block: the dynamic part, then each static array as it is first met, all apart from each other.
class SharedMemory {
 public:
    SharedMemory() : memory_(static_cast<unsigned char*>(std::aligned_alloc(ALIGNMENT, CAPACITY))) {}
    ~SharedMemory() {
        ASAN_UNPOISON_MEMORY_REGION(memory_, CAPACITY);
        std::free(memory_);
    }
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;

    // As a block finds it: every byte is part of a NaN.
    void reset(size_t dynamic_bytes) {
        ASAN_UNPOISON_MEMORY_REGION(memory_, CAPACITY);
        arrays_.clear();
        used_ = 0;
        take(nullptr, dynamic_bytes);
    }

    void* dynamic() const { return memory_; }

    void* array(const void* site, size_t bytes) {
        for (const Array& array : arrays_) {
            if (array.site == site) {
                return memory_ + array.start;
            }
        }
        return take(site, bytes);
    }

    // The bytes behind each array are as they were.
    bool redzones_are_intact() const {
        return std::all_of(arrays_.begin(), arrays_.end(), [this](const Array& array) {
            const unsigned char* const redzone = memory_ + array.start + array.bytes;
            ASAN_UNPOISON_MEMORY_REGION(redzone, array.redzone_bytes);
            return std::all_of(redzone, redzone + array.redzone_bytes, [](unsigned char byte) { return byte == REDZONE; });
        });
    }

 private:
    static constexpr size_t ALIGNMENT = 128;
    // More than the 227 KiB of the largest GPU, for the redzones.
    static constexpr size_t CAPACITY = 512 << 10;
    static constexpr unsigned char POISON = 0xff;
    static constexpr unsigned char REDZONE = 0xa5;

    struct Array {
        const void* site;
        size_t start, bytes, redzone_bytes;
    };

    void* take(const void* site, size_t bytes) {
        const size_t redzone_bytes = ALIGNMENT + (ALIGNMENT - bytes % ALIGNMENT) % ALIGNMENT;
        if (used_ + bytes + redzone_bytes > CAPACITY) {
            fault("more shared memory than any GPU has");
        }
        unsigned char* const start = memory_ + used_;
        std::memset(start, POISON, bytes);
        std::memset(start + bytes, REDZONE, redzone_bytes);
        ASAN_POISON_MEMORY_REGION(start + bytes, redzone_bytes);
        arrays_.push_back({site, used_, bytes, redzone_bytes});
        used_ += bytes + redzone_bytes;
        return start;
    }

    unsigned char* memory_;
    size_t used_ = 0;
    std::vector<Array> arrays_;
};

// A block that runs: its fibers and who waits for what. One for each thread of the host, used again from launch to launch.
class Block {
 public:
    // Runs the block that current_block_idx names.
    std::string run(const Launch& launch, uint64_t number) {
        prepare(launch);
        uint64_t random = launch.seed * 0x9e3779b97f4a7c15u + number;
        while (alive_ > 0 && fault_.empty()) {
            if (launch.order == Order::RANDOM) {
                shuffle(random);
            }
            if (!run_ready_threads()) {
                report("deadlock: every thread waits");
            }
        }
        if (fault_.empty() && !shared.redzones_are_intact()) {
            report("a shared array was written past its end");
        }
        return fault_;
    }

    void wait_at_barrier() {
        current_thread->state = State::AT_BARRIER;
        at_barrier_++;
        if (at_barrier_ < alive_) {
            suspend_current(false);
            return;
        }
        at_barrier_ = 0;
        for (Thread& thread : running()) {
            if (thread.state == State::AT_BARRIER) {
                thread.state = State::READY;
            }
        }
    }

    void join_warp_operation(unsigned lanes, WarpOperation operation, void* operand) {
        Thread& me = *current_thread;
        const unsigned first = me.index / LANES * LANES;
        const unsigned lane_count = std::min(LANES, count_ - first);
        if (lane_count < LANES) {
            lanes &= (1u << lane_count) - 1;
        }
        if ((lanes >> (me.index - first) & 1) == 0) {
            fault("a lane calls a warp operation that its mask leaves out");
        }
        me.state = State::IN_WARP_OPERATION;
        me.operation = operation;
        me.lanes = lanes;
        me.operand = operand;

        void* operands[LANES] = {};
        for (unsigned lane = 0; lane < lane_count; lane++) {
            if ((lanes >> lane & 1) == 0) {
                continue;
            }
            const Thread& other = threads_[first + lane];
            if (other.state == State::EXITED) {
                fault("a lane in the mask of a warp operation has exited");
            }
            if (other.state != State::IN_WARP_OPERATION) {
                suspend_current(false);
                return;
            }
            if (other.operation != operation || other.lanes != lanes) {
                fault("lanes of one mask are in different warp operations");
            }
            operands[lane] = other.operand;
        }
        operation(operands, lanes);
        for (unsigned lane = 0; lane < lane_count; lane++) {
            if (lanes >> lane & 1) {
                threads_[first + lane].state = State::READY;
            }
        }
    }

    [[noreturn]] void abandon(const char* what) {
        report(what);
        suspend_current(true);
        std::abort();
    }

    SharedMemory shared;

 private:
    struct Running {
        Thread *first, *last;
        Thread* begin() const { return first; }
        Thread* end() const { return last; }
    };
    Running running() { return {threads_.get(), threads_.get() + count_}; }

    void prepare(const Launch& launch) {
        launch_ = &launch;
        fault_.clear();
        count_ = launch.kernel->threads;
        if (count_ > capacity_) {
            threads_ = std::make_unique<Thread[]>(count_);
            capacity_ = count_;
            stacks_.reserve(count_);
        }
        alive_ = count_;
        at_barrier_ = 0;
        order_.resize(count_);
        std::iota(order_.begin(), order_.end(), 0u);
        if (launch.order == Order::REVERSE) {
            std::reverse(order_.begin(), order_.end());
        }
        for (unsigned index = 0; index < count_; index++) {
            Thread& thread = threads_[index];
            thread.state = State::READY;
            thread.index = index;
            thread.thread_idx = {index, 0, 0};
            thread.copies.clear();
            thread.group_ends.clear();
            prepare_fiber(thread.execution, stacks_.bottom(index), run_kernel);
        }
        shared.reset(launch.dynamic_bytes);
    }

    static void run_kernel();

    // Lets each thread that can go on do so, in order. Whether there was one.
    bool run_ready_threads() {
        bool any = false;
        for (const unsigned index : order_) {
            Thread& thread = threads_[index];
            if (thread.state != State::READY) {
                continue;
            }
            any = true;
            current_thread = &thread;
            resume_fiber(scheduler_, thread.execution, stacks_.bottom(index));
            if (!fault_.empty()) {
                return true;
            }
            if (thread.state == State::EXITED) {
                alive_--;
                if (at_barrier_ > 0) {
                    report("a thread exited while others wait for it at a barrier");
                    return true;
                }
            }
        }
        return any;
    }

    void suspend_current(bool forever) { suspend_fiber(current_thread->execution, scheduler_, forever); }

    void shuffle(uint64_t& random) {
        for (unsigned i = count_; i > 1; i--) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            std::swap(order_[i - 1], order_[(random >> 33) % i]);
        }
    }

    void report(const char* what) {
        unsigned in_state[4] = {};
        for (const Thread& thread : running()) {
            in_state[static_cast<int>(thread.state)]++;
        }
        const auto number = [](unsigned n) { return std::to_string(n); };
        const uint3 block = current_block_idx;
        fault_ = launch_->kernel->name + ", block (" + number(block.x) + ", " + number(block.y) + ", " + number(block.z) +
                 "), thread " + number(current_thread->index) + ": " + what + "; of " + number(count_) + " threads " +
                 number(in_state[0]) + " can run, " + number(in_state[1]) + " wait in a warp operation, " +
                 number(in_state[2]) + " at a barrier, " + number(in_state[3]) + " have exited";
    }

    const Launch* launch_ = nullptr;
    std::string fault_;
    Stacks stacks_;
    std::unique_ptr<Thread[]> threads_;
    std::vector<unsigned> order_;
    unsigned count_ = 0, capacity_ = 0, alive_ = 0, at_barrier_ = 0;
    ExecutionState scheduler_;
};

Block& current_block() {
    static thread_local Block block;
    return block;
}

void Block::run_kernel() {
    announce_fiber_start();
    Block& block = current_block();
    block.launch_->kernel->invoke(block.launch_->arguments);
    current_thread->state = State::EXITED;
    block.suspend_current(true);
    std::abort();
}

}  // namespace

std::string run(const Launch& launch) {
    current_block_dim = dim3(launch.kernel->threads);
    current_grid_dim = launch.grid;
    uint64_t number = 0;
    for (unsigned z = 0; z < launch.grid.z; z++) {
        for (unsigned y = 0; y < launch.grid.y; y++) {
            for (unsigned x = 0; x < launch.grid.x; x++) {
                current_block_idx = {x, y, z};
                std::string fault = current_block().run(launch, number++);
                if (!fault.empty()) {
                    return fault;
                }
            }
        }
    }
    return {};
}

void wait_at_barrier() { current_block().wait_at_barrier(); }

void join_warp_operation(unsigned lanes, WarpOperation operation, void* operand) {
    current_block().join_warp_operation(lanes, operation, operand);
}

void* shared_array(const void* site, size_t bytes) { return current_block().shared.array(site, bytes); }

void* dynamic_shared_memory() { return current_block().shared.dynamic(); }

void fault(const char* what) { current_block().abandon(what); }

}  // namespace emulator
