#!/usr/bin/env bash
# Tests and measures qlora on this machine's GPU. It is in the archive that pack.sh makes and needs no Rust:
#
#     tar -xf qlora-kit.tar.xz && qlora-kit/run.sh [-o DIRECTORY] [-t SECONDS] [STEP...]
#
# It takes a driver from 580 on and the libraries of CUDA 13, out of a toolkit or of the wheels that PyTorch brings along. A step
# that fails does not stop the others, nor does one that -t ends because it takes longer. results.json in the directory (`results`
# if none is given) says what came out, beside what each step printed. The exit status is 1 if a step failed.
set -euo pipefail

kit=$(cd "$(dirname "$0")" && pwd)
all_steps=(kernels gpu dropout matrix_dropout optimizer neftune streaming host_memory bench-kernels speed-llama-110m speed-llama3-8b demo)
# Asked for by name: the models of the paper and long contexts, within limits of memory, and speeds. The largest writes 35 GB to TMPDIR.
large_steps=(paper-33b paper-65b paper-65b-24 paper-65b-16 context-8b-24 context-8b-48 context-8b-80 context-70b-48
  speed-llama3-8b-recompute speed-llama3-8b-dropout speed-llama3-8b-4x2048 speed-llama3-8b-512 speed-llama-33b speed-llama-65b
  speed-llama-65b-24)
libraries=(libcuda.so.1 libcublas.so.13 libcublasLt.so.13 libcurand.so.10 libnvrtc.so.13)

usage() {
  echo "usage: run.sh [-o DIRECTORY] [-t SECONDS] [STEP...]; the steps are ${all_steps[*]}, and by name ${large_steps[*]}" >&2
  exit 2
}

# The command of a step.
command_of() {
  case $1 in
    kernels | gpu | dropout | matrix_dropout | optimizer | neftune | streaming | host_memory) command=("$kit/bin/$1" --ignored) ;;
    bench-kernels) command=("$kit/bin/qlora" bench kernels --json) ;;
    paper-33b) memory_of llama-33b 64 512 21GB 3 ;;
    paper-65b) memory_of llama-65b 64 512 41GB 3 ;;
    paper-65b-24) memory_of llama-65b 64 512 24GB 3 ;;
    paper-65b-16) memory_of llama-65b 64 512 16GB 3 ;;
    context-8b-24) memory_of llama3-8b 32 78475 24GB 1 ;;
    context-8b-48) memory_of llama3-8b 32 180000 48GB 1 ;;
    context-8b-80) memory_of llama3-8b 32 342733 80GB 1 ;;
    context-70b-48) memory_of llama3-70b 32 12106 48GB 1 ;;
    speed-llama3-8b) speed_of llama3-8b 8192 ;;
    speed-llama3-8b-recompute) speed_of llama3-8b 8192 --gradient_checkpointing true ;;
    speed-llama3-8b-dropout) speed_of llama3-8b 8192 --lora_dropout 0.05 ;;
    speed-llama3-8b-4x2048) speed_of llama3-8b 2048 --per_device_train_batch_size 4 ;;
    speed-llama3-8b-512) speed_of llama3-8b 512 ;;
    speed-llama-110m) speed_of llama-110m 256 ;;
    # So many micro-batches pass through a block that its weights, which come over the bus, are there in time.
    speed-llama-65b-24) speed_of llama-65b 512 --vram_limit 24GB --gradient_accumulation_steps 16 --optim paged_adamw_32bit ;;
    speed-*) speed_of "${1#speed-}" 512 ;;
    demo) command=("$kit/bin/qlora" demo --device cuda --out "$results/demo" --json) ;;
    *) usage ;;
  esac
}

# The memory of a step: shape, rank, tokens, limit and steps. The models are written once for all steps.
memory_of() {
  command=("$kit/bin/qlora" bench memory --device cuda --shape "$1" --lora_r "$2" --max_seq_len "$3" --vram_limit "$4"
    --optim paged_adamw_32bit --max_steps "$5" --synthetic_dir "$models/$1" --json)
}

# The speed of a model: shape, tokens, and what else is asked for.
speed_of() {
  command=("$kit/bin/qlora" bench speed --device cuda --shape "$1" --max_seq_len "$2" --synthetic_dir "$models/$1" --json "${@:3}")
}

# Folders in which CUDA's libraries often are, beside those that the system searches.
library_folders() {
  local python
  for python in python3 python; do
    if command -v "$python" >/dev/null; then
      "$python" -c 'import glob, nvidia; [print(f) for p in nvidia.__path__ for f in glob.glob(p + "/*/lib")]' 2>/dev/null || true
    fi
  done
  printf '%s\n' "${CUDA_PATH:-}/lib64" "${CUDA_HOME:-}/lib64" /usr/local/cuda/lib64 /usr/local/cuda-13*/lib64 \
    /usr/local/nvidia/lib64 /usr/lib/wsl/lib
}

# Whether a program would find the library as things are.
is_found() {
  local folder folders
  # A search that ends at the first hit would break the pipe.
  if { PATH=$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null || true; } | grep -F "$1 " >/dev/null; then return 0; fi
  IFS=: read -ra folders <<<"${LD_LIBRARY_PATH:-}"
  for folder in "${folders[@]}"; do
    if [ -e "$folder/$1" ]; then return 0; fi
  done
  return 1
}

# Adds to LD_LIBRARY_PATH what the libraries need.
find_libraries() {
  local library folder folders
  mapfile -t folders < <(library_folders)
  for library in "${libraries[@]}"; do
    is_found "$library" && continue
    for folder in "${folders[@]}"; do
      if [ -e "$folder/$library" ]; then
        export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder
        break
      fi
    done
    is_found "$library" || echo "$library is not on this machine" >&2
  done
}

# The tests read their fixtures below the folder that they were built in: that becomes a link to this one.
link_fixtures() {
  built_in=$(cat "$kit/built_in")
  if [ -e "$built_in/tests/fixtures" ]; then return 0; fi
  if mkdir -p "$(dirname "$built_in")" && ln -s "$kit" "$built_in"; then
    linked=$built_in
  else
    echo "the tests that read fixtures will fail: $built_in cannot be made a link to $kit" >&2
  fi
}

# Standard input as a JSON string.
json_string() {
  tr -d '\000-\010\013-\037' | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/\\t/g' |
    awk '{ text = text (NR > 1 ? "\\n" : "") $0 } END { printf "\"%s\"", text }'
}

field_of_gpu() {
  { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null || echo unknown; } | head -n 1
}

# Runs a step and appends its object to `objects` and its line to `table`.
run_step() {
  local step=$1 command started status=0 seconds output=null says log
  command_of "$step"
  echo "==> $step" >&2
  started=$(date +%s%N)
  timeout --kill-after=5 "$limit" "${command[@]}" >"$results/$step.out" 2>"$results/$step.err" </dev/null || status=$?
  seconds=$(awk "BEGIN { printf \"%.2f\", ($(date +%s%N) - $started) / 1e9 }")
  # Without a GPU's tests in it a test program would pass.
  if grep -qx 'running 0 tests' "$results/$step.out"; then status=1; fi
  if [ "$status" -eq 0 ] && [ "$(head -c 1 "$results/$step.out")" = '{' ]; then
    output=$(cat "$results/$step.out")
    says=$(grep -oE '"(tokens_per_second|peak_memory_bytes|planned_bytes|measured_bytes|exact_match_after)": ?[^,}]*' "$results/$step.out" |
      tr -d '" ' | tr ':\n' '= ' || true)
  else
    says=$(grep -h '^test result' "$results/$step.out" || tail -n 1 "$results/$step.err")
  fi
  log=$(tail -q -n 60 "$results/$step.err" <(if [ "$output" = null ]; then cat "$results/$step.out"; fi) | json_string)
  objects+=("$(printf '{"step":"%s","command":%s,"status":%s,"seconds":%s,"output":%s,"log":%s}' "$step" \
    "$(printf '%s' "${command[*]#"$kit/"}" | json_string)" "$status" "$seconds" "$output" "$log")")
  table+=("$(printf '%-26s %-6s %9s s  %s' "$step" "$(if [ "$status" -eq 0 ]; then echo ok; else echo FAILED; fi)" "$seconds" "${says:0:150}")")
  if [ "$status" -ne 0 ]; then failed=1; fi
}

models=$(mktemp -d)
linked=
trap 'rm -rf "$models" ${linked:+"$linked"}' EXIT

results=results
limit=0 # none
while getopts o:t: option; do
  case $option in
    o) results=$OPTARG ;;
    t) limit=$OPTARG ;;
    *) usage ;;
  esac
done
shift $((OPTIND - 1))
steps=("$@")
if [ $# -eq 0 ]; then steps=("${all_steps[@]}"); fi
for step in "${steps[@]}"; do command_of "$step"; done
mkdir -p "$results"
results=$(cd "$results" && pwd)

find_libraries
link_fixtures
failed=0 objects=() table=()
gpu=$(field_of_gpu name) driver=$(field_of_gpu driver_version) commit=$(cat "$kit/commit")
for step in "${steps[@]}"; do
  run_step "$step"
done

{
  printf '{\n"gpu":%s,\n"driver":%s,\n"commit":%s,\n"date":"%s",\n"steps":[\n' "$(json_string <<<"$gpu")" \
    "$(json_string <<<"$driver")" "$(json_string <<<"$commit")" "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  for i in "${!objects[@]}"; do
    [ "$i" -eq 0 ] || printf ',\n'
    printf '%s' "${objects[$i]}"
  done
  printf '\n]\n}\n'
} > "$results/results.json"

printf '\n%s, driver %s, commit %s\n' "$gpu" "$driver" "$commit"
printf '%s\n' "${table[@]}"
echo "written: $results/results.json"
exit "$failed"
