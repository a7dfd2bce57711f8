#include "kernels/cpu/row_bodies.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/row_bodies.cc"
#include "hwy/foreach_target.h"
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace spillway::cpu::HWY_NAMESPACE {

// Calls body(offset, count) for each vector of an array; count < kLanes only in the last.
template <typename Body>
HWY_INLINE void ForVectors(std::int64_t size, Body body) {
  constexpr auto kStep = static_cast<std::int64_t>(kLanes);
  std::int64_t i = 0;
  for (; i + kStep <= size; i += kStep) body(i, kLanes);
  if (i < size) body(i, static_cast<std::size_t>(size - i));
}

template <typename T>
HWY_INLINE VF LoadSome(const T* from, std::size_t count) {
  return count == kLanes ? LoadWide(from) : LoadTail(from, count, 0);
}
template <typename T>
HWY_INLINE void StoreSome(VF v, std::size_t count, T* to) {
  if (count == kLanes) {
    StoreNarrow(v, to);
  } else {
    StoreTail(v, count, to);
  }
}

template <typename T>
void EmbedRow(const T* from, std::int64_t size, float* to) {
  ForVectors(size, [&](std::int64_t i, std::size_t count) { StoreSome(LoadSome(from + i, count), count, to + i); });
}

void Embed(const EmbedArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    const std::int64_t at = TokenAt(args, t) * args.table.row_stride;
    float* const out = args.out + t * args.table.cols;
    if (args.table.dtype == DType::kF32) {
      EmbedRow(reinterpret_cast<const float*>(args.table.data) + at, args.table.cols, out);
    } else {
      EmbedRow(reinterpret_cast<const std::uint16_t*>(args.table.data) + at, args.table.cols, out);
    }
  }
}

template <typename T>
void RmsNormRow(const float* x, const RmsNormArgs& args, T* out) {
  GroupSum squares;
  std::int64_t i = 0;
  for (; i < args.hidden; i += kGroup) {
    HWY_UNROLL(4)
    for (std::size_t v = 0; v < kVectors; ++v) {
      const std::int64_t at = i + static_cast<std::int64_t>(v * kLanes);
      const std::int64_t rest = args.hidden - at;
      if (rest <= 0) break;
      const VF value =
          LoadSome(x + at, rest < static_cast<std::int64_t>(kLanes) ? static_cast<std::size_t>(rest) : kLanes);
      squares.lanes[v] = Fma(value, value, squares.lanes[v]);
    }
  }
  const float mean = squares.Total() / static_cast<float>(args.hidden);
  const VF scale = hn::Set(F(), 1.0F / std::sqrt(mean + args.epsilon));
  ForVectors(args.hidden, [&](std::int64_t at, std::size_t count) {
    const VF scaled = hn::Mul(LoadSome(x + at, count), scale);
    StoreSome(hn::Mul(scaled, LoadSome(args.weight + at, count)), count, out + at);
  });
}

void RmsNorm(const RmsNormArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    const float* const x = args.x + (args.rows != nullptr ? args.rows[t] : t) * args.hidden;
    if (args.out_dtype == DType::kF32) {
      RmsNormRow(x, args, reinterpret_cast<float*>(args.out) + t * args.hidden);
    } else {
      RmsNormRow(x, args, reinterpret_cast<std::uint16_t*>(args.out) + t * args.hidden);
    }
  }
}

// (first, second) half of a head -> (first * cos - second * sin, second * cos + first * sin).
template <typename T>
void RotateHead(const float* x, const float* cos_sin, std::int64_t half, T* out) {
  ForVectors(half, [&](std::int64_t i, std::size_t count) {
    const VF first = LoadSome(x + i, count);
    const VF second = LoadSome(x + half + i, count);
    const VF cos = LoadSome(cos_sin + i, count);
    const VF sin = LoadSome(cos_sin + half + i, count);
    StoreSome(Fma(first, cos, hn::Neg(hn::Mul(second, sin))), count, out + i);
    StoreSome(Fma(second, cos, hn::Mul(first, sin)), count, out + half + i);
  });
}

template <typename T>
void AppendRow(const float* k, const float* v, const float* cos_sin, std::int64_t dim, T* row) {
  RotateHead(k, cos_sin, dim / 2, row);
  ForVectors(dim, [&](std::int64_t i, std::size_t count) { StoreSome(LoadSome(v + i, count), count, row + dim + i); });
}

void RopeAppend(const RopeAppendArgs& args, std::int64_t begin, std::int64_t end) {
  const KvLayout& layout = args.kv.layout;
  const std::int64_t dim = layout.head_dim;
  for (std::int64_t t = begin; t < end; ++t) {
    const float* const qkv = args.qkv + t * (args.num_heads + 2 * layout.num_kv_heads) * dim;
    const float* const cos_sin = args.cos_sin + t * dim;
    for (std::int64_t h = 0; h < args.num_heads; ++h) {
      const std::int64_t at = (t * args.num_heads + h) * dim;
      if (args.q_dtype == DType::kF32) {
        RotateHead(qkv + h * dim, cos_sin, dim / 2, reinterpret_cast<float*>(args.q) + at);
      } else {
        RotateHead(qkv + h * dim, cos_sin, dim / 2, reinterpret_cast<std::uint16_t*>(args.q) + at);
      }
    }
    if (args.blocks[t] == kNoBlock) continue;
    std::byte* const block = args.kv.pool + static_cast<std::size_t>(args.blocks[t]) * layout.block_bytes();
    for (int h = 0; h < layout.num_kv_heads; ++h) {
      std::byte* const row = block + layout.strip_offset(args.layer, h) +
                             static_cast<std::size_t>(args.positions[t] % kBlockTokens) * layout.row_bytes();
      const float* const k = qkv + (args.num_heads + h) * dim;
      const float* const v = k + layout.num_kv_heads * dim;
      if (layout.dtype == DType::kF32) {
        AppendRow(k, v, cos_sin, dim, reinterpret_cast<float*>(row));
      } else {
        AppendRow(k, v, cos_sin, dim, reinterpret_cast<std::uint16_t*>(row));
      }
    }
  }
}

template <typename T>
void SiluMulRow(const float* gate, const float* up, std::int64_t size, T* out) {
  ForVectors(size, [&](std::int64_t i, std::size_t count) {
    StoreSome(SiluMul(LoadSome(gate + i, count), LoadSome(up + i, count)), count, out + i);
  });
}

void SiluMul(const SiluMulArgs& args, std::int64_t begin, std::int64_t end) {
  for (std::int64_t t = begin; t < end; ++t) {
    const float* const gate = args.gate_up + t * 2 * args.inner;
    if (args.out_dtype == DType::kF32) {
      SiluMulRow(gate, gate + args.inner, args.inner, reinterpret_cast<float*>(args.out) + t * args.inner);
    } else {
      SiluMulRow(gate, gate + args.inner, args.inner, reinterpret_cast<std::uint16_t*>(args.out) + t * args.inner);
    }
  }
}

constexpr RowBodies kRowBodies = {Embed, RmsNorm, RopeAppend, SiluMul};

}  // namespace spillway::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/cpu/choose_target.h"

namespace spillway::cpu {

const RowBodies& RowBodiesOf(Target target) { SPILLWAY_CHOOSE_TARGET(target, kRowBodies) }

}  // namespace spillway::cpu
#endif  // HWY_ONCE
