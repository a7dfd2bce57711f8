// Attention over bf16 in products of bf16 tiles (bf16_tiles.h). Scores: the left matrix is the query rows, the right
// one a strip's keys, so that lanes are keys. Values: the left matrix is the weights, rounded to bf16, the right one
// the values of 32 tokens. The sum of a row is that of the rounded weights.

#include "kernels/cpu/attention.h"
#include "kernels/cpu/bf16_tiles.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/tsan.h"
#include "kernels/exp2p.h"

// GCC 12 takes the deliberately undefined vectors of its own intrinsics for ours.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define SPILLWAY_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace spillway::cpu {
namespace {

// Query rows whose scores of a segment are computed, weighed and summed before the next ones.
constexpr std::int64_t kRowsPerBlock = 32;
// Tokens whose values are packed before they are multiplied, where rows are few.
constexpr std::int64_t kValuesPerPiece = 64;
// How far ahead of its use memory is fetched at most.
constexpr std::int64_t kStripsAhead = 24;
static_assert(kBlockTokens == kTileColumns && kRowsPerBlock % kTileRows == 0);

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

// Lanes [0, count) of a vector of 16; all of it from 16 on.
inline __mmask16 FirstLanes(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffffU : (1U << count) - 1U);
}
inline __mmask32 FirstWords(std::int64_t count) {
  return static_cast<__mmask32>(count >= 32 ? 0xffffffffU : (1U << count) - 1U);
}

SPILLWAY_AVX512_BF16 inline __m512i LoadWords(const std::uint16_t* from, std::int64_t count) {
  if (count >= 32) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16(FirstWords(count), from);
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

// Turns raw scores of keys [first, num_keys) into weights 2^(scale * score - max), rounded, and the others into zeros
// up to `padded_keys`, a multiple of 32. `scale` is positive.
SPILLWAY_AVX512_BF16 void WeighRow(const float* scores, std::int64_t first, std::int64_t num_keys,
                                   std::int64_t padded_keys, float scale, std::uint16_t* weights,
                                   AttentionState& state) {
  first = std::min(first, std::max<std::int64_t>(num_keys, 0));
  const auto lanes = [&](std::int64_t at) {
    const __mmask16 mask = FirstLanes(std::max<std::int64_t>(num_keys - at, 0));
    return at < first ? static_cast<__mmask16>(mask & ~FirstLanes(first - at)) : mask;
  };
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 max = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  std::int64_t i = first / 16 * 16;
  if (i < first) {
    max = _mm512_mask_max_ps(max, lanes(i), max, _mm512_loadu_ps(scores + i));
    i += 16;
  }
  for (; i + 16 <= num_keys; i += 16) max = _mm512_max_ps(max, _mm512_loadu_ps(scores + i));
  if (i < num_keys) max = _mm512_mask_max_ps(max, FirstLanes(num_keys - i), max, _mm512_loadu_ps(scores + i));
  state.max = _mm512_reduce_max_ps(max) * scale;
  max = _mm512_set1_ps(state.max);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (i = 0; i < num_keys; i += 32) {
    __m512 low = Exp2OfWeight(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, max));
    __m512 high = Exp2OfWeight(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i + 16), factor, max));
    if (num_keys - i < 32 || i < first) {
      low = _mm512_maskz_mov_ps(lanes(i), low);
      high = _mm512_maskz_mov_ps(lanes(i + 16), high);
    }
    const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    _mm512_storeu_si512(weights + i, rounded);
    sums[0] = _mm512_add_ps(sums[0], _mm512_castsi512_ps(_mm512_slli_epi32(rounded, 16)));
    sums[1] = _mm512_add_ps(sums[1], _mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(-0x10000))));
  }
  for (; i < padded_keys; i += 32) _mm512_storeu_si512(weights + i, _mm512_setzero_si512());
  state.sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

template <typename Out>
struct StateArithmetic {
  std::int64_t dim;
  Out* result;  // of the row being normalized

  // Exp2p.
  SPILLWAY_AVX512_BF16 float Exp2(float x) const { return _mm512_cvtss_f32(cpu::Exp2(_mm512_set1_ps(x))); }
  SPILLWAY_AVX512_BF16 void ScaleAdd(float* running, float a, const float* segment, float b) const {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(running + d), _mm512_set1_ps(a));
      _mm512_storeu_ps(running + d, _mm512_fmadd_ps(_mm512_loadu_ps(segment + d), _mm512_set1_ps(b), scaled));
    }
  }
  SPILLWAY_AVX512_BF16 void Scale(const float* out, float factor) const {
    for (std::int64_t d = 0; d < dim; d += 16) {
      const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(out + d), _mm512_set1_ps(factor));
      if constexpr (std::is_same_v<Out, float>) {
        _mm512_mask_storeu_ps(result + d, FirstLanes(dim - d), scaled);
      } else {
        const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(scaled));
        _mm256_mask_storeu_epi16(result + d, FirstLanes(dim - d), rounded);
      }
    }
  }
};

using States = RowStates<StateArithmetic>;

// Working memory of one tile, carved from the worker's scratch. Rows of `queries` and of the block's arrays are padded.
struct TileMemory {
  std::uint16_t* queries;  // [rows + kTileRows][padded_dim]
  std::byte* keys;         // tiles, of up to a segment
  std::byte* values;       // tiles, of up to a segment
  float* scores;           // [kRowsPerBlock][kSegmentTokens]
  std::uint16_t* weights;  // [kRowsPerBlock][kSegmentTokens]
  float* outs;             // [kRowsPerBlock][padded_dim]
  std::byte* states;

  TileMemory(const TileRows& rows, std::int64_t padded_dim, Scratch& scratch) {
    const auto padded = static_cast<std::size_t>(padded_dim);
    const std::size_t sizes[] = {static_cast<std::size_t>(rows.size() + kRowsPerBlock) * padded * 2,
                                 kSegmentTokens * padded * 2,
                                 kSegmentTokens * padded * 2,
                                 kRowsPerBlock * kSegmentTokens * 4,
                                 kRowsPerBlock * kSegmentTokens * 2,
                                 kRowsPerBlock * padded * 4,
                                 States::SizeBytes(rows)};
    std::size_t total = 0;
    for (const std::size_t size : sizes) total += size;
    std::byte* at = scratch.Get(total);
    std::byte* parts[7];
    for (std::size_t i = 0; i < 7; ++i) {
      parts[i] = at;
      at += sizes[i];
    }
    queries = reinterpret_cast<std::uint16_t*>(parts[0]);
    keys = parts[1];
    values = parts[2];
    scores = reinterpret_cast<float*>(parts[3]);
    weights = reinterpret_cast<std::uint16_t*>(parts[4]);
    outs = reinterpret_cast<float*>(parts[5]);
    states = parts[6];
  }
};

class TileRun {
 public:
  TileRun(const TileBodies& tiles, const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch)
      : tiles_(tiles),
        rows_(args, tile),
        dim_(args.kv.layout.head_dim),
        padded_dim_((dim_ + kTileDepth - 1) / kTileDepth * kTileDepth),
        depth_(padded_dim_ / kTileDepth),
        scale_(args.scale * kLog2E),
        memory_(rows_, padded_dim_, scratch),
        states_(rows_, memory_.states) {}

  void Run() {
    const AttentionTile& tile = rows_.tile();
    CopyQueries();
    if (has_few_rows()) PackQueries();
    if (tile.segment_states == nullptr) states_.Begin();
    for (std::int64_t begin = tile.key_begin; begin < tile.key_end; begin += kSegmentTokens) RunSegment(begin);
    if (tile.segment_states == nullptr) states_.Finish();
  }

  void Merge() {
    states_.Begin();
    states_.MergeKept();
    states_.Finish();
  }

 private:
  const std::uint16_t* StripOf(std::int64_t block) const {
    return reinterpret_cast<const std::uint16_t*>(rows_.StripOf(block));
  }

  SPILLWAY_AVX512_BF16 void CopyQueries() {
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      const auto* const from = reinterpret_cast<const std::uint16_t*>(rows_.args().q) + rows_.OffsetOf(r);
      for (std::int64_t d = 0; d < padded_dim_; d += 32) {
        _mm512_storeu_si512(memory_.queries + r * padded_dim_ + d, LoadWords(from + d, dim_ - d));
      }
    }
  }

  // Then keys are the left matrix of their products with queries, as they lie in memory, and scores are transposed
  // instead. The bits are the same: products commute.
  bool has_few_rows() const { return tiles_.reads_rows_in_place && rows_.size() <= kTileRows && dim_ == padded_dim_; }

  // Tiles [depth], into the memory of keys.
  SPILLWAY_AVX512_BF16 void PackQueries() {
    for (std::int64_t d = 0; d < depth_; ++d) {
      TransposeTile(memory_.queries + d * kTileDepth, padded_dim_,
                    memory_.keys + d * static_cast<std::int64_t>(kTileBytes));
    }
  }

  // Scores of all rows, few, for the keys of [at, end) in the segment at `begin`.
  SPILLWAY_AVX512_BF16 void MultiplyKeysInPlace(std::int64_t begin, std::int64_t end) {
    float* const turned = memory_.outs;  // [key][row]
    for (std::int64_t at = begin; at < end; at += kBlockTokens) {
      const std::int64_t block = at / kBlockTokens;
      for (std::int64_t d = 0; d < depth_; ++d) FetchAhead(block, 16);
      DeclareRead(StripOf(block), rows_.args().kv.layout.strip_bytes());
      tiles_.multiply({.a = StripOf(block),
                       .a_stride = 2 * dim_,
                       .num_rows = kBlockTokens,
                       .b = memory_.keys,
                       .b_depth_stride = kTileBytes,
                       .num_columns = 1,
                       .depth = depth_,
                       .c = turned,
                       .c_stride = kTileColumns});
      float* const scores = memory_.scores + (at - begin);
      for (int quarter = 0; 4 * quarter < rows_.size(); ++quarter) {
        const Quarter q = TransposeQuarter(reinterpret_cast<const std::uint16_t*>(turned), 2 * kTileColumns, quarter);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(scores + (4 * quarter + i) * kSegmentTokens, q.columns[i]);
      }
    }
  }

  // The next `count` lines of the strips that follow strip `current`. Called with every few lines that are packed, so
  // that memory is read all the time.
  void FetchAhead(std::int64_t current, int count) {
    if (ahead_block_ <= current) {
      ahead_block_ = current + 1;
      ahead_bytes_ = 0;
    }
    if (ahead_block_ > current + kStripsAhead || ahead_block_ * kBlockTokens >= rows_.tile().key_end) return;
    const std::byte* const at = rows_.StripOf(ahead_block_) + ahead_bytes_;
    for (int i = 0; i < count; ++i) __builtin_prefetch(at + 64 * static_cast<std::ptrdiff_t>(i), 0, 2);
    ahead_bytes_ += 64 * static_cast<std::size_t>(count);
    if (ahead_bytes_ < rows_.args().kv.layout.strip_bytes()) return;
    ++ahead_block_;
    ahead_bytes_ = 0;
  }

  // Keys of [begin, end): tiles [strip][depth].
  SPILLWAY_AVX512_BF16 void PackKeys(std::int64_t begin, std::int64_t end) {
    std::byte* to = memory_.keys;
    for (std::int64_t block = begin / kBlockTokens; block * kBlockTokens < end; ++block) {
      const std::uint16_t* const strip = StripOf(block);
      for (std::int64_t d = 0; d < dim_; d += kTileDepth, to += kTileBytes) {
        FetchAhead(block, 16);
        if (d + kTileDepth <= dim_) {
          TransposeTile(strip + d, 2 * dim_, to);
          continue;
        }
        alignas(64) std::uint16_t tail[kBlockTokens * kTileDepth];
        for (std::int64_t j = 0; j < kBlockTokens; ++j) {
          _mm512_store_si512(tail + j * kTileDepth, LoadWords(strip + j * 2 * dim_ + d, dim_ - d));
        }
        TransposeTile(tail, kTileDepth, to);
      }
    }
  }

  // Values of [begin, end), zero up to whole tiles: tiles [depth][columns]. False: one that some row does not see is
  // infinite or NaN.
  SPILLWAY_AVX512_BF16 bool PackValues(std::int64_t begin, std::int64_t end) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const std::int64_t seen_by_all = rows_.PositionOf(0);
    __mmask32 not_finite = 0;
    std::byte* to = memory_.values;
    for (std::int64_t at = begin; at < end; at += kTileDepth, to += padded_dim_ / kTileColumns * kTileBytes) {
      for (std::int64_t j = 0; j < kTileDepth; j += 2) {
        const std::int64_t position = at + j;
        const std::int64_t block = std::min(position, end - 1) / kBlockTokens;
        const std::uint16_t* const values = StripOf(block) + (position % kBlockTokens * 2 + 1) * dim_;
        for (std::int64_t d = 0; d < padded_dim_; d += 32) {
          FetchAhead(block, 2);
          const __m512i even = position < end ? LoadWords(values + d, dim_ - d) : _mm512_setzero_si512();
          const __m512i odd = position + 1 < end ? LoadWords(values + d + 2 * dim_, dim_ - d) : _mm512_setzero_si512();
          std::byte* const pair = to + d / kTileColumns * kTileBytes + j * 32;
          _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
          _mm512_storeu_si512(pair + kTileBytes, _mm512_permutex2var_epi16(even, high, odd));
          if (position + 1 <= seen_by_all) continue;
          not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
          not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
        }
      }
    }
    return not_finite == 0;
  }

  void RunSegment(std::int64_t begin) {
    const std::int64_t end = std::min<std::int64_t>(begin + kSegmentTokens, rows_.tile().key_end);
    std::int64_t r = rows_.FirstRowOf(begin);
    // One block of rows: packed and multiplied piece by piece, so that what is packed stays in the nearest cache.
    if (rows_.size() - r <= kRowsPerBlock) {
      if (has_few_rows()) {
        r = 0;  // rows that see none of the keys are weighed to nothing
        MultiplyKeysInPlace(begin, end);
      } else {
        for (std::int64_t at = begin; at < end; at += kTileDepth) {
          const std::int64_t at_end = std::min(at + kTileDepth, end);
          PackKeys(at, at_end);
          MultiplyKeys(begin, at, at_end, r, rows_.size());
        }
      }
      Weigh(begin, end, r, rows_.size());
      if (AddValues(begin, end, r, r, rows_.size())) {
        TakeRows(begin, r, r, rows_.size());
      } else {
        TakeByToken(begin, end, r, rows_.size());
      }
      return;
    }
    PackKeys(begin, end);
    const bool is_finite = PackValues(begin, end);
    for (; r < rows_.size(); r += kRowsPerBlock) {
      const std::int64_t row_end = std::min(r + kRowsPerBlock, rows_.size());
      const std::int64_t seen_end = begin + rows_.NumKeys(row_end - 1, begin, end);
      MultiplyKeys(begin, begin, seen_end, r, row_end);
      Weigh(begin, seen_end, r, row_end);
      if (is_finite) {
        MultiplyValues(begin, begin, seen_end, r, r, row_end);
        TakeRows(begin, r, r, row_end);
      } else {
        TakeByToken(begin, seen_end, r, row_end);
      }
    }
  }

  // Scores of rows [row_begin, row_end), a block, for the packed keys of [at, end) in the segment at `begin`.
  void MultiplyKeys(std::int64_t begin, std::int64_t at, std::int64_t end, std::int64_t row_begin,
                    std::int64_t row_end) {
    tiles_.multiply({.a = memory_.queries + row_begin * padded_dim_,
                     .a_stride = padded_dim_,
                     .num_rows = row_end - row_begin,
                     .b = memory_.keys,
                     .b_column_stride = static_cast<std::size_t>(depth_) * kTileBytes,
                     .b_depth_stride = kTileBytes,
                     .num_columns = (end - at + kBlockTokens - 1) / kBlockTokens,
                     .depth = depth_,
                     .c = memory_.scores + (at - begin),
                     .c_stride = kSegmentTokens});
  }

  void Weigh(std::int64_t begin, std::int64_t end, std::int64_t row_begin, std::int64_t row_end) {
    const std::int64_t padded_keys = (end - begin + kTileDepth - 1) / kTileDepth * kTileDepth;
    for (std::int64_t r = row_begin; r < row_end; ++r) {
      const std::int64_t i = r - row_begin;
      WeighRow(memory_.scores + i * kSegmentTokens, rows_.NumBeforeWindow(r, begin), rows_.NumKeys(r, begin, end),
               padded_keys, scale_, memory_.weights + i * kSegmentTokens, segment_states_[i]);
    }
  }

  // Adds the packed values of [at, end) to the outputs of rows [row_begin, row_end) of the block at `block`, the first
  // ones of the segment to nothing.
  void MultiplyValues(std::int64_t begin, std::int64_t at, std::int64_t end, std::int64_t block, std::int64_t row_begin,
                      std::int64_t row_end) {
    tiles_.multiply({.a = memory_.weights + (row_begin - block) * kSegmentTokens + (at - begin),
                     .a_stride = kSegmentTokens,
                     .num_rows = row_end - row_begin,
                     .b = memory_.values,
                     .b_column_stride = kTileBytes,
                     .b_depth_stride = static_cast<std::size_t>(padded_dim_ / kTileColumns) * kTileBytes,
                     .num_columns = padded_dim_ / kTileColumns,
                     .depth = (end - at + kTileDepth - 1) / kTileDepth,
                     .c = memory_.outs,
                     .c_stride = padded_dim_,
                     .add = at != begin});
  }

  // Packs and adds piece by piece. False: as PackValues, and the outputs are not to be used.
  bool AddValues(std::int64_t begin, std::int64_t end, std::int64_t block, std::int64_t row_begin,
                 std::int64_t row_end) {
    bool is_finite = true;
    for (std::int64_t at = begin; at < end; at += kValuesPerPiece) {
      const std::int64_t at_end = std::min(at + kValuesPerPiece, end);
      is_finite = PackValues(at, at_end) && is_finite;
      MultiplyValues(begin, at, at_end, block, row_begin, row_end);
    }
    return is_finite;
  }

  // The outputs of rows [row_begin, row_end) of the block at `block` are complete.
  void TakeRows(std::int64_t begin, std::int64_t block, std::int64_t row_begin, std::int64_t row_end) {
    if (rows_.tile().segment_states == nullptr) {
      for (std::int64_t r = row_begin; r < row_end; r += kTileRows) {
        MergeRows(block, row_begin, r, std::min(r + kTileRows, row_end));
      }
      return;
    }
    for (std::int64_t r = row_begin; r < row_end; ++r) {
      AttentionState& state = segment_states_[r - block];
      state.out = memory_.outs + (r - row_begin) * padded_dim_;
      states_.Take(begin, r, state);
    }
  }

  // MergeAttentionState of up to 16 rows at once: its factors are computed side by side.
  SPILLWAY_AVX512_BF16 void MergeRows(std::int64_t block, std::int64_t first_out, std::int64_t row_begin,
                                      std::int64_t row_end) {
    const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __m512 one = _mm512_set1_ps(1);
    alignas(64) float maxes[2][kTileRows];  // running, segment
    alignas(64) float sums[2][kTileRows];
    const std::int64_t num_rows = row_end - row_begin;
    for (std::int64_t i = 0; i < num_rows; ++i) {
      const AttentionState& running = states_.Of(row_begin + i);
      const AttentionState& segment = segment_states_[row_begin + i - block];
      maxes[0][i] = running.max;
      maxes[1][i] = segment.max;
      sums[0][i] = running.sum;
      sums[1][i] = segment.sum;
    }
    const __m512 running_max = _mm512_load_ps(maxes[0]);
    const __m512 segment_max = _mm512_load_ps(maxes[1]);
    const __mmask16 is_higher = _mm512_cmp_ps_mask(segment_max, running_max, _CMP_GT_OQ);
    const __mmask16 has_keys = _mm512_mask_cmp_ps_mask(FirstLanes(num_rows), segment_max, nothing, _CMP_NEQ_UQ);
    const __m512 max = _mm512_mask_mov_ps(running_max, is_higher, segment_max);
    alignas(64) float factors[2][kTileRows];
    const __m512 a = _mm512_mask_mov_ps(one, is_higher, Exp2(_mm512_sub_ps(running_max, max)));
    const __m512 b = _mm512_mask_mov_ps(Exp2(_mm512_sub_ps(segment_max, max)), is_higher, one);
    _mm512_store_ps(factors[0], a);
    _mm512_store_ps(factors[1], b);
    _mm512_store_ps(maxes[0], max);
    _mm512_store_ps(
        sums[0], _mm512_add_ps(_mm512_mul_ps(_mm512_load_ps(sums[0]), a), _mm512_mul_ps(_mm512_load_ps(sums[1]), b)));
    const StateArithmetic<float> arithmetic{dim_, nullptr};
    for (std::int64_t i = 0; i < num_rows; ++i) {
      if ((has_keys >> i & 1U) == 0) continue;
      AttentionState& running = states_.Of(row_begin + i);
      running.max = maxes[0][i];
      running.sum = sums[0][i];
      arithmetic.ScaleAdd(running.out, factors[0][i], memory_.outs + (row_begin + i - first_out) * padded_dim_,
                          factors[1][i]);
    }
  }

  // A weight of zero times an infinite value is NaN: each token's rows meet only the values that they see.
  void TakeByToken(std::int64_t begin, std::int64_t end, std::int64_t row_begin, std::int64_t row_end) {
    for (std::int64_t r = row_begin; r < row_end;) {
      const std::int64_t token_end = std::min(r - r % rows_.group() + rows_.group(), row_end);
      AddValues(begin, begin + rows_.NumKeys(r, begin, end), row_begin, r, token_end);
      TakeRows(begin, row_begin, r, token_end);
      r = token_end;
    }
  }

  const TileBodies& tiles_;
  const TileRows rows_;
  const std::int64_t dim_;
  const std::int64_t padded_dim_;
  const std::int64_t depth_;
  const float scale_;
  const TileMemory memory_;
  States states_;
  AttentionState segment_states_[kRowsPerBlock];  // of the block at hand
  std::int64_t ahead_block_ = 0;                  // what FetchAhead fetches next
  std::size_t ahead_bytes_ = 0;
};

template <const TileBodies& kTiles>
void Attend(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch) {
  kTiles.begin();
  TileRun(kTiles, args, tile, scratch).Run();
  kTiles.end();
}

template <const TileBodies& kTiles>
void Merge(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch) {
  TileRun(kTiles, args, tile, scratch).Merge();
}

constexpr std::int64_t kRowsPerTile = 256;
constexpr AttentionBodies kAvx512Bf16Bodies = {kRowsPerTile, Attend<kAvx512Bf16Tiles>, Merge<kAvx512Bf16Tiles>};
constexpr AttentionBodies kAmxBodies = {kRowsPerTile, Attend<kAmxTiles>, Merge<kAmxTiles>};

}  // namespace

const AttentionBodies* Bf16AttentionBodiesOf(Target target) {
  if (target == Target::kAvx512Bf16) return &kAvx512Bf16Bodies;
  if (target == Target::kAmx) return &kAmxBodies;
  return nullptr;
}

}  // namespace spillway::cpu

#else

namespace spillway::cpu {
const AttentionBodies* Bf16AttentionBodiesOf(Target) { return nullptr; }
}  // namespace spillway::cpu

#endif
