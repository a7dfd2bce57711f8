// Rows of KV from pinned, mapped host memory straight into their slots: no staging buffer, no CPU gather. A row is read
// in 16-byte pieces by neighbouring lanes (512 B: one warp, one row), so that each request on the link is a full line.
// The link wants about bandwidth x latency = 55 GB/s x 2 us = 110 KiB in flight: kDefaultGatherCtas CTAs of 256
// threads with kPiecesInFlight loads of 16 bytes each before the first store are 256 KiB.

#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPiecesInFlight = 4;
constexpr std::int64_t kMaxPieces = std::int64_t{1} << 31;  // of one call: 32 GiB

__global__ void __launch_bounds__(kThreads) GatherRowsKernel(GatherParams params) {
  const std::int64_t num_rows = params.num_rows_device != nullptr
                                    ? MinOf<std::int64_t>(*params.num_rows_device, params.num_rows)
                                    : params.num_rows;
  // 32-bit indices: a division by a run-time divisor is five times dearer in 64 bits.
  const auto pieces_per_row = static_cast<std::uint32_t>(params.row_bytes / 16);
  const auto num_pieces = static_cast<std::uint32_t>(num_rows) * pieces_per_row;
  const std::uint32_t stride = gridDim.x * kThreads;
  for (std::uint32_t first = blockIdx.x * kThreads + threadIdx.x; first < num_pieces;
       first += stride * kPiecesInFlight) {
    uint4 data[kPiecesInFlight];
    std::byte* to[kPiecesInFlight];
#pragma unroll
    for (int i = 0; i < kPiecesInFlight; ++i) {
      const std::uint32_t piece = first + static_cast<std::uint32_t>(i) * stride;
      to[i] = nullptr;
      if (piece >= num_pieces) continue;
      const std::uint32_t row = piece / pieces_per_row;
      const std::uint32_t offset = piece % pieces_per_row * 16;
      to[i] = params.destination + params.destination_offsets[row] + offset;
      data[i] = LoadOnce(params.source + params.source_offsets[row] + offset);
    }
#pragma unroll
    for (int i = 0; i < kPiecesInFlight; ++i) {
      if (to[i] != nullptr) *reinterpret_cast<uint4*>(to[i]) = data[i];
    }
  }
}

}  // namespace

cudaError_t LaunchGatherRows(const GatherParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  if (params.row_bytes <= 0 || params.row_bytes % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(params.source) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(params.destination) % 16 != 0 ||
      params.num_rows * (params.row_bytes / 16) > kMaxPieces) {
    return cudaErrorInvalidValue;
  }
  const int num_ctas = params.num_ctas > 0 ? params.num_ctas : kDefaultGatherCtas;
  return Launch(GatherRowsKernel, static_cast<unsigned>(num_ctas), kThreads, 0, stream, params);
}

}  // namespace spillway::cuda
