#!/usr/bin/env bash
# Runs the kernel tests with every kernel compiled under AddressSanitizer and UndefinedBehaviorSanitizer.
#
# Only the C++ side is compiled again; the kernels' objects are kept apart from the usual ones, so that both stay cached.
# Arguments go to the test binary, e.g. `cuda/emulator/sanitize.sh rms_norm`.
set -euo pipefail
cd "$(dirname "$0")/../.."

export QLORA_EMULATOR_SANITIZE=address,undefined
# A kernel thread has a stack of its own, and an abandoned one never returns from its functions.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

cargo test --test kernels --no-run
# The test is a Rust program: the sanitizer has to be loaded before it. Planted faults would end the process.
runtime=$("${CXX:-c++}" -print-file-name=libasan.so)
binary=$(cargo test --test kernels --no-run --message-format=json 2>/dev/null |
  sed -n 's/.*"executable":"\([^"]*\/kernels-[^"]*\)".*/\1/p')
LD_PRELOAD=$runtime "$binary" --skip planted_faults "$@"
