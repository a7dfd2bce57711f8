#pragma once

// What attention on tensor cores does to 16 query rows and a tile of 64 keys, for prefill and decode alike.
//
// Scores are q K^T by mma.sync m16n8k16, the softmax is the online one (Milakov and Gimelshein 2018; Dao et al.,
// FlashAttention, 2022), the weights are rounded to the type of V for the product with it. At the end of each segment
// of 256 positions the state joins the running one (kernels/attention_state.h).
//
// A row's arithmetic never depends on its neighbours, on which warp computes which of its scores or columns, or on
// where the tile begins: a masked key contributes exact zeros, a tile that is all masked changes nothing. So prefill
// and decode give the same bits.

#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {

inline constexpr int kKeysPerTile = 64;
inline constexpr int kStripsPerTile = kKeysPerTile / kBlockTokens;
inline constexpr int kTilesPerSegment = kSegmentPositions / kKeysPerTile;
inline constexpr int kScoreTiles = kKeysPerTile / 8;

// kColumns columns of the state of 16 rows, in a warp. Lane l holds of rows g = l / 4 and g + 8 the columns
// 2 * (l % 4) + {0, 1} of every 8.
template <int kColumns>
struct WarpState {
  float out[kColumns / 8][4];
  float max[2];  // of raw scores; times scale it is in units of log2
  float sum[2];  // of this lane's keys

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0;
    }
    max[0] = max[1] = -kInfinity;
    sum[0] = sum[1] = 0;
  }
};

// Sum or maximum over the four lanes that share a row.
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Bias to kNumTiles * 8 keys' scores, which are not scaled yet; hence it comes in units of 1 / `unit`.
template <int kNumTiles>
__device__ __forceinline__ void AddBias(const float* bias, float unit, float (&scores)[kNumTiles][4]) {
  const auto column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int n = 0; n < kNumTiles; ++n) {
    const float2 pair = *reinterpret_cast<const float2*>(bias + n * 8 + column);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scores[n][2 * r] = fmaf(pair.x, unit, scores[n][2 * r]);
      scores[n][2 * r + 1] = fmaf(pair.y, unit, scores[n][2 * r + 1]);
    }
  }
}

// A tile's scores to weights, as the left operand of their product with V; the state's columns are scaled to the new
// maximum. `scale` is in units of log2; positions are those of this lane's two rows, which see `window` keys up to
// themselves. Of rows from 8 * num_halves on nothing is computed: their weights are zeros.
template <int kColumns, DType kType>
__device__ __forceinline__ void WeighTile(float (&scores)[kScoreTiles][4], int first_key, const int (&positions)[2],
                                          int window, float scale, int num_halves, WarpState<kColumns>& state,
                                          std::uint32_t (&weights)[kScoreTiles / 2][4]) {
  if (first_key + kKeysPerTile - 1 > MinOf(positions[0], positions[1]) ||
      first_key <= MaxOf(positions[0], positions[1]) - window) {
    const auto column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + n * 8 + column + i % 2;
        if (key > positions[i / 2] || key <= positions[i / 2] - window) scores[n][i] = -kInfinity;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r >= num_halves) {
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) scores[n][2 * r] = scores[n][2 * r + 1] = 0;
      break;
    }
    float max = state.max[r];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) max = fmaxf(max, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    max = QuadMax(max);
    // No key yet: any finite number keeps minus infinity minus it from being NaN.
    const float shift = max == -kInfinity ? 0.0F : max * scale;
    const float factor = Exp2Hardware(state.max[r] * scale - shift);
    state.max[r] = max;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[n][i] = Exp2Hardware(fmaf(scores[n][i], scale, -shift));
        sum += scores[n][i];
      }
    }
    state.sum[r] = fmaf(state.sum[r], factor, sum);
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d) {
      state.out[d][2 * r] *= factor;
      state.out[d][2 * r + 1] *= factor;
    }
  }
  // The accumulators of two neighbouring products are the left operand of the next one.
#pragma unroll
  for (int k = 0; k < kScoreTiles / 2; ++k) {
    weights[k][0] = PackPair<kType>(scores[2 * k][0], scores[2 * k][1]);
    weights[k][1] = PackPair<kType>(scores[2 * k][2], scores[2 * k][3]);
    weights[k][2] = PackPair<kType>(scores[2 * k + 1][0], scores[2 * k + 1][1]);
    weights[k][3] = PackPair<kType>(scores[2 * k + 1][2], scores[2 * k + 1][3]);
  }
}

// The segment's state into the running one, whose max is in units of log2 and whose sum is complete.
template <int kColumns>
__device__ __forceinline__ void MergeSegment(const WarpState<kColumns>& segment, float scale,
                                             WarpState<kColumns>& running) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const MergeFactors factors = MergeFactorsOf(running.max[r], segment.max[r] * scale, Exp2Hardware);
    running.max[r] = factors.max;
    running.sum[r] = Merged(running.sum[r], QuadSum(segment.sum[r]), factors);
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d) {
      running.out[d][2 * r] = Merged(running.out[d][2 * r], segment.out[d][2 * r], factors);
      running.out[d][2 * r + 1] = Merged(running.out[d][2 * r + 1], segment.out[d][2 * r + 1], factors);
    }
  }
}

// Where a lane's two rows go: an index of a state of the workspace if the item is split, else of `out` and of the
// carried states; -1: no row.
struct RowTargets {
  std::int32_t at[2];
};
static_assert(sizeof(RowTargets) == 8);

__device__ __forceinline__ RowTargets TargetsOf(const AttentionParams& params, const RowSpan& rows,
                                                const AttentionItem& item, const int (&lane_rows)[2]) {
  RowTargets targets;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    targets.at[r] = static_cast<std::int32_t>(item.work.is_split ? StateIndex(item.work.state_base, item.segment,
                                                                              params.kv.num_kv_heads, item.kv_head,
                                                                              item.work.num_rows, lane_rows[r])
                                                                 : rows.IndexOf(params, item.kv_head, lane_rows[r]));
    if (lane_rows[r] >= rows.row_end) targets.at[r] = -1;
  }
  return targets;
}

// What the pass before this one left of a lane's two rows, columns from first_column on.
template <int kDim, int kColumns>
__device__ __forceinline__ void ReadCarried(const AttentionParams& params, const RowTargets& targets, int first_column,
                                            WarpState<kColumns>& state) {
  const auto column = first_column + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (targets.at[r] < 0) continue;
    const float* const carried = params.carried + std::int64_t{targets.at[r]} * (kDim + 2);
#pragma unroll
    for (int d = 0; d < kColumns / 8; ++d) {
      const float2 pair = *reinterpret_cast<const float2*>(carried + column + d * 8);
      state.out[d][2 * r] = pair.x;
      state.out[d][2 * r + 1] = pair.y;
    }
    state.max[r] = carried[kDim];
    state.sum[r] = carried[kDim + 1];
  }
}

// Columns from first_column on; the warp of column 0 writes maximum and sum.
template <int kDim, int kColumns, DType kType>
__device__ __forceinline__ void WriteRows(const AttentionParams& params, bool is_split, const RowTargets& targets,
                                          int first_column, const WarpState<kColumns>& state) {
  const auto column = first_column + static_cast<int>(threadIdx.x % 4) * 2;
  const bool is_state = is_split || !params.finishes;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t at = targets.at[r];
    if (at < 0) continue;
    const float factor = is_state ? 1.0F : Normalizer(state.sum[r]);
    float* const carried = params.carried + at * (kDim + 2);
    if (is_state && column == 0) {
      float2* const max_sum = is_split ? params.state_max_sum + at : reinterpret_cast<float2*>(carried + kDim);
      *max_sum = {state.max[r], state.sum[r]};
    }
    if (is_state || params.out_dtype == DType::kF32) {
      float* out = reinterpret_cast<float*>(params.out) + at * kDim;
      if (is_state) out = is_split ? params.state_out + at * kDim : carried;
      out += column;
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
        *reinterpret_cast<float2*>(out + d * 8) = {state.out[d][2 * r] * factor, state.out[d][2 * r + 1] * factor};
      }
    } else {
      std::uint16_t* const out = reinterpret_cast<std::uint16_t*>(params.out) + at * kDim + column;
#pragma unroll
      for (int d = 0; d < kColumns / 8; ++d) {
        *reinterpret_cast<std::uint32_t*>(out + d * 8) =
            PackPair<kType>(state.out[d][2 * r] * factor, state.out[d][2 * r + 1] * factor);
      }
    }
  }
}

}  // namespace spillway::cuda
