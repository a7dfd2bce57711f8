#pragma once

// The partial state of attention over a set of keys, and how two sets become one.
//
// For keys K: max = the largest score, sum = sum of 2^(score - max), out = sum of 2^(score - max) * value. Scores are
// in units of log2. A row's result is out / sum over all its keys. Every segment of kSegmentTokens positions is
// computed as a state of its own and merged into the running one in position order, the first too: so the bits do not
// depend on where a segment came from or in how many calls it was read.

#include <limits>

namespace spillway {

// `out` is head_dim floats of the caller's. Empty: max is minus infinity, sum and out are 0.
struct AttentionState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0;
  float* out = nullptr;
};

// What is multiplied and added, by the SIMD target at hand:
//   float Exp2(float x)                                                  Exp2p
//   void ScaleAdd(float* running, float a, const float* segment, float b)   running[i] = fma(segment[i], b, running[i]
//   * a) void Scale(const float* out, float factor)                           hands out[i] * factor to the caller
template <typename Arithmetic>
void MergeAttentionState(Arithmetic& arithmetic, const AttentionState& segment, AttentionState& running) {
  if (segment.max == -std::numeric_limits<float>::infinity()) return;  // no keys: nothing to add, and no NaN
  const bool is_higher = segment.max > running.max;
  const float max = is_higher ? segment.max : running.max;
  // The higher one's factor is Exp2(0) = 1; an empty running state has factor 0.
  const float a = is_higher ? arithmetic.Exp2(running.max - max) : 1.0F;
  const float b = is_higher ? 1.0F : arithmetic.Exp2(segment.max - max);
  running.sum = running.sum * a + segment.sum * b;
  arithmetic.ScaleAdd(running.out, a, segment.out, b);
  running.max = max;
}

// No keys at all: zeros.
template <typename Arithmetic>
void NormalizeAttentionState(Arithmetic& arithmetic, const AttentionState& state) {
  arithmetic.Scale(state.out, state.sum > 0 ? 1.0F / state.sum : 0.0F);
}

}  // namespace spillway
