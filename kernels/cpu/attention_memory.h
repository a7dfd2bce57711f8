#pragma once

// The working memory of attention_bf16.cc.

#include "kernels/cpu/attention_block.h"
#include "kernels/cpu/bf16_states.h"
#include "kernels/cpu/bf16_tiles.h"
#include "kernels/cpu/scratch.h"

#if defined(__x86_64__)

#include <cstddef>
#include <cstdint>

namespace spillway::cpu {

// Working memory of one tile, carved from the worker's scratch. Rows of `queries` and of the block's arrays are padded:
// any of them may be the first of a tile.
struct TileMemory {
  std::uint16_t* queries;  // [rows + kRowsPerBlock][padded_dim]
  std::byte* keys;         // tiles, of up to a segment
  std::byte* values;       // tiles, of up to a segment
  float* scores;           // groups of a segment, as attention_softmax.h has them
  std::uint16_t* weights;  // likewise
  float* outs;             // [rows of a block][padded_dim + kTileColumns], the sum behind the values
  std::byte* states;

  TileMemory(const TileRows& rows, std::int64_t padded_dim, Scratch& scratch) {
    const auto padded = static_cast<std::size_t>(padded_dim);
    const auto parts =
        scratch.Split({static_cast<std::size_t>(rows.size() + kRowsPerBlock) * padded * 2, kSegmentTokens * padded * 2,
                       kSegmentTokens * padded * 2, kGroupsPerSegment * kGroupScores * 4,
                       (kGroupsPerSegment * kGroupWeights + kTileRows * kGroupKeys) * 2,
                       (kRowsPerBlock + kTileRows) * (padded + kTileColumns) * 4, Bf16States::SizeBytes(rows)});
    queries = reinterpret_cast<std::uint16_t*>(parts[0]);
    keys = parts[1];
    values = parts[2];
    scores = reinterpret_cast<float*>(parts[3]);
    weights = reinterpret_cast<std::uint16_t*>(parts[4]);
    outs = reinterpret_cast<float*>(parts[5]);
    states = parts[6];
  }
};

}  // namespace spillway::cpu

#endif
