// The GEMM of last resort: 64 x 64 outputs per CTA, 16 of k at a time in shared memory, one chain of fused
// multiply-adds over ascending k per output. So a row's bits do not depend on num_rows. Correct everywhere, fast
// nowhere.

#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kThreads = 256;
constexpr int kPerThread = 4;  // x 4 outputs

template <typename T>
__global__ void __launch_bounds__(kThreads) PlainGemmKernel(PlainGemmParams params, unsigned num_column_tiles) {
  __shared__ float a[kDepth][kTile];
  __shared__ float b[kDepth][kTile];
  const std::int64_t first_row = std::int64_t{blockIdx.x / num_column_tiles} * kTile;
  const std::int64_t first_column = std::int64_t{blockIdx.x % num_column_tiles} * kTile;
  const auto thread = static_cast<int>(threadIdx.x);
  const int row = thread / kDepth * kPerThread;
  const int column = thread % kDepth * kPerThread;
  float sums[kPerThread][kPerThread] = {};
  for (std::int64_t k = 0; k < params.cols; k += kDepth) {
    for (int i = thread; i < kTile * kDepth; i += kThreads) {
      const int at = i / kDepth;
      const int depth = i % kDepth;
      const bool has_k = k + depth < params.cols;
      const std::int64_t m = first_row + at;
      const std::int64_t n = first_column + at;
      a[depth][at] = has_k && m < params.num_rows
                         ? Widen(reinterpret_cast<const T*>(params.a)[m * params.cols + k + depth])
                         : 0.0F;
      b[depth][at] = has_k && n < params.rows
                         ? Widen(reinterpret_cast<const T*>(params.weight)[n * params.cols + k + depth])
                         : 0.0F;
    }
    __syncthreads();
    const int depth_end = static_cast<int>(MinOf<std::int64_t>(kDepth, params.cols - k));
    for (int depth = 0; depth < depth_end; ++depth) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          sums[i][j] = fmaf(a[depth][row + i], b[depth][column + j], sums[i][j]);
        }
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kPerThread; ++i) {
    for (int j = 0; j < kPerThread; ++j) {
      const std::int64_t m = first_row + row + i;
      const std::int64_t n = first_column + column + j;
      if (m >= params.num_rows || n >= params.rows) continue;
      const float product = params.bias != nullptr ? sums[i][j] + params.bias[n] : sums[i][j];
      float* const out = params.out + m * params.rows + n;
      *out = params.add ? *out + product : product;
    }
  }
}

}  // namespace

cudaError_t LaunchPlainGemm(const PlainGemmParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const auto num_column_tiles = static_cast<unsigned>(CeilDiv<std::int64_t>(params.rows, kTile));
  const auto num_row_tiles = static_cast<unsigned>(CeilDiv<std::int64_t>(params.num_rows, kTile));
  const auto launch = [&](auto* kernel) {
    return Launch(kernel, num_row_tiles * num_column_tiles, kThreads, 0, stream, params, num_column_tiles);
  };
  if (params.dtype == DType::kF32) return launch(PlainGemmKernel<float>);
  return params.dtype == DType::kBF16 ? launch(PlainGemmKernel<BF16>) : launch(PlainGemmKernel<F16>);
}

}  // namespace spillway::cuda
