#pragma once

// What this machine can do at best, by loops that do nothing else.

#include "kernels/device.h"

namespace spillway {

struct MachineLimits {
  double read_gigabytes = 0;  // per second, from memory
  double copy_gigabytes = 0;  // bytes copied per second
  double fma_gigaflops = 0;   // float, widest vectors
};

MachineLimits MeasureLimits(Device& device, int num_threads);

}  // namespace spillway
