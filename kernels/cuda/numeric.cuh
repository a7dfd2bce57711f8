#pragma once

// Arithmetic shared by the kernels, host and device alike so that tests reach it without a GPU. Every fused
// multiply-add is written as one (nvcc runs with -fmad=false, g++ with -ffp-contract=off).

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/exp2p.h"
#include "kernels/tensor.h"

#define SPILLWAY_HOST_DEVICE __host__ __device__ __forceinline__

namespace spillway::cuda {

inline constexpr float kInfinity = __builtin_huge_valf();

template <typename T>
SPILLWAY_HOST_DEVICE T MinOf(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
SPILLWAY_HOST_DEVICE T MaxOf(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
SPILLWAY_HOST_DEVICE T CeilDiv(T a, T b) {
  return (a + b - 1) / b;
}

// Exp2p of kernels/exp2p.h, operation for operation.
SPILLWAY_HOST_DEVICE float Exp2Polynomial(float x) {
  if (!(x >= kExp2Lowest)) return 0.0F;
  constexpr float c0 = kExp2Coefficients[0];
  constexpr float c1 = kExp2Coefficients[1];
  constexpr float c2 = kExp2Coefficients[2];
  constexpr float c3 = kExp2Coefficients[3];
  constexpr float c4 = kExp2Coefficients[4];
  constexpr float c5 = kExp2Coefficients[5];
  constexpr float c6 = kExp2Coefficients[6];
  const float n = rintf(x);
  const float f = x - n;
  float p = c6;
  p = fmaf(p, f, c5);
  p = fmaf(p, f, c4);
  p = fmaf(p, f, c3);
  p = fmaf(p, f, c2);
  p = fmaf(p, f, c1);
  p = fmaf(p, f, c0);
  return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) + static_cast<std::int32_t>(n) * (1 << 23));
}

// Elements of arrays as the language's types.
struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

SPILLWAY_HOST_DEVICE float Widen(float x) { return x; }
SPILLWAY_HOST_DEVICE float Widen(BF16 x) { return FloatFromBF16(x.bits); }
SPILLWAY_HOST_DEVICE float Widen(F16 x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return FloatFromF16(x.bits);
#endif
}
SPILLWAY_HOST_DEVICE void Narrow(float x, float* to) { *to = x; }
SPILLWAY_HOST_DEVICE void Narrow(float x, BF16* to) { to->bits = BF16FromFloat(x); }
SPILLWAY_HOST_DEVICE void Narrow(float x, F16* to) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  to->bits = F16FromFloat(x);
#endif
}

// Element `index` of an array.
SPILLWAY_HOST_DEVICE float LoadAs(const std::byte* array, DType dtype, std::int64_t index) {
  if (dtype == DType::kF32) return reinterpret_cast<const float*>(array)[index];
  return dtype == DType::kBF16 ? Widen(reinterpret_cast<const BF16*>(array)[index])
                               : Widen(reinterpret_cast<const F16*>(array)[index]);
}
SPILLWAY_HOST_DEVICE void StoreAs(std::byte* array, DType dtype, std::int64_t index, float value) {
  if (dtype == DType::kF32) {
    reinterpret_cast<float*>(array)[index] = value;
  } else if (dtype == DType::kBF16) {
    Narrow(value, reinterpret_cast<BF16*>(array) + index);
  } else {
    Narrow(value, reinterpret_cast<F16*>(array) + index);
  }
}

// How a segment's state (kernels/attention_state.h) joins the running one: running = running * a + segment * b.
struct MergeFactors {
  float running;  // a
  float segment;  // b
  float max;      // the new maximum
};
template <typename Exp2>
SPILLWAY_HOST_DEVICE MergeFactors MergeFactorsOf(float running_max, float segment_max, Exp2 exp2) {
  if (segment_max == -kInfinity) return {1.0F, 0.0F, running_max};  // no keys: nothing to add, and no NaN
  if (segment_max > running_max) return {exp2(running_max - segment_max), 1.0F, segment_max};
  return {1.0F, exp2(segment_max - running_max), running_max};
}
SPILLWAY_HOST_DEVICE float Merged(float running, float segment, const MergeFactors& factors) {
  return fmaf(segment, factors.segment, running * factors.running);
}
// No keys at all: zeros.
SPILLWAY_HOST_DEVICE float Normalizer(float sum) { return sum > 0 ? 1.0F / sum : 0.0F; }

}  // namespace spillway::cuda
