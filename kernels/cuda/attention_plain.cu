// Paged causal attention on the ordinary cores, for what the tensor kernel does not take: F32, other head dims up to
// kMaxDim. A CTA holds kRows query rows that share each K and V load; per segment of 256 positions: scores (a thread
// per key, one chain over ascending head_dim), softmax (a warp per row), output (a thread per component, one chain over
// ascending keys), then the state joins the running one. Exponentials are the specified polynomial, as on the cpu
// device.

#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8;
constexpr int kMaxDim = 256;
constexpr int kKeysPerThread = kSegmentPositions / kThreads;
constexpr int kDimsPerThread = kMaxDim / kThreads;
constexpr int kCtasPerMultiprocessor = 8;

struct PlainShared {
  float q[kRows][kMaxDim];
  float weights[kRows][kSegmentPositions];  // scores, then 2^(score - max)
  float max[kRows];
  float sum[kRows];
};

// kVector consecutive elements at once; head_dim is a multiple of it.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Elements {
  T v[kVector];
};

// The rows of one sequence and kv head as one launch sees them.
template <typename T>
struct KeyRows {
  const std::int32_t* blocks;
  const std::byte* strips;
  std::int64_t block_bytes;
  std::int64_t row_bytes;
  const float* bias;  // of row 0 of block 0, or null
  std::int64_t bias_stride;

  __device__ const T* RowOf(int position) const {
    return reinterpret_cast<const T*>(strips + blocks[position / kBlockTokens] * block_bytes +
                                      position % kBlockTokens * row_bytes);
  }
  __device__ float BiasOf(int position) const {
    return bias == nullptr ? 0.0F : bias[blocks[position / kBlockTokens] * bias_stride + position % kBlockTokens];
  }
};

template <typename T, int kVector>
__device__ void ScoreSegment(const KeyRows<T>& keys, int begin, int end, int dim, float scale, PlainShared& shared) {
#pragma unroll 1
  for (int i = 0; i < kKeysPerThread; ++i) {
    const int offset = i * kThreads + static_cast<int>(threadIdx.x);
    if (begin + offset >= end) break;
    const T* const key = keys.RowOf(begin + offset);
    const float bias = keys.BiasOf(begin + offset) * kLog2E;
    float sums[kRows] = {};
#pragma unroll 1
    for (int d = 0; d < dim; d += kVector) {
      const auto elements = *reinterpret_cast<const Elements<T, kVector>*>(key + d);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        const float value = Widen(elements.v[j]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] = fmaf(shared.q[r][d + j], value, sums[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared.weights[r][offset] = fmaf(sums[r], scale, bias);
  }
}

// Over scores [first_key, num_keys) of a row, by one warp.
__device__ void SoftmaxRow(int r, int first_key, int num_keys, PlainShared& shared) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  float max = -kInfinity;
  for (int i = first_key + lane; i < num_keys; i += 32) max = MaxOf(max, shared.weights[r][i]);
  for (int step = 16; step > 0; step /= 2) max = MaxOf(max, __shfl_xor_sync(kAllLanes, max, step));
  float sum = 0;
  for (int i = first_key + lane; i < num_keys; i += 32) {
    const float weight = Exp2Polynomial(shared.weights[r][i] - max);
    shared.weights[r][i] = weight;
    sum += weight;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane == 0) {
    shared.max[r] = max;
    shared.sum[r] = sum;
  }
}

template <typename T, int kVector>
__device__ void AttendItem(const AttentionParams& params, const WorkRange& range, const AttentionItem& item,
                           PlainShared& shared) {
  const RowSpan rows(params, range, item);
  if (item.kv_head == 0 && item.segment == 0) WritePlan(params, rows, item);
  const int dim = params.kv.head_dim;
  const auto thread = static_cast<int>(threadIdx.x);
  const int num_rows = rows.row_end - rows.row_begin;
  const KeyRows<T> keys = {params.block_table + params.block_begin[item.sequence],
                           params.kv.pool + item.kv_head * params.kv.strip_bytes,
                           params.kv.block_bytes,
                           params.kv.row_bytes,
                           params.row_bias == nullptr ? nullptr : params.row_bias + item.kv_head * kBlockTokens,
                           params.row_bias_stride};

  __syncthreads();  // the previous item is over
  for (int index = thread; index < kRows * dim; index += kThreads) {
    const int r = index / dim;
    const int d = index % dim;
    shared.q[r][d] = r < num_rows ? LoadAs(params.q, params.q_dtype,
                                           rows.IndexOf(params, item.kv_head, rows.row_begin + r) * dim + d)
                                  : 0.0F;
  }

  const int key_end = rows.num_keys;
  const int first_segment = item.work.is_split ? item.segment : rows.first_key / kSegmentPositions;
  // A split one that lies before the windows of all rows is empty.
  const int segment_end = item.work.is_split
                              ? item.segment + ((item.segment + 1) * kSegmentPositions > rows.first_key ? 1 : 0)
                              : CeilDiv(key_end, kSegmentPositions);
  const bool is_carried = !item.work.is_split && !params.starts_empty;
  float running_max[kRows];
  float running_sum[kRows];
  float running[kRows][kDimsPerThread];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    running_max[r] = -kInfinity;
    running_sum[r] = 0;
#pragma unroll
    for (int i = 0; i < kDimsPerThread; ++i) running[r][i] = 0;
    if (!is_carried || r >= num_rows) continue;
    const float* const carried = params.carried + rows.IndexOf(params, item.kv_head, rows.row_begin + r) * (dim + 2);
    running_max[r] = carried[dim];
    running_sum[r] = carried[dim + 1];
#pragma unroll
    for (int i = 0; i < kDimsPerThread; ++i) {
      if (i * kThreads + thread < dim) running[r][i] = carried[i * kThreads + thread];
    }
  }
#pragma unroll 1
  for (int segment = first_segment; segment < segment_end; ++segment) {
    const int begin = segment * kSegmentPositions;
    const int end = MinOf(begin + kSegmentPositions, key_end);
    // Of the segment's keys row r sees (last - window, last], as far as they are there; last < 0: none.
    const auto last_of = [&](int r) { return r < num_rows ? rows.PositionOf(rows.row_begin + r) - begin : -1; };
    __syncthreads();
    ScoreSegment<T, kVector>(keys, begin, end, dim, params.scale * kLog2E, shared);
    __syncthreads();
    for (int r = thread / 32; r < kRows; r += kWarps) {
      const int last = last_of(r);
      SoftmaxRow(r, MaxOf(0, last - params.window + 1), MinOf(last + 1, end - begin), shared);
    }
    __syncthreads();
    int last[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) last[r] = last_of(r);
    const auto window = static_cast<unsigned>(params.window);
#pragma unroll
    for (int i = 0; i < kDimsPerThread; ++i) {
      const int d = i * kThreads + thread;
      float out[kRows] = {};
      if (d < dim) {
#pragma unroll 1
        for (int k = 0; k < end - begin; ++k) {
          const float value = Widen(keys.RowOf(begin + k)[dim + d]);
          // A key that a row does not see is not touched: 0 times infinity is not 0.
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const bool sees = static_cast<unsigned>(last[r] - k) < window;
            out[r] = sees ? fmaf(shared.weights[r][k], value, out[r]) : out[r];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        running[r][i] = Merged(running[r][i], out[r], MergeFactorsOf(running_max[r], shared.max[r], Exp2Polynomial));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const MergeFactors factors = MergeFactorsOf(running_max[r], shared.max[r], Exp2Polynomial);
      running_sum[r] = Merged(running_sum[r], shared.sum[r], factors);
      running_max[r] = factors.max;
    }
  }

  __syncthreads();  // all have read the carried states
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= num_rows) break;
    const int row = rows.row_begin + r;
    const std::int64_t state =
        StateIndex(item.work.state_base, item.segment, params.kv.num_kv_heads, item.kv_head, item.work.num_rows, row);
    const std::int64_t index = rows.IndexOf(params, item.kv_head, row);
    float* const carried = params.carried + index * (dim + 2);
    if (thread == 0 && item.work.is_split) {
      params.state_max_sum[state] = {running_max[r], running_sum[r]};
    } else if (thread == 0 && !params.finishes) {
      carried[dim] = running_max[r];
      carried[dim + 1] = running_sum[r];
    }
#pragma unroll
    for (int i = 0; i < kDimsPerThread; ++i) {
      const int d = i * kThreads + thread;
      if (d >= dim) break;
      if (item.work.is_split) {
        params.state_out[state * dim + d] = running[r][i];
      } else if (params.finishes) {
        StoreAs(params.out, params.out_dtype, index * dim + d, running[r][i] * Normalizer(running_sum[r]));
      } else {
        carried[d] = running[r][i];
      }
    }
  }
}

// Vectors of floats need more registers than a fourth CTA leaves (on sm_120, by two).
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kVector == 4 ? 3 : 4)
    PlainAttentionKernel(AttentionParams params, WorkRange range) {
  __shared__ PlainShared shared;
  ItemCursor cursor;
  AttentionItem item;
  for (auto index = static_cast<int>(blockIdx.x); FindItem(params, range, index, cursor, item);
       index += static_cast<int>(gridDim.x)) {
    AttendItem<T, kVector>(params, range, item, shared);
  }
}

}  // namespace

cudaError_t LaunchPlainAttention(const AttentionParams& params, cudaStream_t stream) {
  if (params.kv.head_dim > kMaxDim) return cudaErrorInvalidValue;
  const WorkRange range = {kRows, 1, kMaxRowsPerSequence, true};
  const auto num_ctas = static_cast<unsigned>(params.num_multiprocessors * kCtasPerMultiprocessor);
  const bool is_wide = params.kv.head_dim % 8 == 0;
  const auto launch = [&](auto* wide, auto* narrow) {
    return Launch(is_wide ? wide : narrow, num_ctas, kThreads, 0, stream, params, range);
  };
  switch (params.kv.dtype) {
    case DType::kF32:
      return launch(PlainAttentionKernel<float, 4>, PlainAttentionKernel<float, 1>);
    case DType::kBF16:
      return launch(PlainAttentionKernel<BF16, 8>, PlainAttentionKernel<BF16, 1>);
    case DType::kF16:
      return launch(PlainAttentionKernel<F16, 8>, PlainAttentionKernel<F16, 1>);
  }
  return cudaErrorInvalidValue;
}

}  // namespace spillway::cuda
