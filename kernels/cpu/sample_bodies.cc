#include <limits>

#include "kernels/cpu/sample.h"
#include "kernels/sampler.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sample_bodies.cc"
#include "hwy/foreach_target.h"
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace spillway::cpu::HWY_NAMESPACE {

inline constexpr float kNothing = -std::numeric_limits<float>::infinity();
inline constexpr auto kStep = static_cast<std::int64_t>(kLanes);

// Calls body(offset, vector) over a row; lanes behind its end are NaN, which no comparison accepts.
template <typename Body>
HWY_INLINE void ForLogits(const float* logits, std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t i = begin;
  for (; i + kStep <= end; i += kStep) body(i, hn::LoadU(F(), logits + i));
  if (i < end) {
    body(i, LoadTail(logits + i, static_cast<std::size_t>(end - i), std::numeric_limits<float>::quiet_NaN()));
  }
}

float Max(const float* logits, std::int64_t size) {
  VF max = hn::Set(F(), kNothing);
  ForLogits(logits, 0, size, [&](std::int64_t /*offset*/, VF v) { max = hn::IfThenElse(hn::Gt(v, max), v, max); });
  return hn::GetLane(hn::MaxOfLanes(F(), max));
}

std::int64_t FirstEqual(const float* logits, std::int64_t size, float value) {
  const VF wanted = hn::Set(F(), value);
  std::int64_t i = 0;
  while (i + kStep <= size && hn::AllFalse(F(), hn::Eq(hn::LoadU(F(), logits + i), wanted))) i += kStep;
  while (i < size && logits[i] != value) ++i;
  return i;
}

std::int64_t CountAtLeast(const float* logits, std::int64_t size, float threshold) {
  const VF wanted = hn::Set(F(), threshold);
  std::size_t count = 0;
  ForLogits(logits, 0, size, [&](std::int64_t /*offset*/, VF v) { count += hn::CountTrue(F(), hn::Ge(v, wanted)); });
  return static_cast<std::int64_t>(count);
}

std::int64_t CountAbove(const float* logits, std::int64_t size, float threshold) {
  const VF wanted = hn::Set(F(), threshold);
  std::size_t count = 0;
  ForLogits(logits, 0, size, [&](std::int64_t /*offset*/, VF v) { count += hn::CountTrue(F(), hn::Gt(v, wanted)); });
  return static_cast<std::int64_t>(count);
}

// 64-bit sum of 32-bit lanes.
#if HWY_TARGET == HWY_SCALAR
struct WideSum {
  std::uint64_t total = 0;

  HWY_INLINE void Add(VU v) { total += hn::GetLane(v); }
  HWY_INLINE std::uint64_t Total() const { return total; }
};
#else
struct WideSum {
  using Wide = hn::Repartition<std::uint64_t, U>;
  hn::Vec<Wide> even;
  hn::Vec<Wide> odd;

  HWY_INLINE WideSum() : even(hn::Zero(Wide())), odd(hn::Zero(Wide())) {}

  HWY_INLINE void Add(VU v) {
    const auto pairs = hn::BitCast(Wide(), v);
    even = hn::Add(even, hn::And(pairs, hn::Set(Wide(), 0xffffffffU)));
    odd = hn::Add(odd, hn::ShiftRight<32>(pairs));
  }
  HWY_INLINE std::uint64_t Total() const {
    HWY_ALIGN std::uint64_t lanes[kLanes];
    hn::Store(hn::Add(even, odd), Wide(), lanes);
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < hn::MaxLanes(Wide()); ++i) total += lanes[i];
    return total;
  }
};
#endif

std::uint64_t WeightAtLeast(const float* logits, const std::uint32_t* weights, std::int64_t size, float threshold) {
  const VF wanted = hn::Set(F(), threshold);
  WideSum sum;
  std::int64_t i = 0;
  for (; i + kStep <= size; i += kStep) {
    const auto is_kept = hn::RebindMask(U(), hn::Ge(hn::LoadU(F(), logits + i), wanted));
    sum.Add(hn::IfThenElseZero(is_kept, hn::LoadU(U(), weights + i)));
  }
  std::uint64_t total = sum.Total();
  for (; i < size; ++i) {
    if (logits[i] >= threshold) total += weights[i];
  }
  return total;
}

std::int64_t CollectAtLeast(const float* logits, std::int64_t size, float threshold, std::int32_t* ids) {
  const VF wanted = hn::Set(F(), threshold);
  std::int64_t count = 0;
  ForLogits(logits, 0, size, [&](std::int64_t offset, VF v) {
    const auto is_kept = hn::Ge(v, wanted);
    if (hn::AllFalse(F(), is_kept)) return;
    std::uint8_t bits[8] = {};
    hn::StoreMaskBits(F(), is_kept, bits);
    std::uint32_t rest = bits[0] | std::uint32_t{bits[1]} << 8;
    for (; rest != 0; rest &= rest - 1) ids[count++] = static_cast<std::int32_t>(offset) + __builtin_ctz(rest);
  });
  return count;
}

void Weigh(const float* logits, std::int64_t size, float max, float scale, float lowest_distance,
           std::uint32_t* weights, std::uint64_t* block_sums) {
  const F f;
  const U u;
  const VF top = hn::Set(f, max);
  const VF lowest = hn::Set(f, lowest_distance);
  for (std::int64_t begin = 0; begin < size; begin += kWeightBlock) {
    WideSum sum;
    const std::int64_t end = begin + kWeightBlock < size ? begin + kWeightBlock : size;
    ForLogits(logits, begin, end, [&](std::int64_t offset, VF logit) {
      const VF scaled = hn::Mul(hn::Sub(logit, top), hn::Set(f, scale));
      const VF distance = hn::IfThenElse(hn::Eq(logit, top), hn::Zero(f), scaled);
      const VU bits = hn::BitCast(u, Exp2(distance));
      // The float 1.m * 2^-e in 31 fractional bits: its 24-bit mantissa, shifted.
      const VU mantissa = hn::Or(hn::And(bits, hn::Set(u, 0x7fffffU)), hn::Set(u, 0x800000U));
      const VU right = hn::Min(hn::Sub(hn::Set(u, 127), hn::ShiftRight<23>(bits)), hn::Set(u, 31));
      const VU fixed = hn::Shr(hn::ShiftLeft<8>(mantissa), right);
      const VU weight = hn::IfThenElseZero(hn::RebindMask(u, hn::Ge(distance, lowest)), fixed);
      sum.Add(weight);
      if (offset + kStep <= size) {
        hn::StoreU(weight, u, weights + offset);
      } else {
        HWY_ALIGN std::uint32_t lanes[kLanes];
        hn::Store(weight, u, lanes);
        for (std::int64_t i = offset; i < size; ++i) weights[i] = lanes[i - offset];
      }
    });
    block_sums[begin / kWeightBlock] = sum.Total();
  }
}

double SumExp(const float* logits, std::int64_t size, float max) {
  const VF top = hn::Set(F(), max);
  double total = 0;
  for (std::int64_t begin = 0; begin < size; begin += kWeightBlock) {
    const std::int64_t end = begin + kWeightBlock < size ? begin + kWeightBlock : size;
    VF sum = hn::Zero(F());
    // NaN is out of Exp2's range and adds 0.
    ForLogits(logits, begin, end, [&](std::int64_t /*offset*/, VF v) {
      sum = hn::Add(sum, Exp2(hn::Mul(hn::Sub(v, top), hn::Set(F(), kLog2E))));
    });
    total += hn::GetLane(hn::SumOfLanes(F(), sum));
  }
  return total;
}

constexpr SampleBodies kSampleBodies = {Max,           FirstEqual,     CountAtLeast, CountAbove,
                                        WeightAtLeast, CollectAtLeast, Weigh,        SumExp};

}  // namespace spillway::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/cpu/choose_target.h"

namespace spillway::cpu {

const SampleBodies& SampleBodiesOf(Target target) { SPILLWAY_CHOOSE_TARGET(target, kSampleBodies) }

}  // namespace spillway::cpu
#endif  // HWY_ONCE
