#include "kernels/cuda/tensor_map.h"

#include <cstdint>

#include "kernels/kv_layout.h"

namespace spillway::cuda {
namespace {

// The driver's function, which the static runtime finds in it; null where it has none.
decltype(&cuTensorMapEncodeTiled) EncodeTiled() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    constexpr unsigned kVersion = 12000;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      found = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

}  // namespace

cudaError_t EncodeTensor(const Tensor& tensor, CUtensorMap* map) {
  if (EncodeTiled() == nullptr) return cudaErrorNotSupported;
  constexpr int kRank = 4;
  const cuuint32_t steps[kRank] = {1, 1, 1, 1};
  const CUresult result =
      EncodeTiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, tensor.base, tensor.sizes, tensor.strides, tensor.box,
                    steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                    CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t EncodeStrips(const KvLayer& kv, int num_columns, CUtensorMap* map) {
  const auto row_bytes = static_cast<cuuint64_t>(kv.row_bytes);
  return EncodeTensor({.base = kv.pool,
                       .sizes = {kColumnBytes / 2, kBlockTokens, row_bytes / kColumnBytes, kNoEnd},
                       .strides = {row_bytes, kColumnBytes, static_cast<cuuint64_t>(kv.strip_bytes)},
                       .box = {kColumnBytes / 2, kBlockTokens, static_cast<cuuint32_t>(num_columns), 1}},
                      map);
}

}  // namespace spillway::cuda
