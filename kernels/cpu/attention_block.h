#pragma once

// A block of query rows of a tile, what attention_bf16.cc weighs at a time, and how its scores and weights lie: in
// groups of 32 keys, [group][row][32 keys].

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/bf16_vectors.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstdint>

namespace spillway::cpu {

inline constexpr std::int64_t kRowsPerBlock = 32;
inline constexpr std::int64_t kGroupKeys = 32;
inline constexpr std::int64_t kGroupsPerSegment = kSegmentTokens / kGroupKeys;
// Between groups, in elements. Not a power of two: a row's groups would meet in few lines of the nearest cache.
inline constexpr std::int64_t kGroupScores = kRowsPerBlock * kGroupKeys + 32;
inline constexpr std::int64_t kGroupWeights = kRowsPerBlock * kGroupKeys + 32;

// Query rows [row_begin, row_end) of a tile and the keys of a segment that they see: [begins[i], ends[i]), counted from
// the segment's first; none where that is empty.
struct alignas(64) RowBlock {
  float maxes[kRowsPerBlock] = {};  // of the scaled scores; minus infinity: no key
  std::int64_t begins[kRowsPerBlock] = {};
  std::int64_t ends[kRowsPerBlock] = {};
  std::int64_t row_begin = 0;
  std::int64_t row_end = 0;
  std::int64_t num_groups = 0;   // up to the last key that some row sees
  std::int64_t whole_begin = 0;  // groups whose keys all rows see
  std::int64_t whole_end = 0;

  std::int64_t size() const { return row_end - row_begin; }
  bool IsWhole(std::int64_t group) const { return whole_begin <= group && group < whole_end; }
  // Keys [at, at + 16) that row i sees.
  __mmask16 Lanes(std::int64_t i, std::int64_t at) const {
    return static_cast<__mmask16>(FirstLanes(ends[i] - at) & ~FirstLanes(begins[i] - at));
  }
};

// Up to kRowsPerBlock rows of a tile from `row_begin` on, and the keys of segment [begin, end).
inline RowBlock MakeRowBlock(const TileRows& rows, std::int64_t begin, std::int64_t end, std::int64_t row_begin) {
  RowBlock block;
  block.row_begin = row_begin;
  block.row_end = std::min(row_begin + kRowsPerBlock, rows.size());
  if (rows.AllSee(begin, end)) {  // as nearly always
    std::fill_n(block.ends, kRowsPerBlock, end - begin);
    block.num_groups = (end - begin + kGroupKeys - 1) / kGroupKeys;
    block.whole_end = (end - begin) / kGroupKeys;
    return block;
  }
  std::int64_t most = 0;
  std::int64_t last_begin = 0;
  std::int64_t first_end = end - begin;
  for (std::int64_t i = 0; i < block.size(); ++i) {
    block.begins[i] = rows.NumBeforeWindow(row_begin + i, begin);
    block.ends[i] = std::max<std::int64_t>(rows.NumKeys(row_begin + i, begin, end), 0);
    most = std::max(most, block.ends[i]);
    last_begin = std::max(last_begin, block.begins[i]);
    first_end = std::min(first_end, block.ends[i]);
  }
  block.num_groups = (most + kGroupKeys - 1) / kGroupKeys;
  block.whole_begin = (last_begin + kGroupKeys - 1) / kGroupKeys;
  block.whole_end = first_end / kGroupKeys;
  return block;
}

}  // namespace spillway::cpu

#endif
