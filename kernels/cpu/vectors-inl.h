// Vector helpers that the bodies share. Compiled once per target, hence no #pragma once.
//
// Every function gives the same bits on every target: multiply-adds are fused everywhere, and what is summed is summed
// in kGroup virtual lanes, whatever the real width.

#if defined(SPILLWAY_KERNELS_CPU_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef SPILLWAY_KERNELS_CPU_VECTORS_INL_H_
#undef SPILLWAY_KERNELS_CPU_VECTORS_INL_H_
#else
#define SPILLWAY_KERNELS_CPU_VECTORS_INL_H_
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/exp2p.h"
#include "kernels/tensor.h"

HWY_BEFORE_NAMESPACE();
namespace spillway::cpu::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr std::size_t kGroup = 16;

using F = hn::CappedTag<float, kGroup>;
using U = hn::RebindToUnsigned<F>;
using I = hn::RebindToSigned<F>;
using Half = hn::Rebind<std::uint16_t, F>;
using VF = hn::Vec<F>;
using VU = hn::Vec<U>;
inline constexpr std::size_t kLanes = hn::MaxLanes(F());
inline constexpr std::size_t kVectors = kGroup / kLanes;  // per group

HWY_INLINE VF Fma(VF a, VF b, VF c) {
#if HWY_TARGET == HWY_SCALAR
  return hn::Set(F(), std::fma(hn::GetLane(a), hn::GetLane(b), hn::GetLane(c)));
#else
  return hn::MulAdd(a, b, c);
#endif
}

HWY_INLINE VF LoadWide(const float* from) { return hn::LoadU(F(), from); }
HWY_INLINE VF LoadWide(const std::uint16_t* from) {
  return hn::BitCast(F(), hn::ShiftLeft<16>(hn::PromoteTo(U(), hn::LoadU(Half(), from))));
}

HWY_INLINE void StoreNarrow(VF v, float* to) { hn::StoreU(v, F(), to); }
// As BF16FromFloat.
HWY_INLINE void StoreNarrow(VF v, std::uint16_t* to) {
  const U u;
  const VU bits = hn::BitCast(u, v);
  const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(u, 1));
  const VU rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(u, 0x7fff)), odd));
  const VU nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(u, 0x40));
  const VU chosen = hn::IfThenElse(hn::RebindMask(u, hn::Eq(v, v)), rounded, nan);
  hn::StoreU(hn::DemoteTo(Half(), hn::BitCast(I(), chosen)), Half(), to);
}

HWY_INLINE float Widen(float value) { return value; }
HWY_INLINE float Widen(std::uint16_t value) { return FloatFromBF16(value); }
HWY_INLINE void Narrow(float value, float* to) { *to = value; }
HWY_INLINE void Narrow(float value, std::uint16_t* to) { *to = BF16FromFloat(value); }

// The last, short vector of an array: `count` elements, then `fill`.
template <typename T>
HWY_INLINE VF LoadTail(const T* from, std::size_t count, float fill) {
  HWY_ALIGN float lanes[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = i < count ? Widen(from[i]) : fill;
  return hn::Load(F(), lanes);
}
template <typename T>
HWY_INLINE void StoreTail(VF v, std::size_t count, T* to) {
  HWY_ALIGN float lanes[kLanes];
  hn::Store(v, F(), lanes);
  for (std::size_t i = 0; i < count; ++i) Narrow(lanes[i], to + i);
}

// Exp2p of kernels/exp2p.h.
HWY_INLINE VF Exp2(VF x) {
  const F f;
  const auto in_range = hn::Ge(x, hn::Set(f, kExp2Lowest));
  x = hn::IfThenElseZero(in_range, x);
  const VF n = hn::Round(x);
  const VF rest = hn::Sub(x, n);
  VF p = hn::Set(f, kExp2Coefficients[6]);
  for (int i = 5; i >= 0; --i) p = Fma(p, rest, hn::Set(f, kExp2Coefficients[i]));
  const auto raised = hn::Add(hn::BitCast(I(), p), hn::ShiftLeft<23>(hn::ConvertTo(I(), n)));
  return hn::IfThenElseZero(in_range, hn::BitCast(f, raised));
}

// silu(gate) * up
HWY_INLINE VF SiluMul(VF gate, VF up) {
  const F f;
  const VF one = hn::Set(f, 1.0F);
  // e = exp(-|x|), so that nothing overflows; sigmoid(x) is 1 / (1 + e) or e / (1 + e) by sign.
  const VF e = Exp2(hn::Mul(hn::Abs(gate), hn::Set(f, -kLog2E)));
  const VF top = hn::IfThenElse(hn::Lt(gate, hn::Zero(f)), e, one);
  const VF silu = hn::Mul(gate, hn::Div(top, hn::Add(one, e)));
  return hn::Mul(silu, up);
}

// kGroup running sums, and their total in a fixed order.
struct GroupSum {
  VF lanes[kVectors];

  HWY_INLINE GroupSum() {
    for (VF& v : lanes) v = hn::Zero(F());
  }
  HWY_INLINE float Total() const {
    HWY_ALIGN float values[kGroup];
    for (std::size_t i = 0; i < kVectors; ++i) hn::Store(lanes[i], F(), values + i * kLanes);
    for (std::size_t width = kGroup / 2; width > 0; width /= 2) {
      for (std::size_t i = 0; i < width; ++i) values[i] += values[i + width];
    }
    return values[0];
  }
};

}  // namespace spillway::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
