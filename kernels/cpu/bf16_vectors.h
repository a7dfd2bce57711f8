#pragma once

// What attention over bf16 (attention_bf16.cc) does with vectors: 16 floats or 32 bf16, AVX-512 with BF16 instructions.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "kernels/exp2p.h"

// GCC 12 takes the deliberately undefined vectors of its own intrinsics for ours.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define SPILLWAY_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace spillway::cpu {

// Lanes [0, count) of a vector of 16; all of it from 16 on, none below 1.
inline __mmask16 FirstLanes(std::int64_t count) {
  if (count <= 0) return 0;
  return static_cast<__mmask16>(count >= 16 ? 0xffffU : (1U << count) - 1U);
}

// The first `count` of 32 words, then zeros.
SPILLWAY_AVX512_BF16 inline __m512i LoadWords(const std::uint16_t* from, std::int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1U << count) - 1U), from);
}

// Exp2p.
SPILLWAY_AVX512_BF16 inline __m512 Exp2(__m512 x) {
  const __mmask16 in_range = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kExp2Lowest), _CMP_GE_OQ);
  // Adding this leaves the nearest integer (half to even) in the low bits.
  const __m512 shift = _mm512_set1_ps(0x1.8p23F);
  const __m512 shifted = _mm512_add_ps(x, shift);
  const __m512 rest = _mm512_sub_ps(x, _mm512_sub_ps(shifted, shift));
  __m512 p = _mm512_set1_ps(kExp2Coefficients[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(kExp2Coefficients[i]));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_maskz_add_epi32(in_range, _mm512_castps_si512(p), exponent));
}

// 2^x for weights, which are rounded to bf16 right away: within 7.5e-5 of it, a twentieth of what the rounding costs.
SPILLWAY_AVX512_BF16 inline __m512 Exp2OfWeight(__m512 x) {
  constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 rest = _mm512_reduce_ps(x, kFloor);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0x1.3f96a6p-4F);
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0x1.cefc5p-3F));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0x1.64444ap-1F));
  p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(0x1.fff632p-1F));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// The 32-bit words [4 * quarter, + 4) of 16 rows, `stride` 16-bit words apart: columns[word][row].
struct Quarter {
  __m512i columns[4];
};
SPILLWAY_AVX512_BF16 inline Quarter TransposeQuarter(const std::uint16_t* from, std::int64_t stride, int quarter) {
  __m512i rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const std::uint16_t* const at = from + i * stride + 8 * quarter;
    const auto load = [](const std::uint16_t* p) { return reinterpret_cast<const __m128i*>(p); };
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128(load(at)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128(load(at + 4 * stride)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128(load(at + 8 * stride)), 2);
    rows[i] = _mm512_inserti32x4(v, _mm_loadu_si128(load(at + 12 * stride)), 3);
  }
  const __m512i low_01 = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const __m512i high_01 = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i low_23 = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i high_23 = _mm512_unpackhi_epi32(rows[2], rows[3]);
  return {{_mm512_unpacklo_epi64(low_01, low_23), _mm512_unpackhi_epi64(low_01, low_23),
           _mm512_unpacklo_epi64(high_01, high_23), _mm512_unpackhi_epi64(high_01, high_23)}};
}

// to[column][row] = the 32-bit words of 16 rows, `stride` 16-bit words apart.
SPILLWAY_AVX512_BF16 inline void TransposeTile(const std::uint16_t* from, std::int64_t stride, std::byte* to) {
#pragma GCC unroll 4
  for (int quarter = 0; quarter < 4; ++quarter) {
    const Quarter q = TransposeQuarter(from, stride, quarter);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm512_storeu_si512(to + quarter * 256 + i * 64, q.columns[i]);
  }
}

}  // namespace spillway::cpu

#endif
