#include "shared_memory.h"

#include <cstdint>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace emulator {

namespace {

constexpr size_t ALIGNMENT = 128;
constexpr size_t REDZONE_BYTES = 256;

// Both are NaN as bf16, f16 and f32; they differ so that copied poison does not pass for an untouched redzone.
constexpr unsigned char POISON = 0xff;
constexpr uint16_t REDZONE_PATTERN = 0xffc1;

// A redzone also takes the bytes that round the array up to the alignment.
size_t redzone_begin(const SharedMemory::Array& array) { return array.offset + array.bytes; }

size_t redzone_end(const SharedMemory::Array& array) {
    const size_t aligned = (redzone_begin(array) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return aligned + REDZONE_BYTES;
}

unsigned char redzone_byte(size_t offset) { return static_cast<unsigned char>(REDZONE_PATTERN >> (8 * (offset % 2))); }

}  // namespace

SharedMemory::SharedMemory() : storage_(new char[CAPACITY_BYTES + ALIGNMENT]) {
    const auto address = reinterpret_cast<uintptr_t>(storage_.get());
    memory_ = storage_.get() + (ALIGNMENT - address % ALIGNMENT) % ALIGNMENT;
}

bool SharedMemory::begin_launch(size_t dynamic_bytes, size_t limit_bytes) {
    limit_bytes_ = limit_bytes;
    ASAN_UNPOISON_MEMORY_REGION(memory_, CAPACITY_BYTES);
    arrays_.clear();
    used_ = 0;
    payload_bytes_ = 0;
    return add(nullptr, "the launch's shared memory", dynamic_bytes);
}

bool SharedMemory::add(const void* declaration, const char* name, size_t bytes) {
    const Array array{declaration, name, used_, bytes};
    if (bytes > limit_bytes_ || payload_bytes_ + bytes > limit_bytes_ || redzone_end(array) > CAPACITY_BYTES) {
        return false;
    }
    arrays_.push_back(array);
    used_ = redzone_end(array);
    payload_bytes_ += bytes;
    poison(array);
    return true;
}

void SharedMemory::poison(const Array& array) {
    ASAN_UNPOISON_MEMORY_REGION(memory_ + array.offset, redzone_end(array) - array.offset);
    std::memset(memory_ + array.offset, POISON, array.bytes);
    for (size_t i = redzone_begin(array); i < redzone_end(array); i++) {
        memory_[i] = static_cast<char>(redzone_byte(i));
    }
    ASAN_POISON_MEMORY_REGION(memory_ + redzone_begin(array), redzone_end(array) - redzone_begin(array));
}

void SharedMemory::begin_block() {
    for (const Array& array : arrays_) {
        poison(array);
    }
}

void* SharedMemory::array(const void* declaration, const char* name, size_t bytes) {
    for (const Array& array : arrays_) {
        if (array.declaration == declaration) {
            return memory_ + array.offset;
        }
    }
    return add(declaration, name, bytes) ? memory_ + arrays_.back().offset : nullptr;
}

void* SharedMemory::dynamic() { return memory_; }

const SharedMemory::Array* SharedMemory::find_overrun() const {
    for (const Array& array : arrays_) {
        ASAN_UNPOISON_MEMORY_REGION(memory_ + redzone_begin(array), redzone_end(array) - redzone_begin(array));
        for (size_t i = redzone_begin(array); i < redzone_end(array); i++) {
            if (static_cast<unsigned char>(memory_[i]) != redzone_byte(i)) {
                return &array;
            }
        }
    }
    return nullptr;
}

const SharedMemory::Array* SharedMemory::find(const void* address, size_t bytes) const {
    const size_t begin = offset_of(address);
    for (const Array& array : arrays_) {
        if (begin >= array.offset && begin + bytes <= array.offset + array.bytes) {
            return &array;
        }
    }
    return nullptr;
}

}  // namespace emulator
