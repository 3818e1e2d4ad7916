// What the compiler calls from a watched kernel. It is compiled with -fsanitize=thread,undefined, but linked with these
// functions instead of the sanitizers' own: an access goes to watch.cpp, undefined behaviour becomes a fault.
#ifndef EMULATOR_SANITIZED

#include <cstddef>
#include <cstdint>

#include "machine.h"

using emulator::Access;
using emulator::fail;
using emulator::FaultKind;
using emulator::watch_access;

// --- -fsanitize=thread ----------------------------------------------------------------------------------------------------

#define REPORT(bytes)                                                                                             \
    extern "C" void __tsan_read##bytes(const void* address) { watch_access(Access::Read, address, bytes); }           \
    extern "C" void __tsan_write##bytes(const void* address) { watch_access(Access::Write, address, bytes); }         \
    extern "C" void __tsan_unaligned_read##bytes(const void* address) { watch_access(Access::Read, address, bytes); } \
    extern "C" void __tsan_unaligned_write##bytes(const void* address) { watch_access(Access::Write, address, bytes); }

REPORT(1)
REPORT(2)
REPORT(4)
REPORT(8)
REPORT(16)

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(const void*) {}
void __tsan_func_exit(const void*) {}
void __tsan_read_range(const void* address, size_t bytes) { watch_access(Access::Read, address, bytes); }
void __tsan_write_range(const void* address, size_t bytes) { watch_access(Access::Write, address, bytes); }
}

// --- -fsanitize=undefined -------------------------------------------------------------------------------------------------

namespace {

// How the compiler tells a place; the data of each check begins with one.
struct SourceLocation {
    const char* file;
    uint32_t line;
    uint32_t column;
};

struct TypeMismatch {
    SourceLocation location;
    const void* type;
    unsigned char log_alignment;
    unsigned char kind;
};

[[noreturn]] void fail_undefined(const void* data, const char* what) {
    const SourceLocation& location = *static_cast<const SourceLocation*>(data);
    fail(FaultKind::Undefined, "%s at %s:%u", what, location.file, location.line);
}

}  // namespace

extern "C" {

void __ubsan_handle_type_mismatch_v1(const TypeMismatch* data, const void* pointer) {
    const size_t alignment = size_t{1} << data->log_alignment;
    const bool is_misaligned = reinterpret_cast<uintptr_t>(pointer) % alignment != 0;
    const SourceLocation& location = data->location;
    if (pointer != nullptr && is_misaligned) {
        fail(FaultKind::Misaligned, "%p is not a multiple of %zu, which its access at %s:%u needs", pointer, alignment,
             location.file, location.line);
    }
    fail(FaultKind::InvalidAccess, "no memory at address %p at %s:%u", pointer, location.file, location.line);
}

void __ubsan_handle_pointer_overflow(const void* data, const void*, const void*) {
    fail_undefined(data, "a pointer beyond the address space");
}
void __ubsan_handle_out_of_bounds(const void* data, const void*) { fail_undefined(data, "an index beyond its array"); }
void __ubsan_handle_shift_out_of_bounds(const void* data, const void*, const void*) {
    fail_undefined(data, "a shift by more than the bits there are");
}
void __ubsan_handle_add_overflow(const void* data, const void*, const void*) { fail_undefined(data, "a signed overflow"); }
void __ubsan_handle_sub_overflow(const void* data, const void*, const void*) { fail_undefined(data, "a signed overflow"); }
void __ubsan_handle_mul_overflow(const void* data, const void*, const void*) { fail_undefined(data, "a signed overflow"); }
void __ubsan_handle_negate_overflow(const void* data, const void*) { fail_undefined(data, "a signed overflow"); }
void __ubsan_handle_divrem_overflow(const void* data, const void*, const void*) {
    fail_undefined(data, "a division by zero or a signed overflow");
}
void __ubsan_handle_float_cast_overflow(const void* data, const void*) {
    fail_undefined(data, "a float beyond the integers it is converted to");
}
void __ubsan_handle_load_invalid_value(const void* data, const void*) {
    fail_undefined(data, "bits that are no value of their type");
}
void __ubsan_handle_invalid_builtin(const void* data) { fail_undefined(data, "an operand that the operation excludes"); }
void __ubsan_handle_nonnull_arg(const void* data) { fail_undefined(data, "a null pointer"); }
void __ubsan_handle_builtin_unreachable(const void* data) { fail_undefined(data, "a place that cannot be reached"); }
void __ubsan_handle_missing_return(const void* data) { fail_undefined(data, "a function without a result"); }
}

#endif
