#include <algorithm>
#include <limits>

#include "kernels/attention_state.h"
#include "kernels/cpu/attention.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/attention_bodies.cc"
#include "hwy/foreach_target.h"
#include "kernels/cpu/vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace spillway::cpu::HWY_NAMESPACE {

static_assert(kBlockTokens == kGroup);
inline constexpr std::int64_t kStripsPerSegment = kSegmentTokens / kBlockTokens;

// Registers decide: sums of kRowsPerScore rows x kStripsPerScore strips.
inline constexpr int kRowsPerScore = kLanes >= 8 && HWY_TARGET != HWY_AVX2 ? 4 : 2;
inline constexpr int kStripsPerScore = kLanes >= 16 ? 4 : 2;
// ... and of kRowsPerValue rows x kVectorsPerValue vectors of head_dim.
inline constexpr int kRowsPerValue = 4;
inline constexpr int kVectorsPerValue = kLanes >= 16 ? 4 : 2;

#if HWY_TARGET != HWY_SCALAR
// 16 lanes at words [word, word + 4) of four rows `stride` words apart, first rows 0, 4, 8, 12 as far as lanes go.
HWY_INLINE VU LoadQuads(const std::uint32_t* at, std::size_t stride) {
  const hn::Full128<std::uint32_t> quad;
#if HWY_TARGET == HWY_AVX3
  const hn::Half<U> half;
  const auto low = hn::Combine(half, hn::LoadU(quad, at + 4 * stride), hn::LoadU(quad, at));
  const auto high = hn::Combine(half, hn::LoadU(quad, at + 12 * stride), hn::LoadU(quad, at + 8 * stride));
  return hn::Combine(U(), high, low);
#elif HWY_TARGET == HWY_AVX2
  return hn::Combine(U(), hn::LoadU(quad, at + 4 * stride), hn::LoadU(quad, at));
#else
  (void)stride;
  return hn::LoadU(quad, at);
#endif
}

// Words [0, 4) of 16 rows -> emit(word, vector index within the group, its 16 / kVectors rows).
template <typename Emit>
HWY_INLINE void TransposeWords(const std::uint32_t* rows, std::size_t stride, Emit emit) {
  const U u;
  const hn::Repartition<std::uint64_t, U> wide;
  for (std::size_t v = 0; v < kVectors; ++v) {
    const std::uint32_t* const at = rows + v * kLanes * stride;
    const VU a = LoadQuads(at, stride);
    const VU b = LoadQuads(at + stride, stride);
    const VU c = LoadQuads(at + 2 * stride, stride);
    const VU d = LoadQuads(at + 3 * stride, stride);
    const auto ab_low = hn::BitCast(wide, hn::InterleaveLower(u, a, b));
    const auto ab_high = hn::BitCast(wide, hn::InterleaveUpper(u, a, b));
    const auto cd_low = hn::BitCast(wide, hn::InterleaveLower(u, c, d));
    const auto cd_high = hn::BitCast(wide, hn::InterleaveUpper(u, c, d));
    emit(0, v, hn::BitCast(u, hn::InterleaveLower(wide, ab_low, cd_low)));
    emit(1, v, hn::BitCast(u, hn::InterleaveUpper(wide, ab_low, cd_low)));
    emit(2, v, hn::BitCast(u, hn::InterleaveLower(wide, ab_high, cd_high)));
    emit(3, v, hn::BitCast(u, hn::InterleaveUpper(wide, ab_high, cd_high)));
  }
}
#endif

// keys[d][16] = the K rows of a strip, widened. Rows of the strip are 2 * dim elements apart.
inline void TransposeKeys(const float* strip, std::size_t dim, float* keys) {
  std::size_t d = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; d + 4 <= dim; d += 4) {
    TransposeWords(reinterpret_cast<const std::uint32_t*>(strip + d), 2 * dim,
                   [&](std::size_t word, std::size_t v, VU values) {
                     hn::StoreU(hn::BitCast(F(), values), F(), keys + (d + word) * kGroup + v * kLanes);
                   });
  }
#endif
  for (; d < dim; ++d) {
    for (std::size_t j = 0; j < kGroup; ++j) keys[d * kGroup + j] = strip[j * 2 * dim + d];
  }
}
inline void TransposeKeys(const std::uint16_t* strip, std::size_t dim, float* keys) {
  std::size_t d = 0;
#if HWY_TARGET != HWY_SCALAR
  for (; d + 8 <= dim; d += 8) {
    TransposeWords(reinterpret_cast<const std::uint32_t*>(strip + d), dim,
                   [&](std::size_t word, std::size_t v, VU pairs) {
                     float* const to = keys + (d + 2 * word) * kGroup + v * kLanes;
                     hn::StoreU(hn::BitCast(F(), hn::ShiftLeft<16>(pairs)), F(), to);
                     hn::StoreU(hn::BitCast(F(), hn::And(pairs, hn::Set(U(), 0xffff0000U))), F(), to + kGroup);
                   });
  }
#endif
  for (; d < dim; ++d) {
    for (std::size_t j = 0; j < kGroup; ++j) keys[d * kGroup + j] = Widen(strip[j * 2 * dim + d]);
  }
}

// values[token][padded_dim] = the V rows of a strip, widened, zero beyond dim.
template <typename T>
void WidenValues(const T* strip, std::size_t num_tokens, std::size_t dim, std::size_t padded_dim, float* values) {
  for (std::size_t j = 0; j < num_tokens; ++j) {
    const T* const row = strip + j * 2 * dim + dim;
    float* const to = values + j * padded_dim;
    std::size_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) hn::StoreU(LoadWide(row + d), F(), to + d);
    for (; d < padded_dim; d += kLanes) hn::StoreU(LoadTail(row + d, d < dim ? dim - d : 0, 0), F(), to + d);
  }
}

// Cache lines to be fetched while something else is computed, one per step; stride 0: nothing is left to fetch.
struct Lines {
  const std::byte* at;
  std::size_t stride;

  template <typename Index>
  HWY_INLINE void Fetch(Index step) const {
    __builtin_prefetch(at + static_cast<std::size_t>(step) * stride, 0, 2);
  }
};

// scores[row][strip][16] = scale * sum over d of q[row][d] * keys[strip][d][16].
template <int kRows, int kStrips>
HWY_INLINE void Score(const float* HWY_RESTRICT q, const float* HWY_RESTRICT keys, std::size_t dim, float scale,
                      Lines ahead, float* HWY_RESTRICT scores) {
  VF sums[kRows][kStrips][kVectors];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int s = 0; s < kStrips; ++s) {
      HWY_UNROLL(4)
      for (std::size_t v = 0; v < kVectors; ++v) sums[r][s][v] = hn::Zero(F());
    }
  }
  for (std::size_t d = 0; d < dim; ++d) {
    ahead.Fetch(d);
    HWY_UNROLL(4)
    for (int s = 0; s < kStrips; ++s) {
      HWY_UNROLL(4)
      for (std::size_t v = 0; v < kVectors; ++v) {
        const VF key = hn::LoadU(F(), keys + (s * dim + d) * kGroup + v * kLanes);
        HWY_UNROLL(4)
        for (int r = 0; r < kRows; ++r) sums[r][s][v] = Fma(hn::Set(F(), q[r * dim + d]), key, sums[r][s][v]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int s = 0; s < kStrips; ++s) {
      HWY_UNROLL(4)
      for (std::size_t v = 0; v < kVectors; ++v) {
        hn::StoreU(hn::Mul(sums[r][s][v], hn::Set(F(), scale)), F(),
                   scores + r * kSegmentTokens + s * kGroup + v * kLanes);
      }
    }
  }
}

template <int kStrips, typename TakeLines>
void ScoreRows(const float* q, std::int64_t num_rows, const float* keys, std::size_t dim, float scale, float* scores,
               TakeLines take_lines) {
  std::int64_t r = 0;
  for (; r + kRowsPerScore <= num_rows; r += kRowsPerScore) {
    Score<kRowsPerScore, kStrips>(q + r * dim, keys, dim, scale, take_lines(dim), scores + r * kSegmentTokens);
  }
  for (; r < num_rows; ++r) {
    Score<1, kStrips>(q + r * dim, keys, dim, scale, take_lines(dim), scores + r * kSegmentTokens);
  }
}

// Turns the scores of keys [first, num_keys) into 2^(score - max), those before into 0, and returns max and their sum.
HWY_INLINE void Softmax(std::int64_t first, std::int64_t num_keys, float* scores, AttentionState& state) {
  const F f;
  const std::int64_t num_lanes = (num_keys + kGroup - 1) / kGroup * kGroup;
  const VF nothing = hn::Set(f, -std::numeric_limits<float>::infinity());
  // Lanes beyond the last key may hold anything, NaN too; from here on they are minus infinity. With all lanes so,
  // Exp2 gives zeros.
  for (std::int64_t i = num_keys; i < num_lanes; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  std::fill_n(scores, std::min(first, num_lanes), -std::numeric_limits<float>::infinity());
  VF max = nothing;
  for (std::int64_t i = 0; i < num_lanes; i += kLanes) max = hn::Max(max, hn::LoadU(f, scores + i));
  state.max = hn::GetLane(hn::MaxOfLanes(f, max));
  max = hn::Set(f, state.max);
  GroupSum sum;
  for (std::int64_t i = 0; i < num_lanes; i += kGroup) {
    for (std::size_t v = 0; v < kVectors; ++v) {
      float* const at = scores + i + v * kLanes;
      const VF p = Exp2(hn::Sub(hn::LoadU(f, at), max));
      hn::StoreU(p, f, at);
      sum.lanes[v] = hn::Add(sum.lanes[v], p);
    }
  }
  state.sum = sum.Total();
}

// out[row][d] += weights[row][token] * values[token][d] for tokens [begin, end), kVectors_ vectors of d.
template <int kRows, int kCount>
HWY_INLINE void AddValues(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT values, std::int64_t begin,
                          std::int64_t end, std::size_t padded_dim, Lines ahead, float* HWY_RESTRICT out) {
  VF sums[kRows][kCount];
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int c = 0; c < kCount; ++c) sums[r][c] = hn::LoadU(F(), out + r * padded_dim + c * kLanes);
  }
  for (std::int64_t j = begin; j < end; ++j) {
    ahead.Fetch(j);
    HWY_UNROLL(4)
    for (int c = 0; c < kCount; ++c) {
      const VF value = hn::LoadU(F(), values + j * padded_dim + c * kLanes);
      HWY_UNROLL(4)
      for (int r = 0; r < kRows; ++r) {
        sums[r][c] = Fma(hn::Set(F(), weights[r * kSegmentTokens + j]), value, sums[r][c]);
      }
    }
  }
  HWY_UNROLL(4)
  for (int r = 0; r < kRows; ++r) {
    HWY_UNROLL(4)
    for (int c = 0; c < kCount; ++c) hn::StoreU(sums[r][c], F(), out + r * padded_dim + c * kLanes);
  }
}

template <int kRows, typename TakeLines>
void AddValuesToRows(const float* weights, const float* values, std::int64_t begin, std::int64_t end,
                     std::size_t padded_dim, float* out, TakeLines take_lines) {
  if (begin >= end) return;
  std::size_t d = 0;
  for (; d + kVectorsPerValue * kLanes <= padded_dim; d += kVectorsPerValue * kLanes) {
    AddValues<kRows, kVectorsPerValue>(weights, values + d, begin, end, padded_dim, take_lines(kBlockTokens), out + d);
  }
  for (; d < padded_dim; d += kLanes) {
    AddValues<kRows, 1>(weights, values + d, begin, end, padded_dim, take_lines(kBlockTokens), out + d);
  }
}

// The arithmetic of AttentionState on this target.
template <typename Out>
struct StateArithmetic {
  std::int64_t dim;
  Out* result;  // of the row being normalized

  float Exp2(float x) const { return hn::GetLane(HWY_NAMESPACE::Exp2(hn::Set(F(), x))); }
  void ScaleAdd(float* running, float a, const float* segment, float b) const {
    for (std::int64_t d = 0; d < dim; d += kLanes) {
      const VF scaled = hn::Mul(hn::LoadU(F(), running + d), hn::Set(F(), a));
      hn::StoreU(Fma(hn::LoadU(F(), segment + d), hn::Set(F(), b), scaled), F(), running + d);
    }
  }
  void Scale(const float* out, float factor) const {
    constexpr auto kStep = static_cast<std::int64_t>(kLanes);
    std::int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
      StoreNarrow(hn::Mul(hn::LoadU(F(), out + d), hn::Set(F(), factor)), result + d);
    }
    if (d < dim) {
      StoreTail(hn::Mul(hn::LoadU(F(), out + d), hn::Set(F(), factor)), static_cast<std::size_t>(dim - d), result + d);
    }
  }
};

using States = RowStates<StateArithmetic>;

// Working memory of one tile, carved from the worker's scratch.
struct TileMemory {
  float* q;                        // [rows][dim]
  float* keys;                     // [kStripsPerScore][dim][16]
  float* values;                   // [16][padded_dim]
  float* scores;                   // [rows][kSegmentTokens]
  float* segment;                  // [rows][padded_dim]
  AttentionState* segment_states;  // [rows]
  std::byte* running;

  TileMemory(const TileRows& tile_rows, std::size_t dim, std::size_t padded_dim, Scratch& scratch) {
    const auto rows = static_cast<std::size_t>(tile_rows.size());
    const auto parts = scratch.Split({rows * dim * 4, kStripsPerScore * dim * kGroup * 4, kGroup * padded_dim * 4,
                                      rows * kSegmentTokens * 4, rows * padded_dim * 4, rows * sizeof(AttentionState),
                                      States::SizeBytes(tile_rows)});
    q = reinterpret_cast<float*>(parts[0]);
    keys = reinterpret_cast<float*>(parts[1]);
    values = reinterpret_cast<float*>(parts[2]);
    scores = reinterpret_cast<float*>(parts[3]);
    segment = reinterpret_cast<float*>(parts[4]);
    segment_states = reinterpret_cast<AttentionState*>(parts[5]);
    running = parts[6];
  }
};

// One tile with K and V of type T.
template <typename T>
class TileRun {
 public:
  TileRun(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch)
      : rows_(args, tile),
        dim_(static_cast<std::size_t>(args.kv.layout.head_dim)),
        padded_dim_((dim_ + kLanes - 1) / kLanes * kLanes),
        memory_(rows_, dim_, padded_dim_, scratch),
        states_(rows_, memory_.running) {}

  void Run() {
    const AttentionTile& tile = rows_.tile();
    if (rows_.args().q_dtype == DType::kF32) {
      WidenQueries<float>();
    } else {
      WidenQueries<std::uint16_t>();
    }
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
  const T* StripOf(std::int64_t block) const { return reinterpret_cast<const T*>(rows_.StripOf(block)); }

  template <typename Q>
  void WidenQueries() {
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      const Q* const from = reinterpret_cast<const Q*>(rows_.args().q) + rows_.OffsetOf(r);
      float* const to = memory_.q + r * dim_;
      std::size_t d = 0;
      for (; d + kLanes <= dim_; d += kLanes) hn::StoreU(LoadWide(from + d), F(), to + d);
      for (; d < dim_; ++d) to[d] = Widen(from[d]);
    }
  }

  // The next lines of the strips that follow. Memory is read all the time then, not only between two computations.
  Lines TakeLines(std::size_t count) {
    if (ahead_block_ > last_block_) return {reinterpret_cast<const std::byte*>(memory_.q), 0};
    const Lines lines = {reinterpret_cast<const std::byte*>(StripOf(ahead_block_)) + ahead_bytes_, 64};
    ahead_bytes_ += count * 64;
    if (ahead_bytes_ >= rows_.args().kv.layout.strip_bytes()) {
      ahead_bytes_ = 0;
      ++ahead_block_;
    }
    return lines;
  }
  auto LineTaker() {
    return [this](std::size_t count) { return TakeLines(count); };
  }
  // What is fetched is beyond block `current` and at most a segment away, so that it is still cached when its turn
  // comes.
  void FetchBeyond(std::int64_t current) {
    last_block_ = std::min(current + kStripsPerSegment, (rows_.tile().key_end - 1) / kBlockTokens);
    if (ahead_block_ > current) return;
    ahead_block_ = current + 1;
    ahead_bytes_ = 0;
  }

  void RunSegment(std::int64_t begin) {
    const std::int64_t end = std::min(begin + kSegmentTokens, rows_.tile().key_end);
    const std::int64_t first_row = rows_.FirstRowOf(begin);
    ScoreSegment(begin, end);
    if (rows_.args().row_bias != nullptr) AddRowBias(begin, end);
    for (std::int64_t r = first_row; r < rows_.size(); ++r) {
      AttentionState& state = memory_.segment_states[r];
      state.out = memory_.segment + r * padded_dim_;
      Softmax(rows_.NumBeforeWindow(r, begin), rows_.NumKeys(r, begin, end), memory_.scores + r * kSegmentTokens,
              state);
    }
    std::fill_n(memory_.segment + first_row * padded_dim_, (rows_.size() - first_row) * padded_dim_, 0.0F);
    for (std::int64_t at = begin; at < end; at += kBlockTokens) AddStrip(at, begin, end);
    for (std::int64_t r = first_row; r < rows_.size(); ++r) states_.Take(begin, r, memory_.segment_states[r]);
  }

  void ScoreSegment(std::int64_t begin, std::int64_t end) {
    const float scale = rows_.args().scale * kLog2E;
    const std::int64_t block_end = (end + kBlockTokens - 1) / kBlockTokens;
    for (std::int64_t block = begin / kBlockTokens; block < block_end;) {
      const std::int64_t count = block_end - block >= kStripsPerScore ? kStripsPerScore : 1;
      for (std::int64_t s = 0; s < count; ++s) {
        TransposeKeys(StripOf(block + s), dim_, memory_.keys + s * dim_ * kGroup);
      }
      FetchBeyond(block + count - 1);
      const std::int64_t first_row = rows_.FirstRowOf(block * kBlockTokens);
      const float* const q = memory_.q + first_row * dim_;
      float* const scores = memory_.scores + first_row * kSegmentTokens + (block * kBlockTokens - begin);
      if (count == 1) {
        ScoreRows<1>(q, rows_.size() - first_row, memory_.keys, dim_, scale, scores, LineTaker());
      } else {
        ScoreRows<kStripsPerScore>(q, rows_.size() - first_row, memory_.keys, dim_, scale, scores, LineTaker());
      }
      block += count;
    }
  }

  void AddRowBias(std::int64_t begin, std::int64_t end) {
    const VF unit = hn::Set(F(), kLog2E);
    for (std::int64_t at = begin; at < end; at += kBlockTokens) {
      const float* const bias = rows_.RowBiasOf(at / kBlockTokens);
      for (std::int64_t r = rows_.FirstRowOf(at); r < rows_.size(); ++r) {
        float* const scores = memory_.scores + r * kSegmentTokens + (at - begin);
        for (std::size_t lane = 0; lane < kGroup; lane += kLanes) {
          hn::StoreU(Fma(hn::LoadU(F(), bias + lane), unit, hn::LoadU(F(), scores + lane)), F(), scores + lane);
        }
      }
    }
  }

  // The values of the strip at position `at` into the states of segment [begin, end).
  void AddStrip(std::int64_t at, std::int64_t begin, std::int64_t end) {
    last_block_ = std::min((at + kSegmentTokens) / kBlockTokens, (rows_.tile().key_end - 1) / kBlockTokens);
    const std::int64_t num_tokens = std::min<std::int64_t>(kBlockTokens, end - at);
    WidenValues(StripOf(at / kBlockTokens), static_cast<std::size_t>(num_tokens), dim_, padded_dim_, memory_.values);
    // Row r sees tokens [unseen(r), seen(r)) of this strip; none of the others is touched, since 0 times infinity is
    // not 0.
    const auto seen = [&](std::int64_t r) { return std::min(rows_.NumKeys(r, begin, end) - (at - begin), num_tokens); };
    const auto unseen = [&](std::int64_t r) { return rows_.NumBeforeWindow(r, at); };
    const auto add = [&]<int kRows>(std::int64_t r, std::int64_t from, std::int64_t to) {
      AddValuesToRows<kRows>(memory_.scores + r * kSegmentTokens + (at - begin), memory_.values, from, to, padded_dim_,
                             memory_.segment + r * padded_dim_, LineTaker());
    };
    std::int64_t r = rows_.FirstRowOf(at);
    for (; r + kRowsPerValue <= rows_.size(); r += kRowsPerValue) {
      // Later rows see later tokens.
      const std::int64_t common_begin = std::min(unseen(r + kRowsPerValue - 1), num_tokens);
      const std::int64_t common_end = std::max(seen(r), common_begin);
      for (std::int64_t i = 0; i + 1 < kRowsPerValue; ++i) {
        add.template operator()<1>(r + i, unseen(r + i), std::min(seen(r + i), common_begin));
      }
      add.template operator()<kRowsPerValue>(r, common_begin, std::min(seen(r), num_tokens));
      for (std::int64_t i = 0; i < kRowsPerValue; ++i) {
        add.template operator()<1>(r + i, std::max(common_end, unseen(r + i)), seen(r + i));
      }
    }
    for (; r < rows_.size(); ++r) add.template operator()<1>(r, unseen(r), seen(r));
  }

  const TileRows rows_;
  const std::size_t dim_;
  const std::size_t padded_dim_;
  const TileMemory memory_;
  States states_;
  std::int64_t ahead_block_ = 0;  // what TakeLines hands out next
  std::size_t ahead_bytes_ = 0;
  std::int64_t last_block_ = 0;
};

void Attend(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch) {
  if (args.kv.layout.dtype == DType::kF32) {
    TileRun<float>(args, tile, scratch).Run();
  } else {
    TileRun<std::uint16_t>(args, tile, scratch).Run();
  }
}

void Merge(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch) {
  TileRun<float>(args, tile, scratch).Merge();
}

// The transposition of a strip is shared among the rows of a tile.
constexpr AttentionBodies kAttentionBodies = {128, 1, Attend, Merge};

}  // namespace spillway::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include "kernels/cpu/choose_target.h"

namespace spillway::cpu {

const AttentionBodies& AttentionBodiesOf(Target target) { SPILLWAY_CHOOSE_TARGET(target, kAttentionBodies) }

}  // namespace spillway::cpu
#endif  // HWY_ONCE
