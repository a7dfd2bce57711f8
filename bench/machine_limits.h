#pragma once

// What this machine can do at best, by loops that do nothing else.

#include "kernels/device.h"

namespace spillway {

struct MachineLimits {
  double read_gigabytes = 0;  // per second, from memory
  double copy_gigabytes = 0;  // bytes copied per second
  double fma_gigaflops = 0;   // float, widest vectors
  double bf16_gigaflops = 0;  // products of bf16 pairs: AMX, or vdpbf16ps; the float peak where neither is there
};

MachineLimits MeasureLimits(Device& device, int num_threads);

}  // namespace spillway
