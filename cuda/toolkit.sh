#!/usr/bin/env bash
# Makes a CUDA 13.0 toolkit out of NVIDIA's wheels on PyPI, for a machine that has none, and runs a command with it:
#
#     cuda/toolkit.sh cargo build --release --features cuda
#
# Without a command it prints the toolkit's directory. The toolkit lies in target/cuda-toolkit, or in QLORA_CUDA_TOOLKIT, and is
# made once: about a minute and 1.5 GB. It takes python3 with pip, and a C compiler for the stub of the driver's library.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
directory=${QLORA_CUDA_TOOLKIT:-$repository/target/cuda-toolkit}
root=$directory/nvidia/cu13

# 13.0, so that drivers from 580 on load what it makes.
wheels=(
  'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*'
  'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-nvrtc==13.0.*' 'nvidia-cublas==13.0.*' 'nvidia-curand==10.4.0.*'
  'nvidia-cuda-cuobjdump==13.2.*' 'nvidia-cuda-nvdisasm==13.2.*'
)

# Links such as libcublas.so to libcublas.so.13, which linkers look for, and lib64, where nvcc looks.
link_libraries() {
  local library
  for library in "$root"/lib/lib*.so.*; do
    ln -sf "$(basename "$library")" "${library%%.so.*}.so"
  done
  ln -sfn lib "$root/lib64"
}

# The driver's library comes with the driver alone. To link, a library with the same names is enough.
make_driver_stub() {
  local stubs=$root/lib/stubs
  mkdir -p "$stubs"
  grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$root/include/cuda.h" | sort -u |
    sed 's/.*/int &(void) { return 34; }/' > "$stubs/libcuda.c" # 34: CUDA_ERROR_STUB_LIBRARY
  cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$stubs/libcuda.so" "$stubs/libcuda.c"
}

if [ ! -e "$directory/complete" ]; then
  echo "making a CUDA toolkit in $directory" >&2
  mkdir -p "$directory"
  python3 -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$directory" "${wheels[@]}" >&2
  link_libraries
  make_driver_stub
  touch "$directory/complete"
fi

if [ $# -eq 0 ]; then
  echo "$root"
  exit
fi
export CUDA_PATH=$root CUDA_HOME=$root PATH=$root/bin:$PATH
export LIBRARY_PATH=$root/lib:$root/lib/stubs${LIBRARY_PATH:+:$LIBRARY_PATH}
exec "$@"
