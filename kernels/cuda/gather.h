#pragma once

// Rows of KV from pinned host memory straight into their slots on the device, by a kernel on the stream (launch.h:
// GatherParams). For the transfer engine; meant for a side stream.

#include "kernels/cuda/launch.h"
#include "kernels/device.h"

namespace spillway::cuda {

// `stream` is one of the cuda device's. Errors, bad sizes and alignments among them, go to it.
void GatherRows(Stream& stream, const GatherParams& params);

}  // namespace spillway::cuda
