#pragma once

// The arithmetic of INT8 matrices, the same on every implementation, to the bit.
//
// A row x, of weights (one output) or of activations (one token), is kept as integers q[i] = x[i] * inverse, rounded to
// nearest with ties to even, so |q[i]| <= 127, and one scale. An output is
//   float(sum over k of q_a[k] * q_w[k]) * scale_a * scale_w (+ bias)
// from left to right. The sum is exact in 32 bits, so its order does not matter.

#include <cstdint>

namespace spillway {

struct Int8Scale {
  float scale = 0;
  float inverse = 0;
};

// Of a row whose largest magnitude is `max`. A row of (almost) zeros becomes zeros.
constexpr Int8Scale Int8ScaleOf(float max) {
  constexpr float kLeast = 1e-30F;
  return max < kLeast ? Int8Scale{} : Int8Scale{max / 127.0F, 127.0F / max};
}

// So that sums stay exact in 32 bits, with weights offset to 0 ... 255.
inline constexpr std::int64_t kMaxInt8Depth = 65536;

}  // namespace spillway
