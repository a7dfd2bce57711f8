#pragma once

// Sampling without sorting the vocabulary: vector passes over the logits count, weigh and collect those at least as
// large as a threshold, and only the collected ones are selected from. Equal to docs/sampling.md, token for token.

#include <cstdint>

#include "kernels/cpu/stream.h"
#include "kernels/cpu/targets.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

// Logits summed up per entry of a table of block sums.
inline constexpr std::int64_t kWeightBlock = 1024;

// Passes over one row. NaN is never at least, equal to, or the maximum of anything.
struct SampleBodies {
  // Minus infinity if there is nothing else.
  float (*max)(const float* logits, std::int64_t size);
  // The first id, or `size`.
  std::int64_t (*first_equal)(const float* logits, std::int64_t size, float value);
  std::int64_t (*count_at_least)(const float* logits, std::int64_t size, float threshold);
  std::int64_t (*count_above)(const float* logits, std::int64_t size, float threshold);
  std::uint64_t (*weight_at_least)(const float* logits, const std::uint32_t* weights, std::int64_t size,
                                   float threshold);
  // Ids in ascending order; returns their number.
  std::int64_t (*collect_at_least)(const float* logits, std::int64_t size, float threshold, std::int32_t* ids);
  // weights[v] by steps 3 to 5, block_sums[v / kWeightBlock] their sums. max is finite or plus infinity.
  void (*weigh)(const float* logits, std::int64_t size, float max, float scale, float lowest_distance,
                std::uint32_t* weights, std::uint64_t* block_sums);
  // Sum of exp(logit - max).
  double (*sum_exp)(const float* logits, std::int64_t size, float max);
};

const SampleBodies& SampleBodiesOf(Target target);

void RunSample(const SampleBodies& bodies, const WorkPlace& place, const SampleArgs& args);

}  // namespace spillway::cpu
