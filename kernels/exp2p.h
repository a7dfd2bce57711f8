#pragma once

// The exponential that all devices share (docs/sampling.md): 2^x for x <= 0 as a fixed sequence of float operations.

#include <bit>
#include <cmath>
#include <cstdint>

namespace spillway {

// Coefficients of the polynomial, lowest first.
inline constexpr float kExp2Coefficients[7] = {1.0F,           0.693147182F,   0.240226507F,   0.0555041087F,
                                               0.00961812911F, 0.00133335581F, 0.000154035303F};

inline constexpr float kLog2E = 1.44269504F;

// Below this the result would be subnormal; it is 0 instead.
inline constexpr float kExp2Lowest = -126.0F;

// x <= 0. The only rounding to an integer is half to even, which nearbyint does in the default rounding mode.
inline float Exp2p(float x) {
  if (!(x >= kExp2Lowest)) return 0.0F;
  const float n = std::nearbyint(x);
  const float f = x - n;
  float p = kExp2Coefficients[6];
  for (int i = 5; i >= 0; --i) p = std::fma(p, f, kExp2Coefficients[i]);
  return std::bit_cast<float>(std::bit_cast<std::int32_t>(p) + static_cast<std::int32_t>(n) * (1 << 23));
}

}  // namespace spillway
