// The first promise on the cuda device in its batch-invariant mode: tiers on, off, tiny or huge change no bit.

#include "tests/kernels/cuda_engine_device.h"

#define MakeCpuDevice MakeEngineDevice
#include "tests/engine/tiers_test.cc"  // NOLINT(bugprone-suspicious-include)
