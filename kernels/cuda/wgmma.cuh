#pragma once

// Products of a warpgroup, four warps together (wgmma), and registers that warpgroups hand over. In machine code for
// sm_90a alone. PTX ISA 8.x is the source of every layout.
//
// For the emulation see intrinsics.cuh; there these functions come from tests/kernels/cuda_emulated_wgmma.h.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/tensor.h"

namespace spillway::cuda {

// 128-byte swizzle: in every 1,024 bytes that are so aligned, piece p (16 bytes) of 128-byte row r lies at piece p ^ r.
// So CopyBox writes and wgmma reads here.
inline constexpr int kSwizzledRows = 8;
inline constexpr int kSwizzledRowBytes = 128;
inline constexpr int kSwizzleBytes = kSwizzledRows * kSwizzledRowBytes;

#ifndef SPILLWAY_CUDA_EMULATION

// Registers of each thread of this warpgroup from now on.
template <int kRegisters>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Around what a group of products reads and writes: registers are the products' between Begin and the Await that ends
// their group.
__device__ __forceinline__ void BeginProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most kPending of this warp's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void AwaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The compiler moves no use of these across it.
template <int kCount>
__device__ __forceinline__ void HoldRegisters(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

#define SPILLWAY_FLOATS_8(d, i)                                                                                     \
  "+f"((d)[i]), "+f"((d)[(i) + 1]), "+f"((d)[(i) + 2]), "+f"((d)[(i) + 3]), "+f"((d)[(i) + 4]), "+f"((d)[(i) + 5]), \
      "+f"((d)[(i) + 6]), "+f"((d)[(i) + 7])
#define SPILLWAY_FLOATS_32(d, i) \
  SPILLWAY_FLOATS_8(d, i), SPILLWAY_FLOATS_8(d, (i) + 8), SPILLWAY_FLOATS_8(d, (i) + 16), SPILLWAY_FLOATS_8(d, (i) + 24)
#define SPILLWAY_FLOATS_40(d) SPILLWAY_FLOATS_32(d, 0), SPILLWAY_FLOATS_8(d, 32)
#define SPILLWAY_FLOATS_64(d) SPILLWAY_FLOATS_32(d, 0), SPILLWAY_FLOATS_32(d, 32)
#define SPILLWAY_NAMES_32                                                                                \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
  "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPILLWAY_NAMES_40 SPILLWAY_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define SPILLWAY_NAMES_64                                                                                            \
  SPILLWAY_NAMES_40                                                                                                  \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, " \
  "%62, %63"
// Operands after the accumulators: a, b, whether the accumulators are added to.
#define SPILLWAY_WGMMA_SHARED(columns, type, names, a, b, adds)                                                     \
  "{\n.reg .pred adds;\nsetp.ne.b32 adds, %" adds ", 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type \
  "." type " {" names "}, %" a ", %" b ", adds, 1, 1, 0, 0;\n}\n"
// The same with a in four registers and b transposed; always adds.
#define SPILLWAY_WGMMA_REGISTERS(columns, type, names, a0, a1, a2, a3, b)                                            \
  "{\n.reg .pred adds;\nsetp.eq.b32 adds, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type \
  " {" names "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b ", adds, 1, 1, 1;\n}\n"

// A matrix operand in shared memory, in 8 x 128-byte units of swizzled rows (kSwizzleBytes). `next_rows` is the
// distance from one unit to that of the next 8 rows. A row is an index of the result, 64 elements of the sum long; or,
// of a transposed operand, an index of the sum, 64 elements of the result long, and `next_columns` is the distance to
// the unit of the next 64.
__device__ __forceinline__ std::uint64_t DescribeMatrix(const std::byte* first, int next_rows, int next_columns) {
  const std::uint64_t address = (SharedAddress(first) & 0x3ffffU) >> 4;
  const std::uint64_t swizzle_128 = 1;
  return address | static_cast<std::uint64_t>(next_columns >> 4) << 16 |
         static_cast<std::uint64_t>(next_rows >> 4) << 32 | swizzle_128 << 62;
}
// The operand that begins so many bytes (a multiple of 16) further on.
__device__ __forceinline__ std::uint64_t Advance(std::uint64_t matrix, int num_bytes) {
  return matrix + static_cast<std::uint64_t>(num_bytes >> 4);
}

// d[64 x kColumns] = (adds ? d : 0) + a[64 x 16] * b[16 x kColumns] by a warpgroup; a and b from shared memory, rows of
// a and b along the sum. A thread holds of d what MultiplyAdd's holds, warp w rows [16w, 16w + 16): d[4j..4j+3] are
// columns 8j + 2 * (lane % 4) + {0, 1} of rows lane / 4 and lane / 4 + 8.
template <DType kType, int kColumns>
__device__ __forceinline__ void MultiplyShared(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool adds) {
  static_assert(kColumns == 80 || kColumns == 128);
  const int adds_word = adds ? 1 : 0;
  if constexpr (kColumns == 128 && kType == DType::kBF16) {
    asm volatile(SPILLWAY_WGMMA_SHARED("128", "bf16", SPILLWAY_NAMES_64, "64", "65", "66")
                 : SPILLWAY_FLOATS_64(d)
                 : "l"(a), "l"(b), "r"(adds_word));
  } else if constexpr (kColumns == 128) {
    asm volatile(SPILLWAY_WGMMA_SHARED("128", "f16", SPILLWAY_NAMES_64, "64", "65", "66")
                 : SPILLWAY_FLOATS_64(d)
                 : "l"(a), "l"(b), "r"(adds_word));
  } else if constexpr (kType == DType::kBF16) {
    asm volatile(SPILLWAY_WGMMA_SHARED("80", "bf16", SPILLWAY_NAMES_40, "40", "41", "42")
                 : SPILLWAY_FLOATS_40(d)
                 : "l"(a), "l"(b), "r"(adds_word));
  } else {
    asm volatile(SPILLWAY_WGMMA_SHARED("80", "f16", SPILLWAY_NAMES_40, "40", "41", "42")
                 : SPILLWAY_FLOATS_40(d)
                 : "l"(a), "l"(b), "r"(adds_word));
  }
}
// d += a * b with a in registers, as MultiplyAdd has it, and b transposed.
template <DType kType, int kColumns>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[kColumns / 2], const std::uint32_t (&a)[4],
                                                  std::uint64_t b) {
  static_assert(kColumns == 64 || kColumns == 128);
  if constexpr (kColumns == 128 && kType == DType::kBF16) {
    asm volatile(SPILLWAY_WGMMA_REGISTERS("128", "bf16", SPILLWAY_NAMES_64, "64", "65", "66", "67", "68")
                 : SPILLWAY_FLOATS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kColumns == 128) {
    asm volatile(SPILLWAY_WGMMA_REGISTERS("128", "f16", SPILLWAY_NAMES_64, "64", "65", "66", "67", "68")
                 : SPILLWAY_FLOATS_64(d)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else if constexpr (kType == DType::kBF16) {
    asm volatile(SPILLWAY_WGMMA_REGISTERS("64", "bf16", SPILLWAY_NAMES_32, "32", "33", "34", "35", "36")
                 : SPILLWAY_FLOATS_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile(SPILLWAY_WGMMA_REGISTERS("64", "f16", SPILLWAY_NAMES_32, "32", "33", "34", "35", "36")
                 : SPILLWAY_FLOATS_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

#undef SPILLWAY_FLOATS_8
#undef SPILLWAY_FLOATS_32
#undef SPILLWAY_FLOATS_40
#undef SPILLWAY_FLOATS_64
#undef SPILLWAY_NAMES_32
#undef SPILLWAY_NAMES_40
#undef SPILLWAY_NAMES_64
#undef SPILLWAY_WGMMA_SHARED
#undef SPILLWAY_WGMMA_REGISTERS

#endif  // SPILLWAY_CUDA_EMULATION

}  // namespace spillway::cuda
