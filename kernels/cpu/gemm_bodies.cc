#include <algorithm>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_dot.h"
#include "kernels/int8.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/gemm_bodies.cc"
#include "hwy/foreach_target.h"
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace spillway::cpu::HWY_NAMESPACE {

// Registers decide: a tile of kRowsPerBlock rows x 2 vectors of sums, 2 of weights and 1 of activations.
#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_NEON
inline constexpr int kRowsPerBlock = 12;
#elif HWY_TARGET == HWY_AVX2
inline constexpr int kRowsPerBlock = 6;
#else
inline constexpr int kRowsPerBlock = 2;
#endif

// Between two cuts of k sums rest in memory: the piece of a panel that all blocks of rows then read, one after the
// other, stays in the first-level cache.
template <typename W>
inline constexpr std::int64_t kDepthPerPass = 32768 / (kPanelColumns * static_cast<std::int64_t>(sizeof(W)));

// Bytes a stream of weights is fetched ahead.
inline constexpr std::int64_t kPrefetchBytes = 1024;

// The two vectors of weights of word group `group` at one k: columns [group * kLanes, + kLanes) of each half panel.
HWY_INLINE void LoadWeights(const float* at, std::size_t group, VF& low, VF& high) {
  low = hn::LoadU(F(), at + group * kLanes);
  high = hn::LoadU(F(), at + kGroup + group * kLanes);
}
HWY_INLINE void LoadWeights(const std::uint16_t* at, std::size_t group, VF& low, VF& high) {
  const VU words = hn::LoadU(U(), reinterpret_cast<const std::uint32_t*>(at) + group * kLanes);
  low = hn::BitCast(F(), hn::ShiftLeft<16>(words));
  high = hn::BitCast(F(), hn::And(words, hn::Set(U(), 0xffff0000U)));
}

// sums[row][panel][32] (+)= a[k][row] * panel[k][32] for k in [0, depth).
template <int kRows, int kPanels, typename W>
HWY_INLINE void Tile(const float* HWY_RESTRICT a, const W* HWY_RESTRICT panels, std::int64_t panel_stride,
                     std::int64_t depth, bool is_first, float* HWY_RESTRICT sums, std::int64_t sums_stride) {
  for (std::size_t group = 0; group < kVectors; ++group) {
    VF low[kRows][kPanels];
    VF high[kRows][kPanels];
    HWY_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(4)
      for (int p = 0; p < kPanels; ++p) {
        const float* const at = sums + r * sums_stride + p * kPanelColumns + group * kLanes;
        low[r][p] = is_first ? hn::Zero(F()) : hn::LoadU(F(), at);
        high[r][p] = is_first ? hn::Zero(F()) : hn::LoadU(F(), at + kGroup);
      }
    }
    for (std::int64_t k = 0; k < depth; ++k) {
      HWY_UNROLL(4)
      for (int p = 0; p < kPanels; ++p) {
        const W* const at = panels + p * panel_stride + k * kPanelColumns;
        if (kRows <= 4) hwy::Prefetch(reinterpret_cast<const std::byte*>(at) + kPrefetchBytes);
        VF weights_low;
        VF weights_high;
        LoadWeights(at, group, weights_low, weights_high);
        HWY_UNROLL(12)
        for (int r = 0; r < kRows; ++r) {
          const VF value = hn::Set(F(), a[k * kRows + r]);
          low[r][p] = Fma(value, weights_low, low[r][p]);
          high[r][p] = Fma(value, weights_high, high[r][p]);
        }
      }
    }
    HWY_UNROLL(12)
    for (int r = 0; r < kRows; ++r) {
      HWY_UNROLL(4)
      for (int p = 0; p < kPanels; ++p) {
        float* const at = sums + r * sums_stride + p * kPanelColumns + group * kLanes;
        hn::StoreU(low[r][p], F(), at);
        hn::StoreU(high[r][p], F(), at + kGroup);
      }
    }
  }
}

// A block of kRows rows against all panels of the slice, several at a time where rows are few and memory is the limit.
template <int kRows, typename W>
void Block(const float* a, const W* panels, std::int64_t panel_stride, std::int64_t num_panels, std::int64_t depth,
           bool is_first, float* sums, std::int64_t sums_stride) {
  constexpr int kPanels = kRows == 1 ? 4 : kRows <= 4 ? 2 : 1;
  std::int64_t p = 0;
  for (; p + kPanels <= num_panels; p += kPanels) {
    Tile<kRows, kPanels>(a, panels + p * panel_stride, panel_stride, depth, is_first, sums + p * kPanelColumns,
                         sums_stride);
  }
  for (; p < num_panels; ++p) {
    Tile<kRows, 1>(a, panels + p * panel_stride, panel_stride, depth, is_first, sums + p * kPanelColumns, sums_stride);
  }
}

template <typename W>
using BlockOf = void (*)(const float*, const W*, std::int64_t, std::int64_t, std::int64_t, bool, float*, std::int64_t);

template <typename W, int... kRows>
BlockOf<W> BlockOfRows(std::int64_t rows, std::integer_sequence<int, kRows...> /*unused*/) {
  static constexpr BlockOf<W> kBlocks[] = {Block<kRows + 1, W>...};
  return kBlocks[rows - 1];
}

// How a row's finished sums become floats. Columns count from the first of the sums; rows are whole vectors long.
struct FloatRow {
  const float* sums;

  FloatRow(const GemmSums& all, const Int8Sum* /*rows*/, std::int64_t m, std::int64_t stride)
      : sums(reinterpret_cast<const float*>(all.data) + m * stride) {}
  HWY_INLINE VF At(std::int64_t n) const { return hn::LoadU(F(), sums + n); }
};
struct Int8Row {
  const std::int32_t* sums;
  const float* column_scales;
  const Int8Sum row;

  Int8Row(const GemmSums& all, const Int8Sum* rows, std::int64_t m, std::int64_t stride)
      : sums(reinterpret_cast<const std::int32_t*>(all.data) + m * stride),
        column_scales(all.column_scales),
        row(rows[m]) {}
  HWY_INLINE VF At(std::int64_t n) const {
    const I wide;
    const VF exact = hn::ConvertTo(F(), hn::Sub(hn::LoadU(wide, sums + n), hn::Set(wide, 128 * row.sum)));
    return hn::Mul(hn::Mul(exact, hn::Set(F(), row.scale)), hn::LoadU(F(), column_scales + n));
  }
};

template <typename Row>
void WriteRows(const GemmWrite& write, std::int64_t begin, std::int64_t end) {
  const auto finish = [&](VF sum, VF bias, VF before) {
    if (write.bias != nullptr) sum = hn::Add(sum, bias);
    return write.output == GemmOutput::kAdd ? hn::Add(before, sum) : sum;
  };
  for (std::int64_t m = begin; m < end; ++m) {
    const Row sums(write.sums, write.int8_rows, m, write.sums_stride);
    float* const out = write.out + m * write.columns;
    std::int64_t n = write.column_begin;
    for (; n + static_cast<std::int64_t>(kLanes) <= write.column_end; n += kLanes) {
      const VF bias = write.bias != nullptr ? hn::LoadU(F(), write.bias + n) : hn::Zero(F());
      const VF before = write.output == GemmOutput::kAdd ? hn::LoadU(F(), out + n) : hn::Zero(F());
      hn::StoreU(finish(sums.At(n - write.column_begin), bias, before), F(), out + n);
    }
    if (n < write.column_end) {
      const auto rest = static_cast<std::size_t>(write.column_end - n);
      const VF bias = write.bias != nullptr ? LoadTail(write.bias + n, rest, 0) : hn::Zero(F());
      StoreTail(finish(sums.At(n - write.column_begin), bias, LoadTail(out + n, rest, 0)), rest, out + n);
    }
  }
}

void WriteOut(const GemmWrite& write, std::int64_t begin, std::int64_t end) {
  write.int8_rows != nullptr ? WriteRows<Int8Row>(write, begin, end) : WriteRows<FloatRow>(write, begin, end);
}

template <typename Row, typename T>
void SiluMulRows(const SiluMulWrite& write, std::int64_t begin, std::int64_t end) {
  for (std::int64_t m = begin; m < end; ++m) {
    const Row gate(write.gate, write.int8_rows, m, write.sums_stride);
    const Row up(write.up, write.int8_rows, m, write.sums_stride);
    T* const out = reinterpret_cast<T*>(write.out) + m * write.out_stride;
    for (std::int64_t n = 0; n < write.columns; n += kLanes) StoreNarrow(SiluMul(gate.At(n), up.At(n)), out + n);
  }
}

template <typename Row>
void SiluMulRows(const SiluMulWrite& write, std::int64_t begin, std::int64_t end) {
  write.out_dtype == DType::kF32 ? SiluMulRows<Row, float>(write, begin, end)
                                 : SiluMulRows<Row, std::uint16_t>(write, begin, end);
}

void WriteSiluMul(const SiluMulWrite& write, std::int64_t begin, std::int64_t end) {
  write.int8_rows != nullptr ? SiluMulRows<Int8Row>(write, begin, end) : SiluMulRows<FloatRow>(write, begin, end);
}

template <typename W>
void Gemm(const GemmSlice& work) {
  const std::int64_t num_panels = work.panel_end - work.panel_begin;
  const std::int64_t panel_stride = work.depth * kPanelColumns;
  const std::int64_t sums_stride = num_panels * kPanelColumns;
  const W* const panels = reinterpret_cast<const W*>(work.panels) + work.panel_begin * panel_stride;
  // A single block reads each panel once: nothing to keep, and several panels at a time hide the latency of memory.
  const std::int64_t depth_per_pass = work.num_blocks == 1 ? work.depth : kDepthPerPass<W>;
  const std::int64_t panels_per_pass = work.num_blocks == 1 ? num_panels : 1;
  const std::int64_t small = work.num_rows / work.num_blocks;
  const std::int64_t num_large = work.num_rows % work.num_blocks;
  for (std::int64_t k = 0; k < work.depth; k += depth_per_pass) {
    const std::int64_t depth = std::min(depth_per_pass, work.depth - k);
    for (std::int64_t panel = 0; panel < num_panels; panel += panels_per_pass) {
      std::int64_t m = 0;
      for (std::int64_t block = 0; block < work.num_blocks; ++block) {
        const std::int64_t rows = small + (block < num_large ? 1 : 0);
        BlockOfRows<W>(rows, std::make_integer_sequence<int, kRowsPerBlock>())(
            work.a + m * work.depth + k * rows, panels + panel * panel_stride + k * kPanelColumns, panel_stride,
            panels_per_pass, depth, k == 0, work.sums + m * sums_stride + panel * kPanelColumns, sums_stride);
        m += rows;
      }
    }
  }
  const std::int64_t column_begin = work.panel_begin * kPanelColumns;
  WriteOut({.sums = {.data = reinterpret_cast<const std::byte*>(work.sums)},
            .sums_stride = sums_stride,
            .bias = work.bias,
            .output = work.output,
            .out = work.out,
            .columns = work.columns,
            .column_begin = column_begin,
            .column_end = std::min(work.panel_end * kPanelColumns, work.columns)},
           0, work.num_rows);
}

template <typename T>
Int8Sum RoundRow(const T* row, std::int64_t size, std::int8_t* out, std::int64_t block_stride) {
  const auto load = [&](std::int64_t i) {
    return i + static_cast<std::int64_t>(kLanes) <= size ? LoadWide(row + i)
                                                         : LoadTail(row + i, static_cast<std::size_t>(size - i), 0);
  };
  VF largest = hn::Zero(F());
  for (std::int64_t i = 0; i < size; i += kLanes) largest = hn::Max(largest, hn::Abs(load(i)));
  const Int8Scale scale = Int8ScaleOf(hn::GetLane(hn::MaxOfLanes(F(), largest)));
  const VF inverse = hn::Set(F(), scale.inverse);
  const I wide;
  auto sum = hn::Zero(wide);
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const auto integers = hn::NearestInt(hn::Mul(load(i), inverse));
    sum = hn::Add(sum, integers);
    const hn::Rebind<std::int8_t, I> narrow;
    const auto bytes = hn::DemoteTo(narrow, integers);
    std::int8_t* const to = out + i / kDotBlockBytes * block_stride + i % kDotBlockBytes;
    if (i + static_cast<std::int64_t>(kLanes) <= size) {
      hn::StoreU(bytes, narrow, to);
      continue;
    }
    HWY_ALIGN std::int8_t lanes[kLanes];
    hn::Store(bytes, narrow, lanes);
    std::copy_n(lanes, size - i, to);
  }
  HWY_ALIGN std::int32_t lanes[kLanes];
  hn::Store(sum, wide, lanes);
  std::int32_t total = 0;
  for (const std::int32_t lane : lanes) total += lane;
  return {scale.scale, total};
}

Int8Sum RoundToInt8(const std::byte* row, DType dtype, std::int64_t size, std::int8_t* out, std::int64_t block_stride) {
  if (dtype == DType::kF32) return RoundRow(reinterpret_cast<const float*>(row), size, out, block_stride);
  return RoundRow(reinterpret_cast<const std::uint16_t*>(row), size, out, block_stride);
}

#if HWY_TARGET == HWY_AVX3 || HWY_TARGET == HWY_AVX2
// Sums of pairs of k: two for each column, added up at the end.
void MultiplyInt8Row(const DotPiece& piece, const std::int8_t* a, std::int32_t* sums) {
  using D16 = hn::CappedTag<std::int16_t, 32>;
  using D32 = hn::RepartitionToWide<D16>;
  using Narrow8 = hn::Rebind<std::uint8_t, D16>;
  constexpr std::size_t kLanes16 = hn::MaxLanes(D16());
  constexpr std::size_t kSums = static_cast<std::size_t>(kPanelColumns * kDotGroupBytes) / kLanes16;
  constexpr std::size_t kSumsOfHalf = kSums / 2;
  constexpr std::int64_t kGroupsPerBlock = kDotBlockBytes / kDotGroupBytes;
  hn::Vec<D32> pairs[kSums];
  hn::Vec<D32> unused = hn::Zero(D32());
  for (auto& pair : pairs) pair = hn::Zero(D32());
  for (std::int64_t group = 0; group < piece.num_blocks * kGroupsPerBlock; ++group) {
    std::uint64_t quad = 0;
    for (int i = 3; i >= 0; --i) quad = quad << 16U | static_cast<std::uint16_t>(a[group * kDotGroupBytes + i]);
    const auto values = hn::BitCast(D16(), hn::Set(hn::Repartition<std::uint64_t, D16>(), quad));
    const auto* const weights = reinterpret_cast<const std::uint8_t*>(piece.panel) +
                                group / kGroupsPerBlock * 2 * kDotHalfBytes +
                                group % kGroupsPerBlock * kDotHalfColumns * kDotGroupBytes;
    hwy::Prefetch(weights + kPrefetchBytes);
    hwy::Prefetch(weights + kPrefetchBytes + kDotHalfBytes);
    HWY_UNROLL(8)
    for (std::size_t i = 0; i < kSums; ++i) {
      const std::size_t at = i / kSumsOfHalf * kDotHalfBytes + i % kSumsOfHalf * kLanes16;
      const auto wide = hn::PromoteTo(D16(), hn::LoadU(Narrow8(), weights + at));
      pairs[i] = hn::ReorderWidenMulAccumulate(D32(), wide, values, pairs[i], unused);
    }
  }
  HWY_ALIGN std::int32_t lanes[2 * kPanelColumns];
  for (std::size_t i = 0; i < kSums; ++i) hn::Store(pairs[i], D32(), lanes + i * kLanes16 / 2);
  for (std::int64_t n = 0; n < kPanelColumns; ++n) sums[n] += lanes[2 * n] + lanes[2 * n + 1];
}
#else
void MultiplyInt8Row(const DotPiece& piece, const std::int8_t* a, std::int32_t* sums) {
  const auto* weights = reinterpret_cast<const std::uint8_t*>(piece.panel);
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    for (std::int64_t half = 0; half < 2; ++half, weights += kDotHalfBytes) {
      for (std::int64_t i = 0; i < kDotHalfBytes; ++i) {
        const std::int64_t k = i / (kDotHalfColumns * kDotGroupBytes) * kDotGroupBytes + i % kDotGroupBytes;
        sums[half * kDotHalfColumns + i / kDotGroupBytes % kDotHalfColumns] +=
            a[block * kDotBlockBytes + k] * weights[i];
      }
    }
  }
}
#endif

void Int8Piece(const DotPiece& piece) {
  for (std::int64_t part = 0; part < piece.num_parts; ++part) piece.background(part);
  for (std::int64_t m = 0; m < piece.num_rows; ++m) {
    auto* const sums = reinterpret_cast<std::int32_t*>(piece.sums) + m * kPanelColumns;
    if (piece.is_first) std::fill(sums, sums + kPanelColumns, 0);
    MultiplyInt8Row(piece, reinterpret_cast<const std::int8_t*>(piece.a.data + m * piece.a.row_stride), sums);
  }
}

constexpr GemmBodies kGemmBodies = {kRowsPerBlock, Gemm<float>, Gemm<std::uint16_t>, WriteOut,
                                    WriteSiluMul,  {Int8Piece}, RoundToInt8};

}  // namespace spillway::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/cpu/choose_target.h"

namespace spillway::cpu {

const GemmBodies& GemmBodiesOf(Target target) { SPILLWAY_CHOOSE_TARGET(target, kGemmBodies) }

}  // namespace spillway::cpu
#endif  // HWY_ONCE
