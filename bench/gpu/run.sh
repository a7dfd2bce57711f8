#!/usr/bin/env bash
# Builds, checks and times the cuda device on a machine with a GPU, in under ten minutes: the conformance suites, the goldens,
# the identity suites of the engine, compute-sanitizer on a part of them, the kernels' and the engine's benchmarks, and torch and
# transformers beside them where python3 has them. Results: a table, and JSON under $OUT or docs/results/.
#
#   bench/gpu/run.sh [quick]      quick: no sanitizer, no torch
#
# A machine without the other packages needs build/gpu-carry/deps.tar.gz (bench/gpu/pack.sh, run where they are).
set -uo pipefail
cd "$(dirname "$0")/../.."
mode=${1:-full}
build=${BUILD:-build/gpu}
out=${OUT:-docs/results}
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
mkdir -p "$build" "$out"
failed=0
step() {
  echo "== $1"
  shift
  "$@" || { echo "FAILED ($?): $*"; failed=1; }
}

nvidia-smi --query-gpu=name,driver_version,memory.total,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader \
  || { echo "no CUDA device"; exit 2; }

carried=()
if [ -f build/gpu-carry/deps.tar.gz ]; then
  mkdir -p /tmp/spillway-carried && tar -C /tmp/spillway-carried -xzf build/gpu-carry/deps.tar.gz
  carried=(-DSPILLWAY_CARRIED=/tmp/spillway-carried)
  [ -d ../shared ] || ln -sfn /tmp/spillway-carried/shared ../shared
fi
# cuBLASLt: the toolkit's, else the one that torch brought.
if ! ls "${CUDA_HOME:-/usr/local/cuda}"/lib64/libcublasLt.so.* >/dev/null 2>&1; then
  found=$(python3 -c 'import glob, sysconfig; print(*glob.glob(sysconfig.get_path("purelib") + "/nvidia/**/libcublasLt.so.*", recursive=True)[:1])' 2>/dev/null)
  [ -n "$found" ] && export SPILLWAY_CUBLASLT=$found
fi
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
[ "$arch" = 90 ] && arch=90a
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)

step configure cmake -S bench/gpu -B "$build" "${generator[@]}" "${carried[@]}" -DSPILLWAY_CUDA_ARCHITECTURES="$arch-real" || exit 1
step build cmake --build "$build" -j"$(nproc)" || exit 1
[ $failed = 0 ] || exit 1

step "conformance" "$build/cuda_conformance_test" --gtest_brief=1
step "device" "$build/cuda_device_test" --gtest_brief=1
step "goldens" "$build/cuda_golden_test" --gtest_brief=1
step "identity" timeout 120 "$build/cuda_identity_test" --gtest_brief=1 --gtest_filter='-KvBytes*:*/KvBytes*:PlantedFault*'
step "tiers" timeout 60 "$build/cuda_tiers_test" --gtest_brief=1 --gtest_filter='-PlantedFault*'
step "no spills" ctest --test-dir "$build" -R cuda.no_spills --output-on-failure
if [ "$mode" != quick ] && command -v compute-sanitizer >/dev/null; then
  filter='*CudaGather*:*CudaAttention*:*DegenerateRows*:*RmsNorm*:*RopeAppend*'
  step "memcheck" compute-sanitizer --error-exitcode 9 --tool memcheck "$build/cuda_device_test" --gtest_brief=1 --gtest_filter="$filter"
  step "racecheck" compute-sanitizer --error-exitcode 9 --tool racecheck "$build/cuda_device_test" --gtest_brief=1 --gtest_filter='*CudaAttention*'
  step "racecheck, sampler" timeout 120 compute-sanitizer --error-exitcode 9 --tool racecheck "$build/cuda_conformance_test" --gtest_brief=1 --gtest_filter='*DegenerateRows*'
fi
step "kernels" timeout 150 "$build/gpu_bench" --json "$out/gpu_bench.json" --commit "$commit"
model=$(mktemp -d)
trap 'rm -rf "$model"' EXIT
step "engine" timeout 150 "$build/engine_bench" --folder "$model" --json "$out/engine_bench.json" --commit "$commit"
if [ "$mode" != quick ] && python3 -c 'import torch' 2>/dev/null; then
  step "torch" timeout 150 python3 bench/gpu/peers.py "$out/gpu_peers.json" "$model" "$out/gpu_bench.json"
fi
[ $failed = 0 ] && echo "ALL PASSED" || echo "SOMETHING FAILED"
exit $failed
