#pragma once

// Timing on a GPU and the table and JSON it becomes.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/stream.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace spillway::bench {

// Aborts with CUDA's own words.
void Check(cudaError_t error, const char* what);

struct Measured {
  double median_us = 0;
  double spread = 0;  // (90th - 10th percentile) / median
};

// One line of the results: what was measured, at which sizes, how fast, and against which limit.
struct Row {
  std::string section;
  std::string what;
  Measured time;
  double value = 0;
  std::string unit;
  double limit = 0;  // in the same unit; 0: none
};

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

  void Report(Row row);
  double hbm_gbps = 0;     // bytes read plus written, measured by the copy section
  double pinned_gbps = 0;  // host to device, large spans
  void WriteJson(const std::string& path, const std::string& commit) const;

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> owned_stream_;
  cuda::CudaStream* stream_ = nullptr;
  cudaDeviceProp properties_ = {};
  Buffer noise_;
  std::vector<Row> rows_;
};

void RunAttentionBench(Bench& bench);

}  // namespace spillway::bench
