#pragma once

// The part of the emulation (cuda_emulation.h) that stands for kernels/cuda/wgmma.cuh; see there for what the functions
// mean. Products are made at the earliest and at the latest moment in turn, as asynchronous copies are.

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace spillway::emulation {

std::byte* SharedMemory();

// d = (adds ? d : 0) + a * b for this thread's part of d; `a` is in shared memory where a_registers is null, and then b
// is not transposed.
struct Product {
  DType type;
  int num_columns;
  float* d;
  const std::uint32_t* a_registers;
  std::uint64_t a;
  std::uint64_t b;
  bool adds;
};
void Multiply(const Product& product);
void CommitProducts();
void AwaitProducts(int pending);

}  // namespace spillway::emulation

namespace spillway::cuda {

template <int kRegisters>
void RaiseRegisters() {}
template <int kRegisters>
void LowerRegisters() {}
inline void BeginProducts() {}
inline void CommitProducts() { emulation::CommitProducts(); }
template <int kPending>
void AwaitProducts() {
  emulation::AwaitProducts(kPending);
}
template <int kCount>
void HoldRegisters(float (&/*values*/)[kCount]) {}

inline std::uint64_t DescribeMatrix(const std::byte* first, int next_rows, int next_columns) {
  return static_cast<std::uint64_t>(first - emulation::SharedMemory()) >> 4 |
         static_cast<std::uint64_t>(next_columns >> 4) << 16 | static_cast<std::uint64_t>(next_rows >> 4) << 32;
}
inline std::uint64_t Advance(std::uint64_t matrix, int num_bytes) {
  return matrix + static_cast<std::uint64_t>(num_bytes >> 4);
}
template <DType kType, int kColumns>
void MultiplyShared(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool adds) {
  emulation::Multiply({kType, kColumns, d, nullptr, a, b, adds});
}
template <DType kType, int kColumns>
void MultiplyRegisters(float (&d)[kColumns / 2], const std::uint32_t (&a)[4], std::uint64_t b) {
  emulation::Multiply({kType, kColumns, d, a, 0, b, true});
}

}  // namespace spillway::cuda
