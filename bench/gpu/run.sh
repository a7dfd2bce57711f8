#!/usr/bin/env bash
# Builds, checks and times the cuda device on a machine with a GPU, in under ten minutes: the conformance suites, the goldens,
# the identity suites of the engine, the kernels' and the engine's benchmarks, torch and transformers beside them where python3 has
# them, and compute-sanitizer. Results: a table, the verdict on every bar, and JSON under $OUT or docs/results/<GPU>/.
#
#   bench/gpu/run.sh [quick | sanitize]      quick: no sanitizer, no torch; sanitize: every tool over whole suites, an hour perhaps
#
# A machine without the other packages needs build/gpu-carry/deps.tar.gz (bench/gpu/pack.sh, run where they are).
set -uo pipefail
cd "$(dirname "$0")/../.."
mode=${1:-full}
case $mode in full | quick) budget=590 ;; sanitize) budget=7200 ;; *) sed -n 2,8p "$0"; exit 2 ;; esac
build=${BUILD:-build/gpu}
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
table=()
failed=0

verdict() {  # NAME WORDS
  table+=("$(printf '%-28s %s' "$1" "$2")")
  [ "${2%% *}" = passed ] || failed=1
}
# step NAME LIMIT CMD...: takes at most LIMIT seconds, and no more than what is left of the whole.
step() {
  local name=$1 limit=$2 left=$((budget - SECONDS)) begin=$SECONDS rc=0
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 5 ]; then verdict "$name" "NOT RUN, $budget s are over"; return 1; fi
  echo "== $name, $limit s at most"
  timeout "$limit" "$@" || rc=$?
  case $rc in
    0) verdict "$name" "passed in $((SECONDS - begin)) s" ;;
    124) verdict "$name" "NOT FINISHED in $limit s" ;;
    *) verdict "$name" "FAILED ($rc)" ;;
  esac
  return $rc
}
finish() {
  echo "== summary"
  printf '%s\n' "${table[@]}"
  [ $failed = 0 ] && echo "ALL PASSED in $SECONDS s" || echo "NOT ALL PASSED, $SECONDS s"
  exit $failed
}

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max --format=csv,noheader | head -1) \
  && [ -n "$gpu" ] || { echo "no CUDA device"; exit 2; }
echo "$gpu"
out=${OUT:-docs/results/$(cut -d, -f1 <<<"$gpu" | tr 'A-Z ' 'a-z-')}
mkdir -p "$build" "$out"

carried=()
if [ -f build/gpu-carry/deps.tar.gz ]; then
  packages=$(readlink -f "$build")/carried
  mkdir -p "$packages" && tar -C "$packages" -xzf build/gpu-carry/deps.tar.gz
  carried=(-DSPILLWAY_CARRIED="$packages")
  [ -e ../shared ] || ln -s "$packages/shared" ../shared
fi
# cuBLASLt: the toolkit's, else the one of its version that torch brought.
major=$(nvcc --version | sed -n 's/.*release \([0-9]*\)\..*/\1/p')
if ! ls "${CUDA_HOME:-/usr/local/cuda}"/lib64/libcublasLt.so."$major"* >/dev/null 2>&1; then
  found=$(python3 -c 'import glob, sys, sysconfig; print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/libcublasLt.so." + sys.argv[1], recursive=True)[:1])' "$major" 2>/dev/null)
  [ -n "$found" ] && export SPILLWAY_CUBLASLT=$found
fi
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
tests=(conformance device prefill golden identity tiers beyond float16 parity)

step configure 60 cmake -S bench/gpu -B "$build" "${generator[@]}" "${carried[@]}" -DSPILLWAY_CUDA_ARCHITECTURES="$arch-real" || finish
step build 400 cmake --build "$build" -j"$(nproc)" --target gpu_bench engine_bench $(printf 'cuda_%s_test ' "${tests[@]}") || finish
step "no spills" 10 cmake -DREPORTS="$build/kernels/cuda" -P tests/kernels/cuda_spills.cmake

# A suite of which every case was skipped has shown nothing.
suite='"$@" | tee "$0"; rc=${PIPESTATUS[0]}; ! grep -q "PASSED  \] 0 tests" "$0" && exit "$rc"'
# What the suites of the engine leave to the cpu device, as in tests/kernels/cuda.cmake, and a hundred thousand tokens.
for name in "${tests[@]}"; do
  step "$name" 90 bash -c "$suite" "$build/suite.log" "$build/cuda_${name}_test" --gtest_brief=1 \
    --gtest_filter='-*KvBytes*:PlantedFault*:BeyondLength*:*AllMachines*'
done

# One tool over the suites of the kernels, less the sampler's 20,000 rows.
sanitize() {  # TOOL SUITE
  local errors=()
  [ "$1" = memcheck ] && errors=(--report-api-errors no)  # some tests provoke them
  step "$1, $2" 1800 compute-sanitizer --error-exitcode 9 --tool "$1" "${errors[@]}" "$build/cuda_$2_test" --gtest_brief=1 \
    --gtest_filter='-*Frequencies*:*LargeVocabulary*:*AllMachines*'
}
sanitizer_works() {
  if ! compute-sanitizer --error-exitcode 9 "$build/cuda_device_test" --gtest_brief=1 --gtest_filter='*MemoryIsBounded*' >"$build/sanitizer.log" 2>&1; then
    verdict "compute-sanitizer" "NOT RUN, it does not work here: $(tail -1 "$build/sanitizer.log")"
    return 1
  fi
}
if [ "$mode" = sanitize ]; then
  sanitizer_works || finish
  for tool in memcheck racecheck synccheck initcheck; do for suite in conformance device prefill; do sanitize "$tool" "$suite"; done; done
  finish
fi

model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
where=(--commit "$commit" --machine "$gpu")
step "kernels" 150 "$build/gpu_bench" --json "$out/gpu_bench.json" "${where[@]}"
step "engine" 150 "$build/engine_bench" --folder "$model" --json "$out/engine_bench.json" "${where[@]}"
if [ "$mode" = full ]; then
  if python3 -c 'import torch' 2>/dev/null; then
    step "torch, transformers" 120 python3 bench/gpu/peers.py "$out/gpu_peers.json" "$model" "$out/gpu_bench.json" "$out/engine_bench.json"
  else
    echo "no torch here: nothing beside us"
  fi
  step "bars" 10 python3 bench/gpu/verdict.py "$out"
  if sanitizer_works; then
    for suite in conformance device prefill; do sanitize memcheck "$suite"; done
    for suite in prefill device; do sanitize racecheck "$suite"; done  # of conformance it takes more than the budget
  fi
fi
finish
