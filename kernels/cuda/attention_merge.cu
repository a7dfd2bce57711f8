// Merges the partial states of split sequences in position order. One CTA per (token row, head) that may be of one, a
// thread per component; each 32 segments the factors are found side by side (prefix maxima do not depend on order),
// then applied in order, so the bits are those of merging one by one.

#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kSegmentsAtOnce = 32;  // one per lane

// The states of kSegmentsAtOnce segments as a thread reads them: its component of each, and one's max and sum.
struct Chunk {
  float values[kSegmentsAtOnce];
  float2 max_sum;
};

// Whether several CTAs computed the segments of the item that the row is of.
__device__ bool IsSplit(const TokenPlan& plan, int kv_head, int row) {
  if (plan.num_segments == 0 || plan.units_per_cta == 0) return plan.num_segments > 0;
  const int item = kv_head * CeilDiv(plan.num_rows, kDecodeRows) + row / kDecodeRows;
  const int first_unit = plan.unit_base + item * plan.num_segments;
  return first_unit / plan.units_per_cta != (first_unit + plan.num_segments - 1) / plan.units_per_cta;
}

// The states of one token row and head, `stride` states from segment to segment.
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

  // Zeros and an empty state where there is none. All loads are in flight together.
  __device__ __forceinline__ void Load(int begin, int component, Chunk& chunk) const {
    const int count = component < dim ? num_segments - begin : 0;
    const float* const at = out + begin * stride * dim + component;
    const auto step = static_cast<unsigned>(stride * dim);  // there are fewer than 2^32 floats of states
#pragma unroll
    for (unsigned i = 0; i < kSegmentsAtOnce; ++i) {
      chunk.values[i] = static_cast<int>(i) < count ? at[i * step] : 0.0F;
    }
    const int segment = begin + static_cast<int>(threadIdx.x % 32);
    chunk.max_sum = segment < num_segments ? max_sum[segment * stride] : float2{-kInfinity, 0.0F};
  }
};

template <MergeExponential kExponential>
__device__ __forceinline__ float Exp2Of(float x) {
  return kExponential == MergeExponential::kHardware ? Exp2Hardware(x) : Exp2Polynomial(x);
}

// The row that a CTA merges. Where only sequences of at most max_rows query rows are split, there is one for each that
// these could have: far fewer than a prompt has. max_rows is 0: one for each there is.
struct MergedRow {
  int token_row;
  int head;
  bool may_be_split;

  __device__ MergedRow(const AttentionParams& params, int max_rows) {
    const auto cta = static_cast<int>(blockIdx.x);
    if (max_rows == 0) {
      token_row = cta / params.num_heads;
      head = cta % params.num_heads;
      // Rows of none of the call's sequences: their plans are another call's.
      may_be_split = token_row >= params.query_begin[0] && token_row < params.query_begin[params.num_sequences];
      return;
    }
    const int group = params.num_heads / params.kv.num_kv_heads;
    const int row = cta % max_rows;
    const int kv_head = cta / max_rows % params.kv.num_kv_heads;
    const int* const begin = params.query_begin + cta / max_rows / params.kv.num_kv_heads;
    const int num_rows = (begin[1] - begin[0]) * group;
    token_row = begin[0] + row / group;
    head = kv_head * group + row % group;
    may_be_split = row < num_rows && num_rows <= max_rows;
  }
};

// Where CTAs are few, two chunks are on their way while a third is merged (kIsDeep): a load takes longer than that.
// Where they are many, they hide each other's loads, and registers decide how many run.
template <MergeExponential kExponential, bool kIsDeep>
__global__ void __launch_bounds__(kMaxThreads, kIsDeep ? 2 : 3) MergeKernel(AttentionParams params, int max_rows) {
  AwaitPrimary();
  const MergedRow merged(params, max_rows);
  if (!merged.may_be_split) return;
  const int token_row = merged.token_row;
  const int head = merged.head;
  const int group = params.num_heads / params.kv.num_kv_heads;
  const int kv_head = head / group;
  const TokenPlan plan = params.plan[token_row];
  const int row = plan.token * group + head % group;
  if (!IsSplit(plan, kv_head, row)) return;
  const RowStates states(params, plan, kv_head, row);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int dim = params.kv.head_dim;
  const std::int64_t index = std::int64_t{token_row} * params.num_heads + head;
  float* const carried = params.carried + index * (dim + 2);
  const float carried_max = params.starts_empty ? -kInfinity : carried[dim];
  const float carried_sum = params.starts_empty ? 0.0F : carried[dim + 1];
  float running_max = carried_max;
  float running_sum = carried_sum;

  // All threads of a warp take part in the shuffles; those beyond dim only there.
  for (int first = 0; first < dim; first += static_cast<int>(blockDim.x)) {
    const int component = first + static_cast<int>(threadIdx.x);
    const bool has_component = component < dim;
    running_max = carried_max;
    running_sum = carried_sum;
    float running = params.starts_empty || !has_component ? 0.0F : carried[component];
    Chunk chunk;
    Chunk next;
    states.Load(0, component, chunk);
    if constexpr (kIsDeep) states.Load(kSegmentsAtOnce, component, next);
#pragma unroll 1
    for (int begin = 0; begin < plan.num_segments; begin += kSegmentsAtOnce) {
      Chunk later;
      if constexpr (kIsDeep) states.Load(begin + 2 * kSegmentsAtOnce, component, later);
      const float2 max_sum = chunk.max_sum;
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
#pragma unroll
      for (int i = 0; i < kSegmentsAtOnce; ++i) {
        MergeFactors at;
        at.running = __shfl_sync(kAllLanes, factors.running, i);
        at.segment = __shfl_sync(kAllLanes, factors.segment, i);
        running = Merged(running, chunk.values[i], at);
        running_sum = Merged(running_sum, __shfl_sync(kAllLanes, max_sum.y, i), at);
      }
      running_max = MaxOf(running_max, chunk_max);
      if constexpr (kIsDeep) {
        chunk = next;
        next = later;
      } else {
        states.Load(begin + kSegmentsAtOnce, component, chunk);
      }
    }
    if (!has_component) continue;
    if (params.finishes) {
      StoreAs(params.out, params.out_dtype, index * dim + component, running * Normalizer(running_sum));
    } else {
      carried[component] = running;
    }
  }
  if (params.finishes) return;
  __syncthreads();  // all have read what they started from
  if (threadIdx.x == 0) {
    carried[dim] = running_max;
    carried[dim + 1] = running_sum;
  }
}

}  // namespace

cudaError_t LaunchMergeAttention(const AttentionParams& params, MergeExponential exponential, int max_rows,
                                 cudaStream_t stream) {
  std::int64_t num_ctas = std::int64_t{params.num_tokens} * params.num_heads;
  const std::int64_t num_bounded = std::int64_t{params.num_sequences} * params.kv.num_kv_heads * max_rows;
  if (max_rows == 0 || num_ctas <= num_bounded) {
    max_rows = 0;
  } else {
    num_ctas = num_bounded;
  }
  const auto num_threads = static_cast<unsigned>(MinOf(kMaxThreads, CeilDiv(params.kv.head_dim, 32) * 32));
  const auto launch = [&](auto* deep, auto* shallow) {
    const bool is_deep = num_ctas <= 2 * params.num_multiprocessors;
    auto* const kernel = is_deep ? deep : shallow;
    const auto grid = static_cast<unsigned>(num_ctas);
    return params.has_copy_engine ? LaunchDependent(kernel, grid, num_threads, 0, stream, params, max_rows)
                                  : Launch(kernel, grid, num_threads, 0, stream, params, max_rows);
  };
  return exponential == MergeExponential::kHardware
             ? launch(MergeKernel<MergeExponential::kHardware, true>, MergeKernel<MergeExponential::kHardware, false>)
             : launch(MergeKernel<MergeExponential::kPolynomial, true>,
                      MergeKernel<MergeExponential::kPolynomial, false>);
}

}  // namespace spillway::cuda
