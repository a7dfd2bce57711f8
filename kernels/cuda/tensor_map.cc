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

cudaError_t EncodeStrips(const KvLayer& kv, int num_columns, CUtensorMap* map) {
  if (EncodeTiled() == nullptr) return cudaErrorNotSupported;
  constexpr int kRank = 4;
  constexpr cuuint64_t kNoEnd = 0x7fffffff;  // what is asked for is there
  // Bytes as elements of 16 bits, whatever the KV's type.
  const cuuint64_t dims[kRank] = {kColumnBytes / 2, kBlockTokens, static_cast<cuuint64_t>(kv.row_bytes) / kColumnBytes,
                                  kNoEnd};
  const cuuint64_t strides[kRank - 1] = {static_cast<cuuint64_t>(kv.row_bytes), kColumnBytes,
                                         static_cast<cuuint64_t>(kv.strip_bytes)};
  const cuuint32_t box[kRank] = {kColumnBytes / 2, kBlockTokens, static_cast<cuuint32_t>(num_columns), 1};
  const cuuint32_t steps[kRank] = {1, 1, 1, 1};
  const CUresult result = EncodeTiled()(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, kRank, kv.pool, dims, strides, box, steps,
                                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace spillway::cuda
