// Merges the partial states of split sequences in position order. One CTA per (token row, head), a thread per
// component; each 32 segments the factors are found side by side (prefix maxima do not depend on order), then applied
// in order, so the bits are those of merging one by one.

#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kMaxThreads = 128;
constexpr int kSegmentsAtOnce = 32;  // one per lane; so many loads of a component are in flight

template <MergeExponential kExponential>
__device__ __forceinline__ float Exp2Of(float x) {
  return kExponential == MergeExponential::kHardware ? Exp2Hardware(x) : Exp2Polynomial(x);
}

template <MergeExponential kExponential>
__global__ void __launch_bounds__(kMaxThreads) MergeKernel(AttentionParams params) {
  const auto token_row = static_cast<int>(blockIdx.x) / params.num_heads;
  const auto head = static_cast<int>(blockIdx.x) % params.num_heads;
  // Rows of none of the call's sequences: their plans are another call's.
  if (token_row < params.query_begin[0] || token_row >= params.query_begin[params.num_sequences]) return;
  const TokenPlan plan = params.plan[token_row];
  if (plan.num_segments == 0) return;
  const int num_kv_heads = params.kv.num_kv_heads;
  const int group = params.num_heads / num_kv_heads;
  const int kv_head = head / group;
  const int row = plan.token * group + head % group;
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
    for (int begin = 0; begin < plan.num_segments; begin += kSegmentsAtOnce) {
      const int count = MinOf(kSegmentsAtOnce, plan.num_segments - begin);
      float values[kSegmentsAtOnce];
#pragma unroll
      for (int i = 0; i < kSegmentsAtOnce; ++i) {
        const std::int64_t at = StateIndex(plan.state_base, begin + i, num_kv_heads, kv_head, plan.num_rows, row);
        values[i] = i < count && has_component ? params.state_out[at * dim + component] : 0.0F;
      }
      float2 max_sum = {-kInfinity, 0.0F};
      if (lane < count) {
        max_sum =
            params.state_max_sum[StateIndex(plan.state_base, begin + lane, num_kv_heads, kv_head, plan.num_rows, row)];
      }
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
        running = Merged(running, values[i], at);
        running_sum = Merged(running_sum, __shfl_sync(kAllLanes, max_sum.y, i), at);
      }
      running_max = MaxOf(running_max, chunk_max);
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

cudaError_t LaunchMergeAttention(const AttentionParams& params, MergeExponential exponential, cudaStream_t stream) {
  const auto num_ctas = static_cast<unsigned>(params.num_tokens) * static_cast<unsigned>(params.num_heads);
  const auto num_threads = static_cast<unsigned>(MinOf(kMaxThreads, CeilDiv(params.kv.head_dim, 32) * 32));
  return Launch(exponential == MergeExponential::kHardware ? MergeKernel<MergeExponential::kHardware>
                                                           : MergeKernel<MergeExponential::kPolynomial>,
                num_ctas, num_threads, 0, stream, params);
}

}  // namespace spillway::cuda
