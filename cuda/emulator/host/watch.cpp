#include "watch.h"

#include <cstdio>
#include <cstdlib>

// The program's own code and constants, as the linker lays them out.
extern "C" {
extern const char __executable_start __attribute__((weak));
extern const char end __attribute__((weak));
}

namespace emulator {

namespace {

// Cell::writer is a thread, with one of these flags or none.
constexpr unsigned ATOMIC = 0x4000;
constexpr unsigned UNDER_WAY = 0x8000;
constexpr unsigned THREAD_MASK = 0x3fff;

// Cell::reader is a thread, or several lanes of one warp, or threads of several warps.
constexpr unsigned SEVERAL_LANES = 0x4000;
constexpr unsigned SEVERAL_WARPS = 0x8000;

bool is_constant_of_the_program(const char* address) { return address >= &__executable_start && address < &end; }

const char* verb(Access access) {
    switch (access) {
        case Access::Read:
            return "reads";
        case Access::Write:
            return "writes";
        case Access::Atomic:
            return "atomically changes";
        case Access::StartCopy:
            return "starts a copy to";
        case Access::EndCopy:
            return "completes a copy to";
    }
    return "";
}

}  // namespace

void Watch::begin_launch(const MemoryRange* memory, size_t count, const SharedMemory& shared) {
    shared_ = &shared;
    if (shared_cells_.empty() || time_ > UINT32_MAX / 2) {
        shared_cells_.assign(SharedMemory::CAPACITY_BYTES, Cell{});
        time_ = 0;
    }
    time_++;
    buffers_.clear();
    for (size_t i = 0; i < count; i++) {
        auto* cells = static_cast<Cell*>(std::calloc(memory[i].bytes + 1, sizeof(Cell)));
        buffers_.push_back(Buffer{static_cast<const char*>(memory[i].begin), memory[i].bytes, {cells, std::free}});
    }
}

void Watch::begin_block() {
    order_block();
    block_begin_ = time_;
}

void Watch::order_block() { block_ordered_ = ++time_; }

void Watch::order_warp(unsigned warp) { warp_ordered_[warp] = ++time_; }

void Watch::check(Access access, const void* address, size_t bytes, unsigned thread) {
    const char* begin = static_cast<const char*>(address);
    Place place{access, address, bytes, thread, nullptr};
    Cell* cells = nullptr;
    if (shared_->owns(address)) {
        place.array = shared_->find(address, bytes);
        if (place.array == nullptr) {
            fail(FaultKind::SharedOverrun, "thread %u %s %zu bytes beyond the end of a shared array", thread, verb(access),
                 bytes);
        }
        cells = &shared_cells_[shared_->offset_of(address)];
    } else if (is_on_a_stack(address) || is_constant_of_the_program(begin) || buffers_.empty()) {
        return;
    } else if (Buffer* buffer = find_buffer(begin, bytes)) {
        cells = &buffer->cells[begin - buffer->begin];
    } else {
        fail_outside(place);
    }
    const bool is_whole = bytes == 2 || bytes == 4 || bytes == 8 || bytes == 16;
    if (is_whole && reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail(FaultKind::Misaligned, "thread %u %s %zu bytes at %p", thread, verb(access), bytes, address);
    }
    for (size_t i = 0; i < bytes; i++) {
        check_byte(cells[i], place);
    }
}

Watch::Buffer* Watch::find_buffer(const char* address, size_t bytes) {
    for (Buffer& buffer : buffers_) {
        if (address >= buffer.begin && address + bytes <= buffer.begin + buffer.bytes) {
            return &buffer;
        }
    }
    return nullptr;
}

void Watch::check_byte(Cell& cell, const Place& place) {
    const bool is_shared = place.array != nullptr;
    const unsigned writer = cell.writer & THREAD_MASK;
    const bool was_written = cell.write_time >= block_begin_;
    if (place.access == Access::EndCopy) {
        cell.write_time = time_;
        cell.writer = static_cast<uint16_t>(place.thread);
        return;
    }
    if (was_written && cell.writer & UNDER_WAY) {
        fail_race("to which a copy is under way, started by", writer, false, place);
    }
    const bool both_atomic = place.access == Access::Atomic && cell.writer & ATOMIC;
    if (!both_atomic) {
        if (was_written && is_concurrent(cell.write_time, writer, place)) {
            fail_race("written, with no barrier between, by", writer, false, place);
        }
        if (!is_shared && is_of_another_block(cell.write_time)) {
            fail_race("written by", writer, true, place);
        }
    }
    if (place.access == Access::Read) {
        if (is_shared && !was_written) {
            fail(FaultKind::Uninitialized, "thread %u reads %s + %zu, which its block has not written", place.thread,
                 place.array->name, shared_->offset_of(place.address) - place.array->offset);
        }
        note_reader(cell, place.thread);
        return;
    }
    if (cell.read_time >= block_begin_ && is_concurrent_reader(cell, place)) {
        fail_race("read, with no barrier between, by", cell.reader, false, place);
    }
    if (!is_shared && is_of_another_block(cell.read_time)) {
        fail_race("read by", cell.reader, true, place);
    }
    unsigned flags = 0;
    if (place.access == Access::Atomic) {
        flags = ATOMIC;
    } else if (place.access == Access::StartCopy) {
        flags = UNDER_WAY;
    }
    cell.write_time = time_;
    cell.writer = static_cast<uint16_t>(place.thread | flags);
}

// Whether nothing orders what `other` did at `time`, in this block, before this access.
bool Watch::is_concurrent(uint32_t time, unsigned other, const Place& place) const {
    if (other == place.thread || time < block_ordered_) {
        return false;
    }
    return other / LANES != place.thread / LANES || time >= warp_ordered_[place.thread / LANES];
}

bool Watch::is_concurrent_reader(const Cell& cell, const Place& place) const {
    if (cell.reader == SEVERAL_WARPS) {
        return cell.read_time >= block_ordered_;
    }
    if (cell.reader & SEVERAL_LANES) {
        const unsigned warp = cell.reader & THREAD_MASK;
        const bool is_own_warp = warp == place.thread / LANES;
        return cell.read_time >= block_ordered_ && (!is_own_warp || cell.read_time >= warp_ordered_[warp]);
    }
    return is_concurrent(cell.read_time, cell.reader, place);
}

// Adds a reader to those since the last barrier.
void Watch::note_reader(Cell& cell, unsigned thread) const {
    const unsigned warp = thread / LANES;
    const bool is_several_lanes = cell.reader & SEVERAL_LANES;
    const bool is_same_warp =
        cell.reader != SEVERAL_WARPS && (is_several_lanes ? cell.reader & THREAD_MASK : cell.reader / LANES) == warp;
    if (cell.read_time < block_ordered_ || (is_same_warp && cell.read_time < warp_ordered_[warp])) {
        cell.reader = static_cast<uint16_t>(thread);
    } else if (!is_same_warp) {
        cell.reader = SEVERAL_WARPS;
    } else if (cell.reader != thread) {
        cell.reader = static_cast<uint16_t>(SEVERAL_LANES | warp);
    }
    cell.read_time = time_;
}

void Watch::fail_race(const char* what, unsigned other, bool is_other_block, const Place& place) {
    char who[32];
    if (is_other_block) {
        std::snprintf(who, sizeof who, "another block");
    } else if (other == SEVERAL_WARPS) {
        std::snprintf(who, sizeof who, "several warps");
    } else if (other & SEVERAL_LANES) {
        std::snprintf(who, sizeof who, "lanes of warp %u", other & THREAD_MASK);
    } else {
        std::snprintf(who, sizeof who, "thread %u", other);
    }
    const Site since = last_synchronization();
    const char* file = since.file == nullptr ? "the beginning" : since.file;
    if (place.array != nullptr) {
        fail(FaultKind::Race, "thread %u %s %s + %zu, %s %s (since %s:%u)", place.thread, verb(place.access), place.array->name,
             shared_->offset_of(place.address) - place.array->offset, what, who, file, since.line);
    }
    const char* address = static_cast<const char*>(place.address);
    const Buffer* buffer = find_buffer(address, place.bytes);
    fail(FaultKind::Race, "thread %u %s byte %zu of buffer number %zu, %s %s (since %s:%u)", place.thread, verb(place.access),
         static_cast<size_t>(address - buffer->begin), static_cast<size_t>(buffer - buffers_.data()), what, who, file,
         since.line);
}

void Watch::fail_outside(const Place& place) {
    const char* address = static_cast<const char*>(place.address);
    const Buffer* nearest = &buffers_[0];
    const auto distance = [&](const Buffer& buffer) {
        return address < buffer.begin ? buffer.begin - address : address - (buffer.begin + buffer.bytes);
    };
    for (const Buffer& buffer : buffers_) {
        if (distance(buffer) < distance(*nearest)) {
            nearest = &buffer;
        }
    }
    fail(FaultKind::InvalidAccess, "thread %u %s %zu bytes at offset %td of buffer number %td, which has %zu bytes",
         place.thread, verb(place.access), place.bytes, address - nearest->begin, nearest - buffers_.data(), nearest->bytes);
}

}  // namespace emulator
