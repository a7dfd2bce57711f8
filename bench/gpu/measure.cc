#include "bench/gpu/measure.h"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <random>

#include "kernels/check.h"

namespace spillway::bench {
namespace {

constexpr std::size_t kNoiseBytes = std::size_t{64} << 20;
constexpr double kMinTotalUs = 100e3;  // of the timed runs together
constexpr int kMinRuns = 5;
constexpr int kMaxRuns = 200;

}  // namespace

void Check(cudaError_t error, const char* what) {
  SPILLWAY_CHECK(error == cudaSuccess) << what << ": " << cudaGetErrorString(error);
}

Bench::Bench(bool batch_invariant) {
  CudaDeviceOptions options;
  options.batch_invariant = batch_invariant;
  absl::StatusOr<std::unique_ptr<Device>> device = MakeCudaDevice(options);
  if (!device.ok()) {
    std::cerr << device.status().message() << std::endl;
    std::exit(2);
  }
  device_ = *std::move(device);
  owned_stream_ = device_->NewStream().value();
  stream_ = static_cast<cuda::CudaStream*>(owned_stream_.get());
  Check(cudaGetDeviceProperties(&properties_, options.index), "properties");
  noise_ = Allocate(MemoryKind::kPinnedHost, kNoiseBytes);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  auto* const values = reinterpret_cast<std::uint16_t*>(noise_.get());
  // Repeats after a prime number of elements, so that rows of one matrix differ.
  constexpr std::size_t kPeriod = 1000003;
  for (std::size_t i = 0; i < kNoiseBytes / 2; ++i) {
    values[i] = i < kPeriod ? BF16FromFloat(normal(random)) : values[i - kPeriod];
  }
  std::printf("%s\n", device_->description().c_str());
}

Buffer Bench::Allocate(MemoryKind kind, std::size_t size_bytes) {
  absl::StatusOr<Buffer> buffer = device_->Allocate(kind, size_bytes);
  SPILLWAY_CHECK(buffer.ok()) << buffer.status();
  return *std::move(buffer);
}

Buffer Bench::RandomBF16(MemoryKind kind, std::size_t size_bytes) {
  const Buffer buffer = Allocate(kind, size_bytes);
  for (std::size_t at = 0; at < size_bytes; at += kNoiseBytes) {
    stream_->Copy(buffer.get() + at, noise_.get(), std::min(kNoiseBytes, size_bytes - at));
  }
  Finish();
  return buffer;
}

void Bench::Finish() {
  const absl::Status status = stream_->Record()->Await();
  SPILLWAY_CHECK(status.ok()) << status;
}

Measured Bench::Time(const std::function<void(int)>& work) { return TimeInTurns({&work, 1}).front(); }

std::vector<Measured> Bench::TimeInTurns(std::span<const std::function<void(int)>> works) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  Check(cudaEventCreate(&begin), "event");
  Check(cudaEventCreate(&end), "event");
  const auto once = [&](const std::function<void(int)>& work, int run) {
    Check(cudaEventRecord(begin, stream_->handle()), "record");
    work(run);
    Check(cudaEventRecord(end, stream_->handle()), "record");
    Check(cudaEventSynchronize(end), "run");
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    return double{ms} * 1e3;
  };
  double estimate = 1;
  for (const auto& work : works) {
    once(work, 0);
    estimate = std::max(estimate, once(work, 1));
  }
  const int num_runs = std::clamp(static_cast<int>(kMinTotalUs / estimate), kMinRuns, kMaxRuns);
  std::vector<std::vector<double>> times(works.size());
  for (int run = 0; run < num_runs; ++run) {
    for (std::size_t i = 0; i < works.size(); ++i) times[i].push_back(once(works[i], run));
  }
  Check(cudaEventDestroy(begin), "event");
  Check(cudaEventDestroy(end), "event");
  Finish();
  std::vector<Measured> measured;
  for (std::vector<double>& each : times) {
    std::sort(each.begin(), each.end());
    const double median = each[each.size() / 2];
    measured.push_back({median, (each[each.size() * 9 / 10] - each[each.size() / 10]) / median});
  }
  return measured;
}

}  // namespace spillway::bench
