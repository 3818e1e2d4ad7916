// The shared memory of one block: one arena in which every array is followed by a redzone.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace emulator {

class SharedMemory {
 public:
    struct Array {
        const void* declaration;  // which SHARED(...) it is; null for the dynamic part
        const char* name;
        size_t offset;
        size_t bytes;
    };

    SharedMemory();

    // Forgets the arrays of the last launch and lays out the dynamic part. False if it is larger than what a block may have.
    bool begin_launch(size_t dynamic_bytes, size_t limit_bytes);

    // Fills every array with NaN bits and writes the redzones.
    void begin_block();

    // The array declared at `declaration`: laid out by the first thread that asks. Null if there is no room.
    void* array(const void* declaration, const char* name, size_t bytes);

    void* dynamic();

    // An array whose redzone was written, or null.
    const Array* find_overrun() const;

    // The array that holds all bytes of [address, address + bytes), or null.
    const Array* find(const void* address, size_t bytes) const;

    bool owns(const void* address) const {
        const char* byte = static_cast<const char*>(address);
        return byte >= memory_ && byte < memory_ + CAPACITY_BYTES;
    }
    size_t offset_of(const void* address) const { return static_cast<size_t>(static_cast<const char*>(address) - memory_); }

    static constexpr size_t CAPACITY_BYTES = 288 << 10;

 private:
    bool add(const void* declaration, const char* name, size_t bytes);
    void poison(const Array& array);

    std::unique_ptr<char[]> storage_;
    char* memory_;
    std::vector<Array> arrays_;
    size_t used_ = 0;
    size_t payload_bytes_ = 0;
    size_t limit_bytes_ = 0;
};

}  // namespace emulator
