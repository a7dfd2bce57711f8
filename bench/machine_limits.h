#pragma once

// What this machine can do at best, by loops that do nothing else.

#include <cstddef>

#include "kernels/device.h"

namespace spillway {

struct MachineLimits {
  double read_gigabytes = 0;  // per second, from memory
  double copy_gigabytes = 0;  // bytes copied per second
  double fma_gigaflops = 0;   // float, widest vectors
  double bf16_gigaflops = 0;  // products of bf16 pairs: AMX, or vdpbf16ps; the float peak where neither is there
  // A GEMM by AMX of operands that lie in the second-level cache: what loading tiles and sums leaves of the above. The
  // above where AMX is not there.
  double bf16_gemm_gigaflops = 0;
};

MachineLimits MeasureLimits(Device& device, int num_threads);

// The same loops, a few milliseconds long: between the runs of a benchmark, since what neighbours on a shared machine
// leave of it changes within seconds.
class LimitProbe {
 public:
  LimitProbe(Device& device, int num_threads);

  double ReadGigabytes() const;
  double Bf16Gigaflops() const;
  double Bf16GemmGigaflops() const;
  double FmaGigaflops() const;

 private:
  const int num_threads_;
  const std::size_t bytes_per_thread_;
  const Buffer memory_;
};

}  // namespace spillway
