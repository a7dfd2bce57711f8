#pragma once

// The exact pieces of docs/sampling.md, as kernels/sampler.h has them for the host. Host and device alike: tests hold
// them against it.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {

// Orders as logits do: larger logit, larger key. Equal logits (0 and -0) have equal keys; NaN is minus infinity.
SPILLWAY_HOST_DEVICE std::uint32_t KeyOf(float logit) {
  if (logit != logit) logit = -kInfinity;
  const auto bits = std::bit_cast<std::uint32_t>(logit + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}
SPILLWAY_HOST_DEVICE float LogitOf(std::uint32_t key) {
  return std::bit_cast<float>((key & 0x80000000U) != 0 ? key & 0x7fffffffU : ~key);
}
// Below every key.
inline constexpr std::uint32_t kNoKey = 0;

SPILLWAY_HOST_DEVICE bool IsGreedyRow(const SampleRowParams& row) { return !(row.temperature >= 1e-5F); }

// Step 3. Keys stand for logits with NaN already replaced.
SPILLWAY_HOST_DEVICE float DistanceOf(std::uint32_t key, std::uint32_t max_key, float scale) {
  return key == max_key ? 0.0F : (LogitOf(key) - LogitOf(max_key)) * scale;
}

// Steps 4 and 5: 0 for what min_p or the fixed-point range leaves out. `lowest` is LowestKept.
SPILLWAY_HOST_DEVICE std::uint32_t WeightAt(float distance, float lowest) {
  if (!(distance >= lowest)) return 0;
  return static_cast<std::uint32_t>(Exp2Polynomial(distance) * 0x1p31F);
}
// A weight of 0 is never drawn and never counts, so min_p below the range of the weights changes nothing.
SPILLWAY_HOST_DEVICE float LowestKept(float min_p) {
  constexpr float kLowestWeighted = -31.0F;
  if (!(min_p > 0)) return kLowestWeighted;
  return MaxOf(kLowestWeighted, static_cast<float>(log2(static_cast<double>(min_p))));
}

// Step 7: what the kept prefix must weigh; at least one id.
SPILLWAY_HOST_DEVICE std::uint64_t WantedWeight(float top_p, std::uint64_t total) {
  const auto wanted = static_cast<std::uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
  return MaxOf<std::uint64_t>(wanted, 1);
}

SPILLWAY_HOST_DEVICE std::uint64_t HighProduct(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  __extension__ using Wide = unsigned __int128;
  return static_cast<std::uint64_t>((Wide{a} * b) >> 64);
#endif
}

// Step 8. Philox4x32-10 of Salmon et al. (2011) with key = seed, counter = (output_index, choice, 0, 0); its first two
// words.
SPILLWAY_HOST_DEVICE std::uint64_t TargetOf(const SampleRowParams& row, std::uint64_t total) {
  std::uint32_t counter[4] = {row.output_index, row.choice, 0, 0};
  auto key0 = static_cast<std::uint32_t>(row.seed);
  auto key1 = static_cast<std::uint32_t>(row.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t second = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter[0] = static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key0;
    counter[1] = static_cast<std::uint32_t>(second);
    counter[2] = static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key1;
    counter[3] = static_cast<std::uint32_t>(first);
    key0 += 0x9E3779B9U;
    key1 += 0xBB67AE85U;
  }
  return HighProduct(counter[0] | std::uint64_t{counter[1]} << 32, total);
}

}  // namespace spillway::cuda
