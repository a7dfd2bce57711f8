#pragma once

// The instructions that C++ has no name for, one function each, and Launch. PTX ISA 8.x is the source of every layout.
//
// Tests compile the same kernels with g++ for a host-side emulation of a CUDA block (tests/kernels/cuda_emulation.h,
// force-included): there SPILLWAY_CUDA_EMULATION is defined and these functions come from that header.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace spillway::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffU;

#ifndef SPILLWAY_CUDA_EMULATION

// The block's dynamic shared memory, 1024-byte aligned.
__device__ __forceinline__ std::byte* DynamicShared() {
  extern __shared__ __align__(1024) std::byte dynamic_shared[];
  return dynamic_shared;
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the address (16 bytes, aligned) of row l % 8 of matrix l / 8;
// out[i] of lane l holds elements (row l / 4, columns 2 * (l % 4) and + 1) of matrix i.
__device__ __forceinline__ void LoadMatrices(std::uint32_t (&out)[4], const std::byte* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}
// The same, each matrix transposed.
__device__ __forceinline__ void LoadMatricesTransposed(std::uint32_t (&out)[4], const std::byte* row) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// c[16 x 8] += a[16 x 16] * b[16 x 8], BF16 or F16 with float accumulation. With g = lane / 4, t = lane % 4:
//   a[0] (g, 2t)  a[1] (g + 8, 2t)  a[2] (g, 2t + 8)  a[3] (g + 8, 2t + 8)   two columns each
//   b0 (2t, g)  b1 (2t + 8, g)   two rows each
//   c[0], c[1] (g, 2t), (g, 2t + 1)   c[2], c[3] (g + 8, ...)
template <DType kType>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                            std::uint32_t b1) {
  if constexpr (kType == DType::kBF16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two floats as BF16 or F16, rounded to nearest even, the first in the low half.
template <DType kType>
__device__ __forceinline__ std::uint32_t PackPair(float low, float high) {
  std::uint32_t packed;
  if constexpr (kType == DType::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// 2^x by the special function unit, within 2 ulp; 2^0 = 1 and 2^-inf = 0 exactly.
__device__ __forceinline__ float Exp2Hardware(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16 bytes from global to shared memory, in the background; zeros where `is_valid` is false (`from` is then not read).
__device__ __forceinline__ void CopyAsync(std::byte* to, const std::byte* from, bool is_valid) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  const int size = is_valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(size) : "memory");
}
__device__ __forceinline__ void CopyAsync(std::byte* to, const std::byte* from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void CopyAsync(float& to, const float& from) {
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(&to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(&from) : "memory");
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending of this thread's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void AwaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// threadIdx.x, read anew: what is computed from it is computed again too, not kept in registers across a loop.
__device__ __forceinline__ int ThreadAnew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// 16 bytes that are read once and belong in no L1.
__device__ __forceinline__ uint4 LoadOnce(const std::byte* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), unsigned num_ctas, unsigned num_threads, std::size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_ctas);
  config.blockDim = dim3(num_threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

#endif  // SPILLWAY_CUDA_EMULATION

// A block of more than 48 KiB of shared memory has to be allowed once per kernel and device. The kernel's static arrays
// count too: 16 KiB is left for them.
template <typename... Params>
cudaError_t AllowShared(void (*kernel)(Params...), std::size_t shared_bytes) {
  if (shared_bytes <= std::size_t{32} << 10) return cudaSuccess;
  const auto* const function = reinterpret_cast<const void*>(kernel);
  const cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  // As many blocks as fit: what L1 would keep is read once.
  return cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

}  // namespace spillway::cuda
