// The first promise on the cuda device in its batch-invariant mode: batches, chunks, prefix hits and preemption change
// no bit, with decoding steps padded and replayed from graphs. head_dim 64: the tensor cores' attention where the model
// is BF16.

#include "tests/kernels/cuda_engine_device.h"

#define MakeCpuDevice MakeEngineDevice
#define SPILLWAY_IDENTITY_HEAD_DIM 64
#include "tests/engine/identity_test.cc"  // NOLINT(bugprone-suspicious-include)
