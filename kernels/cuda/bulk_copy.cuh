#pragma once

// Copies from global to shared memory by the copy engine of compute capability 9.0 and newer, one thread each, and the
// barriers in shared memory that tell when they have come. Code for older devices compiles, and traps.
//
// A phase of a barrier is over once its number of threads have arrived and every byte that was announced is there; then
// the next begins. Phases count from 0, and AwaitPhase takes the parity of one of the last two.
//
// Copies are ordered with the block's own accesses by its barriers (__syncthreads), but for one: whoever has written
// shared memory that a later copy overwrites, or that a copy or a matrix instruction reads, first calls FenceShared.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/intrinsics.cuh"

namespace spillway::cuda {

#ifndef SPILLWAY_CUDA_EMULATION

// 8-byte aligned, in shared memory.
using Barrier = std::uint64_t;

__device__ __forceinline__ std::uint32_t SharedAddress(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define SPILLWAY_SM90_ASM(...) __trap()
#else
#define SPILLWAY_SM90_ASM(...) asm volatile(__VA_ARGS__)
#endif

// By one thread, before a barrier of the block that comes before every other use.
__device__ __forceinline__ void InitBarrier(Barrier& barrier, int num_arrivals) {
  SPILLWAY_SM90_ASM(
      "mbarrier.init.shared::cta.b64 [%0], %1;\n\tfence.mbarrier_init.release.cluster;" ::"r"(SharedAddress(&barrier)),
      "r"(num_arrivals)
      : "memory");
}
__device__ __forceinline__ void Arrive(Barrier& barrier) {
  SPILLWAY_SM90_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(&barrier)) : "memory");
}
// Arrives, and announces bytes for the phase that this arrival is of.
__device__ __forceinline__ void ArriveExpecting(Barrier& barrier, int num_bytes) {
  SPILLWAY_SM90_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(&barrier)),
                    "r"(num_bytes)
                    : "memory");
}
// Until the phase is over; what was copied is then seen by the caller.
__device__ __forceinline__ void AwaitPhase(Barrier& barrier, int parity) {
  SPILLWAY_SM90_ASM(
      "{\n\t.reg .pred over;\n\tagain:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n\t"
      "@!over bra again;\n\t}" ::"r"(SharedAddress(&barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void FenceShared() { SPILLWAY_SM90_ASM("fence.proxy.async.shared::cta;" ::: "memory"); }

// num_bytes (a multiple of 16) from global memory; both addresses 16-byte aligned.
__device__ __forceinline__ void CopyBulk(std::byte* to, const std::byte* from, int num_bytes, Barrier& barrier) {
  SPILLWAY_SM90_ASM("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                        SharedAddress(to)),
                    "l"(from), "r"(num_bytes), "r"(SharedAddress(&barrier))
                    : "memory");
}
// So that the first copy by it does not wait for it.
__device__ __forceinline__ void PrefetchMap(const CUtensorMap& map) {
  SPILLWAY_SM90_ASM("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The box of a tensor (tensor_map.h) at {0, 0, third, fourth}: of EncodeStrips's, that of strip `fourth` which begins
// at column `third` of 128 bytes. Zeros, where it is outside; all of its bytes are announced and come in any case.
// `map` is a __grid_constant__ parameter of the kernel, `to` 1024-byte aligned.
__device__ __forceinline__ void CopyBox(std::byte* to, const CUtensorMap& map, int fourth, int third,
                                        Barrier& barrier) {
  SPILLWAY_SM90_ASM(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %2, %3, %4}], "
      "[%5];" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(0), "r"(third), "r"(fourth), "r"(SharedAddress(&barrier))
      : "memory");
}
// The same, of what is read once: it is the first to leave L2.
__device__ __forceinline__ void CopyBoxOnce(std::byte* to, const CUtensorMap& map, int fourth, int third,
                                            Barrier& barrier) {
  SPILLWAY_SM90_ASM(
      "{\n\t.reg .b64 policy;\n\t"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n\t"
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %2, %3, %4}], [%5], policy;\n\t}" ::"r"(SharedAddress(to)),
      "l"(&map), "r"(0), "r"(third), "r"(fourth), "r"(SharedAddress(&barrier))
      : "memory");
}

#undef SPILLWAY_SM90_ASM

#endif  // SPILLWAY_CUDA_EMULATION

}  // namespace spillway::cuda
