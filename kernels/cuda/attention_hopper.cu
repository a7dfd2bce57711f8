// Paged causal prefill attention for compute capability 9.0, head_dim 64 and 128, q and KV in BF16 or F16. After
// FlashAttention-3 (Shah et al., 2024).
//
// A block has a warp that loads (attention_hopper_loader.cuh) and three warpgroups that compute
// (attention_hopper_team.cuh); it takes items (kv head, tile of 192 query rows) as long as there are any. The loading
// warp brings the queries of an item and tiles of keys and values by the copy engine into rings in shared memory, and
// runs ahead into the next item. A warpgroup holds 64 query rows: scores = q K^T and out += weights V by wgmma, weights
// in registers. It computes the scores of the next tile while the weights of this one meet the values, and its
// exponentials while the products of the others go on.
//
// An item's tiles are taken from its last one, where the mask is, to its first, under one running maximum. So the bits
// are not those of the kernel of attention_tensor.cu, and depend on where a row's tile begins: this kernel serves only
// where the device need not be batch-invariant.

#include <cuda.h>

#include "kernels/cuda/attention_hopper_loader.cuh"
#include "kernels/cuda/attention_hopper_team.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/tensor_map.h"

namespace spillway::cuda {
namespace hopper {

template <typename S>
__global__ void __launch_bounds__(kThreads, 1)
    HopperPrefillKernel(const __grid_constant__ CUtensorMap query_map, const __grid_constant__ CUtensorMap kv_map,
                        const __grid_constant__ AttentionParams params, const __grid_constant__ WorkRange range) {
  if (threadIdx.x == 0) SharedLayout<S>().InitBarriers();
  __syncthreads();
  if (threadIdx.x < kTeamThreads) {
    LowerRegisters<kLoaderRegisters>();
    if (threadIdx.x < 32) Loader<S>(params, query_map, kv_map).Run(range);
  } else {
    RaiseRegisters<kTeamRegisters>();
    Team<S>(params).Run();
  }
}

template <typename S>
cudaError_t LaunchShape(const AttentionParams& params, int min_rows, cudaStream_t stream) {
  using Layout = SharedLayout<S>;
  const auto kernel = HopperPrefillKernel<S>;
  cudaError_t error = AllowShared(kernel, Layout::kBytes);
  if (error != cudaSuccess) return error;

  const auto num_heads = static_cast<cuuint32_t>(params.num_heads);
  const auto group = num_heads / static_cast<cuuint32_t>(params.kv.num_kv_heads);
  const cuuint32_t tokens_per_tile = kTileRows / group;
  constexpr cuuint64_t kHeadBytes = S::kDim * 2;
  // The heads of a group, tokens, parts of heads: of a tile of rows a part each.
  CUtensorMap query_map;
  error = EncodeTensor({.base = const_cast<std::byte*>(params.q),
                        .sizes = {kPartElements, group, static_cast<cuuint64_t>(params.num_tokens),
                                  cuuint64_t{num_heads} * Layout::kParts},
                        .strides = {kHeadBytes, num_heads * kHeadBytes, kColumnBytes},
                        .box = {kPartElements, group, tokens_per_tile, 1}},
                       &query_map);
  if (error != cudaSuccess) return error;
  // Tokens of half a strip, parts of a row, halves: of a strip all of K or of V.
  CUtensorMap kv_map;
  const auto row_bytes = static_cast<cuuint64_t>(params.kv.row_bytes);
  error = EncodeTensor({.base = params.kv.pool,
                        .sizes = {kPartElements, kSwizzledRows, 2 * Layout::kParts, kNoEnd},
                        .strides = {row_bytes, kColumnBytes, kSwizzledRows * row_bytes},
                        .box = {kPartElements, kSwizzledRows, Layout::kParts, kHalves}},
                       &kv_map);
  if (error != cudaSuccess) return error;

  const WorkRange range = {static_cast<int>(tokens_per_tile * group), min_rows, kMaxRowsPerSequence, false};
  return Launch(kernel, static_cast<unsigned>(params.num_multiprocessors), kThreads, Layout::kBytes, stream, query_map,
                kv_map, params, range);
}

}  // namespace hopper

bool HopperPrefillIsBuilt() { return true; }

bool HopperPrefillFits(const AttentionParams& params) {
  return params.may_use_wgmma && TensorAttentionFits(params) && params.row_bias == nullptr &&
         params.carried == nullptr && params.num_heads / params.kv.num_kv_heads <= hopper::kTileRows;
}

cudaError_t LaunchHopperPrefill(const AttentionParams& params, int min_rows, cudaStream_t stream) {
  const auto launch = [&]<DType kType>() {
    return params.kv.head_dim == 64 ? hopper::LaunchShape<hopper::Shape<64, kType>>(params, min_rows, stream)
                                    : hopper::LaunchShape<hopper::Shape<128, kType>>(params, min_rows, stream);
  };
  return params.kv.dtype == DType::kBF16 ? launch.template operator()<DType::kBF16>()
                                         : launch.template operator()<DType::kF16>();
}

}  // namespace spillway::cuda
