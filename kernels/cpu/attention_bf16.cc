// Attention over bf16 in products of bf16 tiles (bf16_tiles.h). Scores: the left matrix is the query rows, the right
// one a strip's keys, so that lanes are keys. Values: the left matrix is the weights, rounded to bf16, the right one
// the values of 32 tokens. The sum of a row is that of the rounded weights, the product with a column of ones.

#include "kernels/cpu/attention.h"
#include "kernels/cpu/bf16_tiles.h"

#if defined(__x86_64__)

#include <algorithm>

#include "kernels/cpu/attention_block.h"
#include "kernels/cpu/attention_decode.h"
#include "kernels/cpu/attention_memory.h"
#include "kernels/cpu/attention_pack.h"
#include "kernels/cpu/attention_softmax.h"
#include "kernels/cpu/bf16_states.h"
#include "kernels/cpu/strip_fetcher.h"
#include "kernels/cpu/tsan.h"

namespace spillway::cpu {
namespace {

// Tokens whose values are packed before they are multiplied, where rows are few.
constexpr std::int64_t kValuesPerPiece = 64;
static_assert(kBlockTokens == kTileColumns && kRowsPerBlock % kTileRows == 0 && kGroupKeys == kTileDepth);

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
        outs_{memory_.outs, dim_, padded_dim_, padded_dim_ + kTileColumns},
        states_(rows_, memory_.states),
        fetcher_(rows_),
        packer_(rows_, fetcher_) {}

  void Run() {
    const AttentionTile& tile = rows_.tile();
    packer_.CopyQueries(memory_.queries);
    if (tile.segment_states == nullptr) states_.Begin();
    for (std::int64_t begin = tile.key_begin; begin < tile.key_end; begin += kSegmentTokens) {
      const std::int64_t end = std::min<std::int64_t>(begin + kSegmentTokens, tile.key_end);
      const std::int64_t first_row = rows_.FirstRowOf(begin);
      if (rows_.size() - first_row <= kRowsPerBlock) {
        RunOneBlock(begin, end, first_row);
      } else {
        RunBlocks(begin, end, first_row);
      }
    }
    if (tile.segment_states == nullptr) states_.Finish();
  }

  void Merge() {
    states_.Begin();
    states_.MergeKept();
    states_.Finish();
  }

 private:
  // All rows that see keys of the segment are one block: packed and multiplied piece by piece, so that what is packed
  // stays in the nearest cache.
  void RunOneBlock(std::int64_t begin, std::int64_t end, std::int64_t first_row) {
    RowBlock block = MakeRowBlock(rows_, begin, end, first_row);
    for (std::int64_t group = 0; group < block.num_groups; ++group) {
      const std::int64_t at = begin + group * kGroupKeys;
      packer_.PackKeys(at, std::min(at + kGroupKeys, end), memory_.keys);
      MultiplyKeys(begin, end, group, memory_.keys, block);
    }
    FindMaxes(block, 0);
    FindMaxes(block, kTileRows);
    for (std::int64_t group = 0; group < block.num_groups; ++group) Weigh(group, block);
    if (AddValues(begin, end, begin, block, 0, block.size())) {
      TakeRows(begin, block, 0, block.size());
    } else {
      TakeByToken(begin, block);
    }
  }

  // Each block's weights are made between the products of the next one's scores, and its values multiplied between the
  // next one's maxima: tiles are multiplied beside vectors.
  void RunBlocks(std::int64_t begin, std::int64_t end, std::int64_t first_row) {
    packer_.PackKeys(begin, end, memory_.keys);
    const bool is_finite = packer_.PackValues(begin, end, begin, memory_.values);
    RowBlock block = MakeRowBlock(rows_, begin, end, first_row);
    for (std::int64_t group = 0; group < block.num_groups; ++group) MultiplyPackedKeys(begin, end, group, block);
    FindMaxes(block, 0);
    FindMaxes(block, kTileRows);
    while (true) {
      const bool has_next = block.row_end < rows_.size();
      RowBlock next = has_next ? MakeRowBlock(rows_, begin, end, block.row_end) : RowBlock();
      for (std::int64_t group = 0; group < std::max(block.num_groups, next.num_groups); ++group) {
        if (group < block.num_groups) Weigh(group, block);
        if (group < next.num_groups) MultiplyPackedKeys(begin, end, group, next);
      }
      if (is_finite) {
        MultiplyValues(0, block.num_groups, memory_.values, 0, block.size(), [&](std::int64_t column) {
          if (column == 0) FindMaxes(next, 0);
          if (column + 2 == padded_dim_ / kTileColumns) FindMaxes(next, kTileRows);
        });
        TakeRows(begin, block, 0, block.size());
      } else {
        TakeByToken(begin, block);
        FindMaxes(next, 0);
        FindMaxes(next, kTileRows);
      }
      if (!has_next) return;
      block = next;
    }
  }

  float* ScoresOf(std::int64_t group) const { return memory_.scores + group * kGroupScores; }

  // Scores of a block for a group of keys of the segment [begin, end), whose packed tiles are `keys`.
  void MultiplyKeys(std::int64_t begin, std::int64_t end, std::int64_t group, const std::byte* keys,
                    const RowBlock& block) {
    const std::int64_t num_keys = std::min(kGroupKeys, end - begin - group * kGroupKeys);
    tiles_.multiply({.a = memory_.queries + block.row_begin * padded_dim_,
                     .a_stride = padded_dim_,
                     .num_rows = block.size(),
                     .b = keys,
                     .b_column_stride = static_cast<std::size_t>(depth_) * kTileBytes,
                     .b_depth_stride = kTileBytes,
                     .num_columns = (num_keys + kBlockTokens - 1) / kBlockTokens,
                     .depth = depth_,
                     .c = ScoresOf(group),
                     .c_stride = kGroupKeys});
    AddRowBias(begin, end, group, block.size());
  }
  void MultiplyPackedKeys(std::int64_t begin, std::int64_t end, std::int64_t group, const RowBlock& block) {
    const std::int64_t tiles = group * kGroupKeys / kBlockTokens * depth_;
    MultiplyKeys(begin, end, group, memory_.keys + tiles * static_cast<std::int64_t>(kTileBytes), block);
  }

  // To the scores of `num_rows` rows for a group of keys of the segment [begin, end), which are not scaled yet.
  SPILLWAY_AVX512_BF16 void AddRowBias(std::int64_t begin, std::int64_t end, std::int64_t group,
                                       std::int64_t num_rows) {
    if (rows_.args().row_bias == nullptr) return;
    const __m512 unit = _mm512_set1_ps(1 / rows_.args().scale);
    const std::int64_t group_begin = begin + group * kGroupKeys;
    for (std::int64_t at = group_begin; at < std::min(group_begin + kGroupKeys, end); at += kBlockTokens) {
      const __m512 bias = _mm512_mul_ps(_mm512_loadu_ps(rows_.RowBiasOf(at / kBlockTokens)), unit);
      float* scores = ScoresOf(group) + (at - group_begin);
      for (std::int64_t i = 0; i < num_rows; ++i, scores += kGroupKeys) {
        _mm512_storeu_ps(scores, _mm512_add_ps(_mm512_loadu_ps(scores), bias));
      }
    }
  }

  // Of the block's rows from `first` on, up to a tile of them.
  void FindMaxes(RowBlock& block, std::int64_t first) {
    if (first >= block.size()) return;
    cpu::FindMaxes(memory_.scores, scale_, first, std::min(first + kTileRows, block.size()), block);
  }
  void Weigh(std::int64_t group, const RowBlock& block) {
    WeighGroup(memory_.scores, scale_, group, block, memory_.weights);
  }

  // Adds the values of groups [group_begin, group_end), packed, to the outputs of rows [begin, end) of the block, group
  // 0 to nothing. Calls between(column) behind every two columns of tiles.
  template <typename Between>
  void MultiplyValues(std::int64_t group_begin, std::int64_t group_end, const std::byte* values, std::int64_t begin,
                      std::int64_t end, Between between) {
    const std::int64_t num_columns = padded_dim_ / kTileColumns;
    TileProduct product = {.a = memory_.weights + group_begin * kGroupWeights + begin * kGroupKeys,
                           .a_stride = kGroupKeys,
                           .a_depth_stride = kGroupWeights,
                           .num_rows = end - begin,
                           .b_column_stride = kTileBytes,
                           .b_depth_stride = static_cast<std::size_t>(num_columns) * kTileBytes,
                           .num_columns = 2,
                           .depth = group_end - group_begin,
                           .c_stride = outs_.stride,
                           .add = group_begin > 0};
    for (std::int64_t column = 0; column < num_columns; column += 2) {
      product.b = values + column * static_cast<std::int64_t>(kTileBytes);
      product.c = outs_.Of(begin) + column * kTileColumns;
      tiles_.multiply(product);
      between(column);
    }
    product.b = reinterpret_cast<const std::byte*>(kOnes.data());
    product.b_depth_stride = 0;
    product.num_columns = 1;
    product.c = outs_.Of(begin) + padded_dim_;
    tiles_.multiply(product);
  }

  // Packs and adds the values of [begin, end), a segment, piece by piece, zeros for those before `seen_from`. False: as
  // PackValues, and the outputs are not to be used.
  bool AddValues(std::int64_t begin, std::int64_t end, std::int64_t seen_from, const RowBlock& block,
                 std::int64_t row_begin, std::int64_t row_end) {
    bool is_finite = true;
    for (std::int64_t at = begin; at < end; at += kValuesPerPiece) {
      const std::int64_t at_end = std::min(at + kValuesPerPiece, end);
      is_finite = packer_.PackValues(at, at_end, seen_from, memory_.values) && is_finite;
      const std::int64_t group_end = std::min((at_end - begin + kGroupKeys - 1) / kGroupKeys, block.num_groups);
      MultiplyValues((at - begin) / kGroupKeys, group_end, memory_.values, row_begin, row_end, [](std::int64_t) {});
    }
    return is_finite;
  }

  // The outputs of rows [row_begin, row_end) of the block are complete.
  void TakeRows(std::int64_t begin, const RowBlock& block, std::int64_t row_begin, std::int64_t row_end) {
    if (rows_.tile().segment_states == nullptr) {
      for (std::int64_t i = row_begin; i < row_end; i += kTileRows) {
        MergeBlockRows(outs_, block, i, std::min(i + kTileRows, row_end), states_);
      }
      return;
    }
    for (std::int64_t i = row_begin; i < row_end; ++i) {
      states_.Take(begin, block.row_begin + i, {block.maxes[i], outs_.SumOf(i), outs_.Of(i)});
    }
  }

  // A weight of zero times an infinite value is NaN: each token's rows meet only the values that they see.
  void TakeByToken(std::int64_t begin, const RowBlock& block) {
    for (std::int64_t i = 0; i < block.size();) {
      const std::int64_t row = block.row_begin + i;
      const std::int64_t token_end = std::min(i - row % rows_.group() + rows_.group(), block.size());
      AddValues(begin, begin + block.ends[i], begin + block.begins[i], block, i, token_end);
      TakeRows(begin, block, i, token_end);
      i = token_end;
    }
  }

  const TileBodies& tiles_;
  const TileRows rows_;
  const std::int64_t dim_;
  const std::int64_t padded_dim_;
  const std::int64_t depth_;
  const float scale_;
  const TileMemory memory_;
  const SegmentOuts outs_;  // of the block at hand
  Bf16States states_;
  StripFetcher fetcher_;
  StripPacker packer_;
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

void AttendAmx(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch) {
  if (IsDecode(args, tile)) {
    AttendDecode(args, tile, scratch);
    return;
  }
  AttentionTile one = tile;
  one.num_heads = 1;
  for (int h = 0; h < tile.num_heads; ++h, ++one.kv_head) Attend<kAmxTiles>(args, one, scratch);
}

constexpr std::int64_t kRowsPerTile = 512;
constexpr AttentionBodies kAvx512Bf16Bodies = {kRowsPerTile, 1, Attend<kAvx512Bf16Tiles>, Merge<kAvx512Bf16Tiles>};
constexpr AttentionBodies kAmxBodies = {kRowsPerTile, kMostDecodeHeads, AttendAmx, Merge<kAmxTiles>};

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
