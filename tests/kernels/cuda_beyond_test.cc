// Sequences larger than the device tier on the cuda device, in its batch-invariant mode: their home blocks are read
// from pinned host memory in place while decoding, and staged for prompts; no bit changes.

#include "tests/kernels/cuda_engine_device.h"

#define MakeCpuDevice MakeEngineDevice
#define SPILLWAY_BEYOND_HEAD_DIM 64     // the tensor cores' attention
#include "tests/engine/beyond_test.cc"  // NOLINT(bugprone-suspicious-include)
