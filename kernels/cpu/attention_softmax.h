#pragma once

// From the scores of a block of query rows against a segment's keys to their weights, 2^(scale * score - max) rounded
// to bf16. Both lie in groups of 32 keys, [group][row][32 keys]: a group's weights are tiles as a product reads them,
// and a group's scores may give way to another block's as soon as it is weighed.

#include "kernels/cpu/attention_block.h"
#include "kernels/cpu/bf16_vectors.h"

#if defined(__x86_64__)

#include <cstdint>
#include <limits>

namespace spillway::cpu {

// Rows [begin, end) of the block, 16 at most, `begin` a multiple of 16.
SPILLWAY_AVX512_BF16 inline void FindMaxes(const float* scores, float scale, std::int64_t begin, std::int64_t end,
                                           RowBlock& block) {
  alignas(64) float maxes[16][16];
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (std::int64_t i = begin; i < end; ++i) {
    __m512 low = nothing;
    __m512 high = nothing;
    const float* at = scores + i * kGroupKeys;
    for (std::int64_t group = 0; group < block.num_groups; ++group, at += kGroupScores) {
      if (block.IsWhole(group)) {
        low = _mm512_max_ps(low, _mm512_loadu_ps(at));
        high = _mm512_max_ps(high, _mm512_loadu_ps(at + 16));
      } else {
        low = _mm512_mask_max_ps(low, block.Lanes(i, group * kGroupKeys), low, _mm512_loadu_ps(at));
        high = _mm512_mask_max_ps(high, block.Lanes(i, group * kGroupKeys + 16), high, _mm512_loadu_ps(at + 16));
      }
    }
    _mm512_store_ps(maxes[i - begin], _mm512_max_ps(low, high));
  }
  if (end - begin <= 4) {
    for (std::int64_t i = begin; i < end; ++i) {
      block.maxes[i] = _mm512_reduce_max_ps(_mm512_load_ps(maxes[i - begin])) * scale;
    }
    return;
  }
  for (std::int64_t i = end - begin; i < 16; ++i) _mm512_store_ps(maxes[i], nothing);
  __m512 max = nothing;  // lanes are rows
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Quarter q = TransposeQuarter(reinterpret_cast<const std::uint16_t*>(maxes), 32, quarter);
#pragma GCC unroll 4
    for (const __m512i& column : q.columns) max = _mm512_max_ps(max, _mm512_castsi512_ps(column));
  }
  _mm512_store_ps(block.maxes + begin, _mm512_mul_ps(max, _mm512_set1_ps(scale)));
}

template <bool kIsWhole>
SPILLWAY_AVX512_BF16 inline void WeighRows(const float* scores, float scale, std::int64_t group, const RowBlock& block,
                                           std::uint16_t* weights) {
  const __m512 factor = _mm512_set1_ps(scale);
  const std::int64_t num_rows = block.size();
  for (std::int64_t i = 0; i < num_rows; ++i, scores += kGroupKeys, weights += kGroupKeys) {
    const __m512 max = _mm512_set1_ps(block.maxes[i]);
    __m512 low = Exp2OfWeight(_mm512_fmsub_ps(_mm512_loadu_ps(scores), factor, max));
    __m512 high = Exp2OfWeight(_mm512_fmsub_ps(_mm512_loadu_ps(scores + 16), factor, max));
    if constexpr (!kIsWhole) {
      low = _mm512_maskz_mov_ps(block.Lanes(i, group * kGroupKeys), low);
      high = _mm512_maskz_mov_ps(block.Lanes(i, group * kGroupKeys + 16), high);
    }
    _mm512_storeu_si512(weights, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
}

// `scores` and `weights` are those of the whole block. Weights of keys that a row does not see are 0.
inline void WeighGroup(const float* scores, float scale, std::int64_t group, const RowBlock& block,
                       std::uint16_t* weights) {
  scores += group * kGroupScores;
  weights += group * kGroupWeights;
  if (block.IsWhole(group)) {
    WeighRows<true>(scores, scale, group, block, weights);
  } else {
    WeighRows<false>(scores, scale, group, block, weights);
  }
}

}  // namespace spillway::cpu

#endif
