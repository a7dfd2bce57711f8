// A program that is wrong on purpose: it overwrites the activations of a queued GEMM without waiting for its event.
// Under ThreadSanitizer it must be reported, with AMX too, whose reads only the declared ranges show.
//
//   deliberate_race fma | auto

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <iostream>
#include <string>
#include <thread>
#include <vector>

#include "kernels/device.h"
#include "kernels/kernels.h"

int main(int argc, char** argv) {
  using namespace spillway;
  CpuDeviceOptions options;
  options.num_workers = 2;
  options.gemm = argc > 1 ? argv[1] : "fma";
  // Holds the GEMM until everything is queued. Relaxed: it must not order what the sanitizer is to find unordered.
  std::atomic<bool> is_queued{false};
  options.before_item = [&] {
    while (!is_queued.load(std::memory_order_relaxed)) std::this_thread::yield();
  };
  const auto device = MakeCpuDevice(options).value();
  const auto stream = device->NewStream().value();
  std::cout << device->description() << std::endl;

  constexpr std::int64_t kSize = 256;
  constexpr std::int64_t kRows = 8;
  const std::vector<std::uint16_t> w(kSize * kSize, BF16FromFloat(1.0F));
  const MatrixView view = {reinterpret_cast<const std::byte*>(w.data()), DType::kBF16, kSize, kSize, kSize};
  const auto weight = device->kernels().Pack({&view, 1}).value();
  std::vector<std::uint16_t> a(kRows * kSize, BF16FromFloat(1.0F));
  std::vector<float> out(kRows * kSize);
  GemmArgs args;
  args.a = reinterpret_cast<const std::byte*>(a.data());
  args.a_dtype = DType::kBF16;
  args.num_rows = kRows;
  args.weight = weight.get();
  args.out = out.data();
  device->kernels().Gemm(*stream, args);
  const auto done = stream->Record();
  is_queued.store(true, std::memory_order_relaxed);
  for (std::uint16_t& value : a) value = BF16FromFloat(2.0F);  // the bug: `done` was not awaited
  if (!done->Await().ok()) return 2;
  std::cout << out[0] << std::endl;
  return 0;
}
