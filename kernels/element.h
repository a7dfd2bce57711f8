#pragma once

// One element of an array whose dtype is known at run time.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/tensor.h"

namespace spillway {

inline float LoadElement(const std::byte* array, DType dtype, std::int64_t index) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, array + index * 4, sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, array + index * 2, sizeof(bits));
  return dtype == DType::kBF16 ? FloatFromBF16(bits) : FloatFromF16(bits);
}

inline void StoreElement(std::byte* array, DType dtype, std::int64_t index, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(array + index * 4, &value, sizeof(value));
    return;
  }
  const std::uint16_t bits = dtype == DType::kBF16 ? BF16FromFloat(value) : F16FromFloat(value);
  std::memcpy(array + index * 2, &bits, sizeof(bits));
}

}  // namespace spillway
