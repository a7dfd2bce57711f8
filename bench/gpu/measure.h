#pragma once

// Timing on a GPU.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bench/gpu/results.h"
#include "kernels/cuda/stream.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace spillway::bench {

// Aborts with CUDA's own words.
void Check(cudaError_t error, const char* what);

class Bench {
 public:
  // `batch_invariant` as in CudaDeviceOptions.
  explicit Bench(bool batch_invariant);

  Device& device() { return *device_; }
  const Kernels& kernels() const { return device_->kernels(); }
  cuda::CudaStream& stream() { return *stream_; }
  const cudaDeviceProp& properties() const { return properties_; }

  Buffer Allocate(MemoryKind kind, std::size_t size_bytes);
  // `size_bytes` of bf16 of about unit size, never zeros: the same 64 MiB again and again.
  Buffer RandomBF16(MemoryKind kind, std::size_t size_bytes);
  template <typename T>
  Buffer Upload(const std::vector<T>& values) {
    const Buffer buffer = Allocate(MemoryKind::kDevice, values.size() * sizeof(T));
    stream_->Copy(buffer.get(), reinterpret_cast<const std::byte*>(values.data()), buffer.size_bytes);
    Finish();
    return buffer;
  }
  void Finish();  // aborts on an error of the stream

  // Median of repeated runs by CUDA events, after warming up. work(i): run i queues on stream(), for rotating inputs.
  Measured Time(const std::function<void(int)>& work);
  // Each work's run i after the other's: the chip's clocks, which sink under load, are the same for all.
  std::vector<Measured> TimeInTurns(std::span<const std::function<void(int)>> works);

  void Report(Row row) { results_.Report(std::move(row)); }
  double hbm_gbps = 0;     // bytes read plus written, measured by the copy section
  double pinned_gbps = 0;  // host to device, large spans
  void WriteJson(const std::string& path, const std::string& commit, const std::string& machine) const {
    results_.WriteJson(path, {device_->description(), commit, machine});
  }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> owned_stream_;
  cuda::CudaStream* stream_ = nullptr;
  cudaDeviceProp properties_ = {};
  Buffer noise_;
  Results results_;
};

void RunAttentionBench(Bench& bench);
void RunGemmBench(Bench& bench);
void RunStepBench(Bench& bench);

}  // namespace spillway::bench
