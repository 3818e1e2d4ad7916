#!/usr/bin/env bash
# Packs what a machine with a GPU and no Rust needs to test and measure: the program, the GPU tests and their fixtures.
#
#     cuda/toolkit.sh cuda/kit/pack.sh
#
# The result is target/qlora-kit.tar.xz; run.sh, which is in it, says how it is used. It is built as tests are, with optimization
# and for the libraries of this system: the GPU's machine needs a C library at least as new.
set -euo pipefail
cd "$(dirname "$0")/../.."

limit_mb=50
target=${CARGO_TARGET_DIR:-target}
archive=$target/qlora-kit.tar.xz

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
kit=$scratch/qlora-kit
mkdir -p "$kit/bin" "$kit/tests" "$kit/examples"

export CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-2}
# The program is built for the tests, too: asking for it by itself would build its dependencies with other features again.
tests=(kernels gpu dropout matrix_dropout optimizer neftune streaming host_memory)
QLORA_COMMIT=$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown)
export QLORA_COMMIT
built=$(cargo test --features cuda --no-run "${tests[@]/#/--test=}" --message-format json-render-diagnostics)
for name in qlora "${tests[@]}"; do
  executable=$(grep "\"name\":\"$name\"" <<<"$built" | grep -o '"executable":"[^"]*"' | cut -d '"' -f 4)
  strip -o "$kit/bin/$name" "$executable"
done

cp -r tests/fixtures "$kit/tests/"
cp -r examples/demo "$kit/examples/"
cp cuda/kit/run.sh "$kit/"
# The tests look for their fixtures where they were built.
pwd > "$kit/built_in"
{
  git rev-parse HEAD 2>/dev/null || echo unknown
  if [ -n "$(git status --porcelain 2>/dev/null)" ]; then echo "with changes that are not committed"; fi
} | paste -sd ' ' > "$kit/commit"

# The programs have most of their bytes in common, at distances that the usual dictionary does not reach.
tar -C "$scratch" -cf - qlora-kit | xz --lzma2=preset=6,dict=128MiB > "$archive"
bytes=$(stat -c %s "$archive")
if [ "$bytes" -gt $((limit_mb * 1000 * 1000)) ]; then
  echo "$archive has $bytes bytes, more than $limit_mb MB" >&2
  exit 1
fi
echo "$archive: $bytes bytes, $(cat "$kit/commit")"
