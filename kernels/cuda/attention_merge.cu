// Merges the partial states of split sequences in position order. A thread per component of a (token row, head) that
// may be of one; each 32 segments the factors are found side by side (prefix maxima do not depend on order), then
// applied in order, so the bits are those of merging one by one.

#include "kernels/cuda/attention_runs.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kThreads = 32;
constexpr int kSegmentsAtOnce = 32;  // a chunk: one per lane
// Chunks on their way or being merged: where rows are few, a load takes long; where they are many, they hide each
// other's loads, and shared memory decides how many run.
constexpr int kStagesOfFew = 4;
constexpr int kStagesOfMany = 2;

// The states of chunks, in shared memory: on their way there they take no registers.
template <int kStages>
struct Chunks {
  float values[kStages][kSegmentsAtOnce][kThreads];  // each thread's component
  float2 max_sum[kStages][kSegmentsAtOnce];
  float4 steps[kSegmentsAtOnce];  // factors and sum of each segment
};

// Whether several CTAs computed the segments of the item that the row is of.
__device__ bool IsSplit(const TokenPlan& plan, int kv_head, int row) {
  const Partition partition = {plan.run_length, plan.num_longer_runs};
  if (plan.num_segments == 0 || partition.length + partition.num_longer == 0) return plan.num_segments > 0;
  const int item = kv_head * CeilDiv(plan.num_rows, kDecodeRows) + row / kDecodeRows;
  const int first_unit = plan.unit_base + item * plan.num_segments;
  return partition.RunOf(first_unit) != partition.RunOf(first_unit + plan.num_segments - 1);
}

// The states of one token row and head, `stride` states from segment to segment. A thread reads what it has loaded
// itself, and nothing else.
struct RowStates {
  const float* out;
  const float2* max_sum;
  std::int64_t stride;
  int dim;
  int num_segments;

  __device__ RowStates(const AttentionParams& params, const TokenPlan& plan, int kv_head, int row)
      : stride(std::int64_t{params.kv.num_kv_heads} * plan.num_rows),
        dim(params.kv.head_dim),
        num_segments(plan.num_segments) {
    const std::int64_t first = StateIndex(plan.state_base, 0, params.kv.num_kv_heads, kv_head, plan.num_rows, row);
    out = params.state_out + first * dim;
    max_sum = params.state_max_sum + first;
  }

  __device__ __forceinline__ int CountOf(int chunk) const {
    return MinOf(kSegmentsAtOnce, num_segments - chunk * kSegmentsAtOnce);
  }
  template <int kStages>
  __device__ __forceinline__ void Load(int chunk, int component, Chunks<kStages>& chunks) const {
    const auto lane = static_cast<int>(threadIdx.x);
    const int stage = chunk % kStages;
    const int count = CountOf(chunk);
    if (lane < count) {
      const float2* const from = max_sum + (std::int64_t{chunk} * kSegmentsAtOnce + lane) * stride;
      CopyAsync(chunks.max_sum[stage][lane].x, from->x);
      CopyAsync(chunks.max_sum[stage][lane].y, from->y);
    }
    if (component < dim) {
      const float* from = out + std::int64_t{chunk} * kSegmentsAtOnce * stride * dim + component;
#pragma unroll 8
      for (int i = 0; i < count; ++i, from += stride * dim) CopyAsync(chunks.values[stage][i][lane], *from);
    }
    CommitCopies();
  }
};

template <MergeExponential kExponential>
__device__ __forceinline__ float Exp2Of(float x) {
  return kExponential == MergeExponential::kHardware ? Exp2Hardware(x) : Exp2Polynomial(x);
}

// The row that CTAs merge, num_parts of them. Where only sequences of at most max_rows query rows are split, there is
// one for each that these could have: far fewer than a prompt has. max_rows is 0: one for each there is.
struct MergedRow {
  int token_row;
  int head;
  bool may_be_split;

  __device__ MergedRow(const AttentionParams& params, int num_parts, int max_rows) {
    const int index = static_cast<int>(blockIdx.x) / num_parts;
    if (max_rows == 0) {
      token_row = index / params.num_heads;
      head = index % params.num_heads;
      // Rows of none of the call's sequences: their plans are another call's.
      may_be_split = token_row >= params.query_begin[0] && token_row < params.query_begin[params.num_sequences];
      return;
    }
    const int group = params.num_heads / params.kv.num_kv_heads;
    const int row = index % max_rows;
    const int kv_head = index / max_rows % params.kv.num_kv_heads;
    const int* const begin = params.query_begin + index / max_rows / params.kv.num_kv_heads;
    const int num_rows = (begin[1] - begin[0]) * group;
    token_row = begin[0] + row / group;
    head = kv_head * group + row % group;
    may_be_split = row < num_rows && num_rows <= max_rows;
  }
};

// Takes 32 segments, or fewer, in order.
template <int kStages>
__device__ __forceinline__ void MergeChunk(const Chunks<kStages>& chunks, int stage, int count, float& running,
                                           float& running_sum) {
  const auto take = [&](int i) {
    const float4 step = chunks.steps[i];
    const MergeFactors at = {step.x, step.y, 0};
    running = Merged(running, chunks.values[stage][i][threadIdx.x], at);
    running_sum = Merged(running_sum, step.z, at);
  };
  if (count == kSegmentsAtOnce) {
#pragma unroll
    for (int i = 0; i < kSegmentsAtOnce; ++i) take(i);
  } else {
    for (int i = 0; i < count; ++i) take(i);
  }
}

// num_parts CTAs for a token row and head share its components.
template <MergeExponential kExponential, int kStages>
__global__ void __launch_bounds__(kThreads) MergeKernel(AttentionParams params, int num_parts, int max_rows) {
  const auto part = static_cast<int>(blockIdx.x) % num_parts;
  const MergedRow merged(params, num_parts, max_rows);
  if (!merged.may_be_split) return;
  const int token_row = merged.token_row;
  const int head = merged.head;
  const int group = params.num_heads / params.kv.num_kv_heads;
  const int kv_head = head / group;
  const TokenPlan plan = params.plan[token_row];
  const int row = plan.token * group + head % group;
  if (!IsSplit(plan, kv_head, row)) return;
  const RowStates states(params, plan, kv_head, row);
  __shared__ Chunks<kStages> chunks;
  const auto lane = static_cast<int>(threadIdx.x);
  const int dim = params.kv.head_dim;
  const std::int64_t index = std::int64_t{token_row} * params.num_heads + head;
  float* const carried = params.carried + index * (dim + 2);
  const float carried_max = params.starts_empty ? -kInfinity : carried[dim];
  const float carried_sum = params.starts_empty ? 0.0F : carried[dim + 1];
  float running_max = carried_max;
  float running_sum = carried_sum;
  const int num_chunks = CeilDiv(plan.num_segments, kSegmentsAtOnce);

  // All threads take part in the shuffles; those beyond dim only there.
  for (int first = part * kThreads; first < dim; first += num_parts * kThreads) {
    const int component = first + lane;
    const bool has_component = component < dim;
    running_max = carried_max;
    running_sum = carried_sum;
    float running = params.starts_empty || !has_component ? 0.0F : carried[component];
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) states.Load(chunk, component, chunks);
#pragma unroll 1
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      states.Load(chunk + kStages - 1, component, chunks);
      AwaitCopies<kStages - 1>();
      const int stage = chunk % kStages;
      const int count = states.CountOf(chunk);
      const float2 max_sum = lane < count ? chunks.max_sum[stage][lane] : float2{-kInfinity, 0.0F};
      // Largest of the running maximum and of lanes before this one.
      float before = max_sum.x;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(kAllLanes, before, step);
        if (lane >= step) before = MaxOf(before, other);
      }
      const float chunk_max = __shfl_sync(kAllLanes, before, 31);
      before = __shfl_up_sync(kAllLanes, before, 1);
      before = lane == 0 ? running_max : MaxOf(before, running_max);
      const MergeFactors factors = MergeFactorsOf(before, max_sum.x, Exp2Of<kExponential>);
      __syncwarp();  // the steps before these are taken
      chunks.steps[lane] = {factors.running, factors.segment, max_sum.y, 0};
      __syncwarp();
      MergeChunk(chunks, stage, count, running, running_sum);
      running_max = MaxOf(running_max, chunk_max);
    }
    if (!has_component) continue;
    if (params.finishes) {
      StoreAs(params.out, params.out_dtype, index * dim + component, running * Normalizer(running_sum));
    } else {
      carried[component] = running;
    }
  }
  if (params.finishes || part > 0) return;
  __syncwarp();  // all have read what they started from
  if (lane == 0) {
    carried[dim] = running_max;
    carried[dim + 1] = running_sum;
  }
}

}  // namespace

cudaError_t LaunchMergeAttention(const AttentionParams& params, MergeExponential exponential, int max_rows,
                                 cudaStream_t stream) {
  std::int64_t num_rows = std::int64_t{params.num_tokens} * params.num_heads;
  const std::int64_t num_bounded = std::int64_t{params.num_sequences} * params.kv.num_kv_heads * max_rows;
  if (max_rows == 0 || num_rows <= num_bounded) {
    max_rows = 0;
  } else {
    num_rows = num_bounded;
  }
  // Where maximum and sum are both read from what a row carries and written there, one CTA has all components.
  const int num_parts = params.starts_empty || params.finishes ? CeilDiv(params.kv.head_dim, kThreads) : 1;
  const bool are_few = num_rows <= 2 * params.num_multiprocessors;
  const auto launch = [&](auto* of_few, auto* of_many) {
    return Launch(are_few ? of_few : of_many, static_cast<unsigned>(num_rows * num_parts), kThreads, 0, stream, params,
                  num_parts, max_rows);
  };
  return exponential == MergeExponential::kHardware ? launch(MergeKernel<MergeExponential::kHardware, kStagesOfFew>,
                                                             MergeKernel<MergeExponential::kHardware, kStagesOfMany>)
                                                    : launch(MergeKernel<MergeExponential::kPolynomial, kStagesOfFew>,
                                                             MergeKernel<MergeExponential::kPolynomial, kStagesOfMany>);
}

}  // namespace spillway::cuda
