#pragma once

// The partial states of attention over bf16 (attention_bf16.cc): their arithmetic, and that of 16 rows at once.

#include "kernels/cpu/attention_softmax.h"
#include "kernels/cpu/attention_tile.h"

#if defined(__x86_64__)

#include <cstdint>
#include <limits>
#include <type_traits>

namespace spillway::cpu {

template <typename Out>
struct Bf16StateArithmetic {
  std::int64_t dim;
  Out* result;  // of the row being normalized

  // Exp2p.
  SPILLWAY_AVX512_BF16 float Exp2(float x) const { return _mm512_cvtss_f32(cpu::Exp2(_mm512_set1_ps(x))); }
  SPILLWAY_AVX512_BF16 void ScaleAdd(float* running, float a, const float* segment, float b) const {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(running + d), _mm512_set1_ps(a));
      _mm512_storeu_ps(running + d, _mm512_fmadd_ps(_mm512_loadu_ps(segment + d), _mm512_set1_ps(b), scaled));
    }
  }
  SPILLWAY_AVX512_BF16 void Scale(const float* out, float factor) const {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(out + d), _mm512_set1_ps(factor));
      if constexpr (std::is_same_v<Out, float>) {
        _mm512_mask_storeu_ps(result + d, FirstLanes(dim - d), scaled);
      } else {
        const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled));
        _mm256_mask_storeu_epi16(result + d, FirstLanes(dim - d), rounded);
      }
    }
  }
};

using Bf16States = RowStates<Bf16StateArithmetic>;

// A segment's states of the rows of a block: outs[i][dim], behind `padded_dim` floats the sum.
struct SegmentOuts {
  float* outs = nullptr;  // of the block's first row
  std::int64_t dim = 0;
  std::int64_t padded_dim = 0;
  std::int64_t stride = 0;

  float* Of(std::int64_t i) const { return outs + i * stride; }
  float SumOf(std::int64_t i) const { return Of(i)[padded_dim]; }
};

// MergeAttentionState of rows [begin, end) of the block, 16 at most: their factors are computed side by side.
SPILLWAY_AVX512_BF16 inline void MergeBlockRows(const SegmentOuts& segment, const RowBlock& block, std::int64_t begin,
                                                std::int64_t end, Bf16States& states) {
  const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 one = _mm512_set1_ps(1);
  alignas(64) float maxes[16] = {};
  alignas(64) float sums[16] = {};
  alignas(64) float segment_maxes[16] = {};
  alignas(64) float segment_sums[16] = {};
  const std::int64_t num_rows = end - begin;
  for (std::int64_t i = 0; i < num_rows; ++i) {
    const AttentionState& running = states.Of(block.row_begin + begin + i);
    maxes[i] = running.max;
    sums[i] = running.sum;
    segment_maxes[i] = block.maxes[begin + i];
    segment_sums[i] = segment.SumOf(begin + i);
  }
  const __m512 running_max = _mm512_load_ps(maxes);
  const __m512 segment_max = _mm512_load_ps(segment_maxes);
  const __mmask16 is_higher = _mm512_cmp_ps_mask(segment_max, running_max, _CMP_GT_OQ);
  const __mmask16 has_keys = _mm512_mask_cmp_ps_mask(FirstLanes(num_rows), segment_max, nothing, _CMP_NEQ_UQ);
  const __m512 max = _mm512_mask_mov_ps(running_max, is_higher, segment_max);
  alignas(64) float factors[16];
  alignas(64) float segment_factors[16];
  const __m512 a = _mm512_mask_mov_ps(one, is_higher, Exp2(_mm512_sub_ps(running_max, max)));
  const __m512 b = _mm512_mask_mov_ps(Exp2(_mm512_sub_ps(segment_max, max)), is_higher, one);
  _mm512_store_ps(factors, a);
  _mm512_store_ps(segment_factors, b);
  _mm512_store_ps(maxes, max);
  _mm512_store_ps(
      sums, _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(sums), a), _mm512_mul_ps(_mm512_load_ps(segment_sums), b)));
  const Bf16StateArithmetic<float> arithmetic{segment.dim, nullptr};
  for (std::int64_t i = 0; i < num_rows; ++i) {
    if ((has_keys >> i & 1U) == 0) continue;
    AttentionState& running = states.Of(block.row_begin + begin + i);
    running.max = maxes[i];
    running.sum = sums[i];
    arithmetic.ScaleAdd(running.out, factors[i], segment.Of(begin + i), segment_factors[i]);
  }
}

}  // namespace spillway::cpu

#endif
