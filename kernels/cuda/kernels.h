#pragma once

// Kernels of the cuda device, over the launch functions of launch.h and cuBLASLt.

#include <cstddef>
#include <memory>

#include "kernels/cuda/blas.h"
#include "kernels/cuda/memory.h"
#include "kernels/kernels.h"

namespace spillway::cuda {

struct CudaKernelsOptions {
  int device = 0;
  int num_multiprocessors = 0;
  bool has_copy_engine = false;               // as FindCopyEngine of launch.h has it
  std::size_t attention_workspace_bytes = 0;  // per stream that runs attention
  bool may_use_wgmma = false;                 // AttentionParams of launch.h
  std::unique_ptr<Blas> blas;                 // null: our own GEMM
};

// Weights are placed in `slab`.
std::unique_ptr<Kernels> MakeCudaKernels(std::shared_ptr<Slab> slab, CudaKernelsOptions options);

}  // namespace spillway::cuda
