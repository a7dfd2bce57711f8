// The goldens of stories260K, end to end through the engine, with the cuda device in the place of the cpu one.

#include "tests/kernels/cuda_engine_device.h"

#define MakeCpuDevice MakeEngineDevice
#include "tests/engine/golden_test.cc"  // NOLINT(bugprone-suspicious-include)
