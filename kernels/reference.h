#pragma once

// The oracle: plain loops, double accumulation, one thread, never fast on purpose.

#include <memory>

#include "kernels/kernels.h"

namespace spillway {

// Runs on the streams of the cpu device. Any thread.
std::unique_ptr<Kernels> MakeReferenceKernels();

}  // namespace spillway
