#include "kernels/cpu/attention_decode.h"

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/cpu/attention_pack.h"
#include "kernels/cpu/attention_softmax.h"
#include "kernels/cpu/bf16_states.h"
#include "kernels/cpu/bf16_tiles.h"
#include "kernels/cpu/strip_fetcher.h"
#include "kernels/cpu/tsan.h"

#define SPILLWAY_AMX_VECTORS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16")))

namespace spillway::cpu {
namespace {

// Columns of tiles whose sums stay in registers while all keys of a segment pass by.
constexpr std::int64_t kColumnsPerPass = 4;
constexpr std::int64_t kTileFloats = kTileRows * kTileColumns;

// The intrinsics do not tell the compiler what memory they read and write.
inline void OrderMemory() { asm volatile("" ::: "memory"); }

// A kv head of the tile.
struct Head {
  Head(const AttentionArgs& args, const AttentionTile& whole, int kv_head)
      : tile(OfHead(whole, kv_head)), rows(args, tile) {}

  static AttentionTile OfHead(AttentionTile tile, int kv_head) {
    tile.kv_head = kv_head;
    return tile;
  }

  const AttentionTile tile;
  const TileRows rows;
};

// The keys of a segment, for one head.
struct Unit {
  int head = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  RowBlock block;        // all rows
  int parity = 0;        // of the buffers that neighbouring units do not share
  bool is_last = false;  // of its head
};

// A load of a tile waits until what was stored there has reached the cache. So the tiles of one unit are multiplied
// while vectors of its neighbour are computed, and what becomes a tile is stored some work before it is loaded.
class DecodeRun {
 public:
  DecodeRun(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch)
      : tile_(tile),
        dim_(args.kv.layout.head_dim),
        depth_(dim_ / kTileDepth),
        outs_stride_(dim_ + kTileColumns),
        scale_(args.scale * kLog2E),
        rows_(args, tile),
        fetcher_(rows_) {
    for (int h = 0; h < tile.num_heads; ++h) heads_[static_cast<std::size_t>(h)].emplace(args, tile, tile.kv_head + h);
    const auto depth = static_cast<std::size_t>(depth_);
    const auto parts = scratch.Split(
        {static_cast<std::size_t>(tile.num_heads) * depth * kTileBytes, 4 * kTileBytes,
         2 * kGroupsPerSegment * kGroupScores * sizeof(float),
         (kGroupsPerSegment * kGroupWeights + kTileRows * kGroupKeys) * 2, 2 * kColumnsPerPass * kTileBytes,
         2 * kTileRows * static_cast<std::size_t>(outs_stride_) * sizeof(float), Bf16States::SizeBytes(rows_)});
    queries_ = parts[0];
    turned_ = reinterpret_cast<float*>(parts[1]);
    scores_ = reinterpret_cast<float*>(parts[2]);
    weights_ = reinterpret_cast<std::uint16_t*>(parts[3]);
    values_ = parts[4];
    outs_ = reinterpret_cast<float*>(parts[5]);
    states_memory_ = parts[6];
  }

  void Run() {
    if (tile_.key_begin >= tile_.key_end) {
      for (int h = 0; h < tile_.num_heads; ++h) {
        Begin(h);
        states_->Finish();
      }
      return;
    }
    for (int h = 0; h < tile_.num_heads; ++h) PackQueries(h);
    std::array<Unit, 3> units;
    Unit* before = nullptr;
    Unit* unit = units.data();
    Unit* next = unit + 1;
    Make(0, tile_.key_begin, *unit);
    for (std::int64_t group = 0; group < unit->block.num_groups; ++group) {
      MultiplyKeys(*unit, group);
      TurnScores(*unit, group);
    }
    while (true) {
      const bool has_next = MakeNext(*unit, *next);
      const std::int64_t next_groups = has_next ? next->block.num_groups : 0;
      FindMaxes(scores_of(*unit), scale_, 0, rows_.size(), unit->block);
      for (std::int64_t group = 0; group < std::max(unit->block.num_groups, next_groups); ++group) {
        if (group < unit->block.num_groups) WeighGroup(scores_of(*unit), scale_, group, unit->block, weights_);
        if (group >= next_groups) continue;
        MultiplyKeys(*next, group);
        if (group > 0) TurnScores(*next, group - 1);
      }
      AddValues(*unit, [&] {
        if (before != nullptr) Take(*before);
        if (has_next) TurnScores(*next, next_groups - 1);
      });
      if (!has_next) break;
      Unit* const free = before != nullptr ? before : unit + 2;
      before = unit;
      unit = next;
      next = free;
    }
    Take(*unit);
  }

 private:
  float* scores_of(const Unit& unit) const { return scores_ + unit.parity * kGroupsPerSegment * kGroupScores; }
  float* outs_of(const Unit& unit) const { return outs_ + unit.parity * kTileRows * outs_stride_; }
  const TileRows& rows_of(const Unit& unit) const { return heads_[static_cast<std::size_t>(unit.head)]->rows; }

  // As MakeRowBlock, for rows that all see the same keys.
  void Make(int head, std::int64_t begin, Unit& unit) const {
    unit.head = head;
    unit.begin = begin;
    unit.end = std::min<std::int64_t>(begin + kSegmentTokens, tile_.key_end);
    unit.is_last = unit.end == tile_.key_end;
    const std::int64_t num_keys = unit.end - begin;
    const std::int64_t num_unseen = rows_.NumBeforeWindow(0, begin);
    std::fill_n(unit.block.begins, rows_.size(), num_unseen);
    std::fill_n(unit.block.ends, rows_.size(), num_keys);
    unit.block.row_end = rows_.size();
    unit.block.num_groups = (num_keys + kGroupKeys - 1) / kGroupKeys;
    unit.block.whole_begin = (num_unseen + kGroupKeys - 1) / kGroupKeys;
    unit.block.whole_end = num_keys / kGroupKeys;
  }
  // Heads one after the other, the segments of each in position order. False: there is none.
  bool MakeNext(const Unit& unit, Unit& next) const {
    if (unit.is_last && unit.head + 1 == tile_.num_heads) return false;
    Make(unit.is_last ? unit.head + 1 : unit.head, unit.is_last ? tile_.key_begin : unit.end, next);
    next.parity = 1 - unit.parity;
    return true;
  }

  // As the right matrix of their products with keys: those are the left one, as they lie in memory.
  SPILLWAY_AMX_VECTORS void PackQueries(int head) {
    const TileRows& rows = heads_[static_cast<std::size_t>(head)]->rows;
    alignas(64) std::uint16_t part[kTileRows * kTileDepth];
    for (std::int64_t d = 0; d < depth_; ++d) {
      for (std::int64_t r = 0; r < rows.size(); ++r) {
        const auto* const from = reinterpret_cast<const std::uint16_t*>(rows.args().q) + rows.OffsetOf(r);
        _mm512_store_si512(part + r * kTileDepth, _mm512_loadu_si512(from + d * kTileDepth));
      }
      TransposeTile(part, kTileDepth, queries_ + (head * depth_ + d) * static_cast<std::int64_t>(kTileBytes));
    }
  }

  // [strip of the group][key][row]; those of a group's neighbours lie elsewhere.
  float* TurnedOf(std::int64_t group) const { return turned_ + group % 2 * 2 * kTileFloats; }

  SPILLWAY_AMX_VECTORS void MultiplyKeys(const Unit& unit, std::int64_t group) {
    const TileRows& rows = rows_of(unit);
    const std::int64_t block = (unit.begin + group * kGroupKeys) / kBlockTokens;
    const bool has_second = (block + 1) * kBlockTokens < unit.end;
    const auto* const first = reinterpret_cast<const std::uint16_t*>(rows.StripOf(block));
    const auto* const second = has_second ? reinterpret_cast<const std::uint16_t*>(rows.StripOf(block + 1)) : first;
    const auto stride = static_cast<std::size_t>(2 * dim_) * 2;
    const std::byte* const queries = queries_ + unit.head * depth_ * static_cast<std::int64_t>(kTileBytes);
    DeclareRead(first, rows.args().kv.layout.strip_bytes());
    DeclareRead(second, rows.args().kv.layout.strip_bytes());
    OrderMemory();
    _tile_zero(0);
    _tile_zero(1);
    fetcher_.Read(unit.head, block);
    for (std::int64_t d = 0; d < depth_; ++d) {
      fetcher_.Fetch(32);
      _tile_loadd(4, queries + d * static_cast<std::int64_t>(kTileBytes), 64);
      _tile_loadd(2, first + d * kTileDepth, stride);
      _tile_dpbf16ps(0, 2, 4);
      if (!has_second) continue;
      _tile_loadd(3, second + d * kTileDepth, stride);
      _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(0, TurnedOf(group), 64);
    if (has_second) _tile_stored(1, TurnedOf(group) + kTileFloats, 64);
    OrderMemory();
  }

  SPILLWAY_AMX_VECTORS void TurnScores(const Unit& unit, std::int64_t group) {
    const TileRows& rows = rows_of(unit);
    for (std::int64_t strip = 0; strip < 2; ++strip) {
      const std::int64_t at = unit.begin + group * kGroupKeys + strip * kBlockTokens;
      if (at >= unit.end) return;
      const float* const turned = TurnedOf(group) + strip * kTileFloats;
      float* const scores = scores_of(unit) + group * kGroupScores + strip * kBlockTokens;
      __m512 bias = _mm512_setzero_ps();
      const bool has_bias = rows.args().row_bias != nullptr;
      // Scores are not scaled yet.
      if (has_bias) {
        bias = _mm512_mul_ps(_mm512_loadu_ps(rows.RowBiasOf(at / kBlockTokens)), _mm512_set1_ps(1 / rows.args().scale));
      }
      for (int quarter = 0; 4 * quarter < rows.size(); ++quarter) {
        const Quarter q = TransposeQuarter(reinterpret_cast<const std::uint16_t*>(turned), 2 * kTileColumns, quarter);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m512 row = _mm512_castsi512_ps(q.columns[i]);
          if (has_bias) row = _mm512_add_ps(row, bias);
          _mm512_storeu_ps(scores + (4 * quarter + i) * kGroupKeys, row);
        }
      }
    }
  }

  // Of all keys of the unit, by passes over columns. Calls beside() once, before the last products.
  template <typename Beside>
  void AddValues(const Unit& unit, Beside beside) {
    const std::int64_t num_columns = dim_ / kTileColumns;
    for (std::int64_t column = 0; column < num_columns; column += kColumnsPerPass) {
      const bool is_last = column + kColumnsPerPass >= num_columns;
      const auto last = [&] {
        if (is_last) beside();
      };
      if (column + 2 == num_columns) {
        AddColumns<2>(unit, column, last);
      } else {
        AddColumns<4>(unit, column, last);
      }
    }
  }

  // Tiles 0 to 3 are the sums of columns, 4 those of the weights.
  template <std::int64_t kColumns, typename Beside>
  SPILLWAY_AMX_VECTORS void AddColumns(const Unit& unit, std::int64_t column, Beside beside) {
    const std::int64_t last = unit.block.num_groups - 1;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    for (std::int64_t group = 0; group <= last; ++group) {
      PackValues<kColumns>(unit, group, column);
      if (group > 0) MultiplyValues<kColumns>(group - 1, column == 0);
    }
    beside();
    MultiplyValues<kColumns>(last, column == 0);
    float* const outs = outs_of(unit);
    const auto stride = static_cast<std::size_t>(outs_stride_) * sizeof(float);
    _tile_stored(0, outs + column * kTileColumns, stride);
    _tile_stored(1, outs + (column + 1) * kTileColumns, stride);
    if constexpr (kColumns == 4) {
      _tile_stored(2, outs + (column + 2) * kTileColumns, stride);
      _tile_stored(3, outs + (column + 3) * kTileColumns, stride);
    }
    if (column == 0) _tile_stored(4, outs + dim_, stride);
    OrderMemory();
  }

  std::byte* ValuesOf(std::int64_t group) const {
    return values_ + group % 2 * kColumnsPerPass * static_cast<std::int64_t>(kTileBytes);
  }

  // Pairs of tokens, of 32 columns those [0, 4), [8, 12), ... in the first tile and the others in the second: Take puts
  // them in order. Zeros for tokens that are not seen.
  template <std::int64_t kColumns>
  void PackValues(const Unit& unit, std::int64_t group, std::int64_t column) {
    std::byte* to = ValuesOf(group);
    for (std::int64_t at = unit.begin + group * kGroupKeys; to < ValuesOf(group) + kTileBytes; at += kBlockTokens) {
      const std::int64_t block = std::min(at, unit.end - 1) / kBlockTokens;
      const auto* const values =
          reinterpret_cast<const std::uint16_t*>(rows_of(unit).StripOf(block)) + dim_ + column * kTileColumns;
      fetcher_.Read(unit.head, block);
      if (unit.block.IsWhole(group)) {
        PackStrip<kColumns>(
            values, [](std::int64_t) { return true; }, to);
      } else {
        PackStrip<kColumns>(
            values,
            [&](std::int64_t j) {
              return unit.begin + unit.block.begins[0] <= at + j && at + j < unit.begin + unit.block.ends[0];
            },
            to);
      }
      to += kBlockTokens / 2 * 64;
    }
  }
  template <std::int64_t kColumns, typename IsSeen>
  SPILLWAY_AMX_VECTORS void PackStrip(const std::uint16_t* values, IsSeen is_seen, std::byte* to) {
    for (std::int64_t j = 0; j < kBlockTokens; j += 2, to += 64, values += 4 * dim_) {
      fetcher_.Fetch(static_cast<int>(kColumns));
#pragma GCC unroll 2
      for (std::int64_t c = 0; c < kColumns; c += 2) {
        const std::uint16_t* const at = values + c * kTileColumns;
        const __m512i even = is_seen(j) ? _mm512_loadu_si512(at) : _mm512_setzero_si512();
        const __m512i odd = is_seen(j + 1) ? _mm512_loadu_si512(at + 2 * dim_) : _mm512_setzero_si512();
        _mm512_store_si512(to + c * static_cast<std::int64_t>(kTileBytes), _mm512_unpacklo_epi16(even, odd));
        _mm512_store_si512(to + (c + 1) * static_cast<std::int64_t>(kTileBytes), _mm512_unpackhi_epi16(even, odd));
      }
    }
  }

  template <std::int64_t kColumns>
  SPILLWAY_AMX_VECTORS void MultiplyValues(std::int64_t group, bool with_sums) {
    const std::byte* const values = ValuesOf(group);
    OrderMemory();
    _tile_loadd(5, weights_ + group * kGroupWeights, 64);
    _tile_loadd(6, values, 64);
    _tile_dpbf16ps(0, 5, 6);
    _tile_loadd(7, values + kTileBytes, 64);
    _tile_dpbf16ps(1, 5, 7);
    if constexpr (kColumns == 4) {
      _tile_loadd(6, values + 2 * kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, values + 3 * kTileBytes, 64);
      _tile_dpbf16ps(3, 5, 7);
    }
    if (!with_sums) return;
    _tile_loadd(6, kOnes.data(), 64);
    _tile_dpbf16ps(4, 5, 6);
  }

  // The unit's outputs are complete.
  SPILLWAY_AMX_VECTORS void Take(const Unit& unit) {
    const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const SegmentOuts outs{outs_of(unit), dim_, dim_, outs_stride_};
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      for (std::int64_t d = 0; d < dim_; d += 32) {
        float* const at = outs.Of(r) + d;
        const __m512 first = _mm512_loadu_ps(at);
        const __m512 second = _mm512_loadu_ps(at + 16);
        _mm512_storeu_ps(at, _mm512_permutex2var_ps(first, low, second));
        _mm512_storeu_ps(at + 16, _mm512_permutex2var_ps(first, high, second));
      }
    }
    if (tile_.segment_states != nullptr) {
      Bf16States kept(rows_of(unit), states_memory_);
      for (std::int64_t r = 0; r < rows_.size(); ++r) {
        kept.Take(unit.begin, r, {unit.block.maxes[r], outs.SumOf(r), outs.Of(r)});
      }
      return;
    }
    if (unit.begin == tile_.key_begin) Begin(unit.head);
    MergeBlockRows(outs, unit.block, 0, rows_.size(), *states_);
    if (unit.is_last) states_->Finish();
  }

  void Begin(int head) {
    states_.emplace(heads_[static_cast<std::size_t>(head)]->rows, states_memory_);
    states_->Begin();
  }

  const AttentionTile& tile_;
  const std::int64_t dim_;
  const std::int64_t depth_;
  const std::int64_t outs_stride_;
  const float scale_;
  const TileRows rows_;  // of the first head
  std::array<std::optional<Head>, kMostDecodeHeads> heads_;
  std::optional<Bf16States> states_;  // of the head at hand
  StripFetcher fetcher_;
  std::byte* queries_;      // tiles [head][depth]
  float* turned_;           // scores of two groups
  float* scores_;           // of two units, groups as attention_softmax.h has them
  std::uint16_t* weights_;  // groups, likewise
  std::byte* values_;       // of two groups: tiles [column]
  float* outs_;             // of two units: [row][dim], the sum behind them
  std::byte* states_memory_;
};

}  // namespace

bool IsDecode(const AttentionArgs& args, const AttentionTile& tile) {
  return tile.token_end - tile.token_begin == 1 && args.kv.layout.head_dim % kTileDepth == 0 &&
         args.num_heads / args.kv.layout.num_kv_heads <= kMostDecodeRows;
}

void AttendDecode(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch) {
  kAmxTiles.begin();
  DecodeRun(args, tile, scratch).Run();
  kAmxTiles.end();
}

}  // namespace spillway::cpu

#endif
