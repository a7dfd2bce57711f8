#include "kernels/sampler.h"

#include <bit>
#include <cmath>
#include <limits>

#include "kernels/exp2p.h"

namespace spillway {
namespace {

__extension__ using Uint128 = unsigned __int128;

}  // namespace

std::array<std::uint32_t, 4> Philox4x32(std::array<std::uint32_t, 4> counter, std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = std::uint64_t{0xD2511F53U} * counter[0];
    const std::uint64_t second = std::uint64_t{0xCD9E8D57U} * counter[2];
    counter = {static_cast<std::uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(second),
               static_cast<std::uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(first)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

bool IsGreedy(const SampleRow& row) { return !(row.temperature >= 1e-5F); }

float DistanceScale(const SampleRow& row) { return kLog2E / row.temperature; }

float ScaledDistance(float logit, float max_logit, float scale) {
  if (logit == max_logit) return 0.0F;
  if (std::isnan(logit)) {
    return max_logit == -std::numeric_limits<float>::infinity() ? 0.0F : -std::numeric_limits<float>::infinity();
  }
  return (logit - max_logit) * scale;
}

std::uint32_t WeightOf(float distance) {
  if (!(distance >= kLowestWeightedDistance)) return 0;
  return static_cast<std::uint32_t>(Exp2p(distance) * 0x1p31F);
}

float LowestDistance(float min_p) { return static_cast<float>(std::log2(static_cast<double>(min_p))); }

std::uint64_t PrefixWeight(float top_p, std::uint64_t total) {
  return static_cast<std::uint64_t>(std::ceil(static_cast<double>(top_p) * static_cast<double>(total)));
}

std::uint64_t DrawTarget(const SampleRow& row, std::uint64_t total) {
  const auto random = Philox4x32({row.output_index, row.choice, 0, 0},
                                 {static_cast<std::uint32_t>(row.seed), static_cast<std::uint32_t>(row.seed >> 32)});
  const std::uint64_t uniform = random[0] | std::uint64_t{random[1]} << 32;
  return static_cast<std::uint64_t>((Uint128{uniform} * total) >> 64);
}

std::uint64_t HashLogits(std::span<const float> logits) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  for (const float logit : logits) hash = (hash ^ std::bit_cast<std::uint32_t>(logit)) * 0x100000001b3U;
  return hash;
}

}  // namespace spillway
