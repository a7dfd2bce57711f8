#include "kernels/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/blas.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/memory.h"
#include "kernels/cuda/stream.h"
#include "kernels/kernels.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace cuda {
namespace {

// What a utilization leaves alone: the CUDA context grows as kernels load, and streams take workspaces outside the
// slab.
constexpr std::size_t kHeadroomBytes = std::size_t{320} << 20;
constexpr int kLowestMajor = 8;  // cp.async, bf16 mma, redux

class CudaDevice final : public Device {
 public:
  CudaDevice(const CudaDeviceOptions& options, std::shared_ptr<Slab> slab, std::unique_ptr<Kernels> kernels,
             std::string description)
      : index_(options.index),
        repeats_(options.enforce_eager ? CudaStream::Repeats::kQueued : CudaStream::Repeats::kReplayed),
        slab_(std::move(slab)),
        kernels_(std::move(kernels)),
        description_(std::move(description)) {}

  absl::StatusOr<Buffer> Allocate(MemoryKind kind, std::size_t size_bytes) override {
    RETURN_IF_ERROR(ToStatus(cudaSetDevice(index_), "choosing the device"));
    return kind == MemoryKind::kDevice ? slab_->Take(size_bytes) : AllocatePinned(size_bytes);
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override { return CudaStream::Make(index_, repeats_); }
  const Kernels& kernels() const override { return *kernels_; }
  std::size_t free_bytes() const override { return slab_->free_bytes(); }
  // At most an eighth more from 57 rows on; 43 results up to 1,024 rows.
  std::int64_t PaddedRows(std::int64_t num_rows) const override {
    if (repeats_ == CudaStream::Repeats::kQueued) return num_rows;
    const auto ceiling = std::bit_ceil(static_cast<std::uint64_t>(num_rows));
    const auto granule = static_cast<std::int64_t>(ceiling <= 8 ? ceiling : std::max<std::uint64_t>(ceiling / 16, 8));
    return (num_rows + granule - 1) / granule * granule;
  }
  HostKv host_kv() const override { return HostKv::kByLink; }
  std::string description() const override { return description_; }

 private:
  const int index_;
  const CudaStream::Repeats repeats_;
  const std::shared_ptr<Slab> slab_;
  const std::unique_ptr<Kernels> kernels_;
  const std::string description_;
};

absl::Status CheckOptions(const CudaDeviceOptions& options) {
  if (options.memory_bytes == 0 && !(options.gpu_memory_utilization > 0 && options.gpu_memory_utilization <= 1)) {
    return absl::InvalidArgumentError(
        absl::StrCat("cuda device: gpu_memory_utilization is ", options.gpu_memory_utilization, ", not in (0, 1]"));
  }
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return absl::UnavailableError(absl::StrCat("no CUDA device: ", cudaGetErrorString(error)));
  }
  if (num_devices == 0) return absl::UnavailableError("no CUDA device");
  if (options.index < 0 || options.index >= num_devices) {
    return absl::InvalidArgumentError(
        absl::StrCat("no CUDA device ", options.index, ": this machine has ", num_devices, ", from 0 on"));
  }
  return absl::OkStatus();
}

// Bytes of the slab.
absl::StatusOr<std::size_t> SlabBytes(const CudaDeviceOptions& options) {
  std::size_t free = 0;
  std::size_t total = 0;
  RETURN_IF_ERROR(ToStatus(cudaMemGetInfo(&free, &total), "asking for free memory"));
  if (options.memory_bytes > 0) {
    if (options.memory_bytes <= free) return options.memory_bytes;
    return absl::ResourceExhaustedError(
        absl::StrCat("cuda device: ", options.memory_bytes, " bytes asked for, ", free, " of ", total, " are free"));
  }
  // As in vLLM: a share of all memory, less what is taken already.
  const auto wanted = static_cast<std::size_t>(options.gpu_memory_utilization * static_cast<double>(total));
  const std::size_t taken = total - free + kHeadroomBytes;
  if (wanted > taken) return wanted - taken;
  return absl::ResourceExhaustedError(absl::StrCat("cuda device: utilization ", options.gpu_memory_utilization,
                                                   " allows ", wanted, " bytes, ", taken,
                                                   " are taken or reserved already, of ", total));
}

absl::StatusOr<std::unique_ptr<Device>> Make(const CudaDeviceOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  RETURN_IF_ERROR(ToStatus(cudaSetDevice(options.index), "choosing the device"));
  cudaDeviceProp properties = {};
  RETURN_IF_ERROR(ToStatus(cudaGetDeviceProperties(&properties, options.index), "asking for properties"));
  if (properties.major < kLowestMajor) {
    return absl::FailedPreconditionError(absl::StrCat("cuda device ", options.index, " (", properties.name,
                                                      ") has compute capability ", properties.major, ".",
                                                      properties.minor, ", at least 8.0 is needed"));
  }
  ASSIGN_OR_RETURN(const std::size_t slab_bytes, SlabBytes(options));
  ASSIGN_OR_RETURN(std::shared_ptr<Slab> slab, Slab::Make(slab_bytes));

  CudaKernelsOptions kernels_options;
  kernels_options.device = options.index;
  kernels_options.num_multiprocessors = properties.multiProcessorCount;
  RETURN_IF_ERROR(ToStatus(FindCopyEngine(&kernels_options.has_copy_engine), "asking what the kernels are built for"));
  kernels_options.attention_workspace_bytes = options.attention_workspace_bytes;
  kernels_options.may_use_wgmma =
      !options.batch_invariant && properties.major == 9 && properties.minor == 0 && HopperPrefillIsBuilt();
  const char* const prefill = kernels_options.may_use_wgmma ? " wgmma-prefill" : "";
  std::string gemm = "own-gemm";
  if (options.cublaslt != "none") {
    ASSIGN_OR_RETURN(kernels_options.blas,
                     Blas::Load(options.cublaslt == "auto" ? "" : options.cublaslt,
                                options.batch_invariant ? BlasChoice::kInvariant : BlasChoice::kFastest));
    gemm = absl::StrCat("cublaslt-", kernels_options.blas->version());
  }
  std::string description = absl::StrCat("cuda ", properties.name, " sm_", properties.major, properties.minor, " ",
                                         gemm, prefill, options.batch_invariant ? " batch-invariant" : "");
  return std::make_unique<CudaDevice>(options, slab, MakeCudaKernels(slab, std::move(kernels_options)),
                                      std::move(description));
}

}  // namespace
}  // namespace cuda

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options) { return cuda::Make(options); }

}  // namespace spillway
