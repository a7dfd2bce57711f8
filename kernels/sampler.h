#pragma once

// The specified pieces of sampling (docs/sampling.md) that every implementation shares. The selection itself is written
// twice: plainly in the reference, quickly in cpu/.

#include <array>
#include <cstdint>
#include <span>

#include "kernels/kernels.h"

namespace spillway {

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
std::array<std::uint32_t, 4> Philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key);

// Step 2: sampled by arg max.
bool IsGreedy(const SampleRow& row);

// Step 3: the factor c between a logit's distance from the maximum and x.
float DistanceScale(const SampleRow& row);

// Step 3: x of a logit. The maximum itself is at 0, infinite or not; NaN is minus infinity.
float ScaledDistance(float logit, float max_logit, float scale);

// Step 4.
inline constexpr float kLowestWeightedDistance = -31.0F;
std::uint32_t WeightOf(float distance);

// Step 5: the lowest x that min_p keeps. min_p > 0.
float LowestDistance(float min_p);

// Step 7: the sum that the kept prefix must reach.
std::uint64_t PrefixWeight(float top_p, std::uint64_t total);

// Step 8: the first kept id whose running sum exceeds this is the result.
std::uint64_t DrawTarget(const SampleRow& row, std::uint64_t total);

// FNV-1a (64 bit) over the row's bits as 32-bit words.
std::uint64_t HashLogits(std::span<const float> logits);

}  // namespace spillway
