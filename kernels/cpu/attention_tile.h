#pragma once

// What the attention bodies of all targets share: where the query rows of a tile are and what they see, and what
// becomes of their partial states.

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/attention_state.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

// Query rows of one item: tokens [token_begin, token_end) of sequence `sequence`, all heads of a kv head; and the keys
// that it reads of those that the rows see. The same of further kv heads where the body takes several.
struct AttentionTile {
  std::int64_t sequence = 0;
  int kv_head = 0;  // the first
  int num_heads = 1;
  std::int64_t token_begin = 0;  // row of the step
  std::int64_t token_end = 0;
  std::int64_t key_begin = 0;  // a multiple of kSegmentTokens
  std::int64_t key_end = 0;
  // Null: this item reads all keys of its rows and finishes them. Else it is of one kv head and keeps the state of each
  // of its segments here: [segment][row][StateStride()].
  float* segment_states = nullptr;
  // What the same worker most likely attends next; may be null. And whether some tile named this one so.
  const AttentionTile* next = nullptr;
  bool is_announced = false;
};

// Floats of a kept state: out, padded to whole vectors, max, sum, padding.
inline std::int64_t StateStride(std::int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }

// First key of the call, from which on block_table lists blocks.
inline std::int64_t FirstKeyOf(const AttentionArgs& args, std::int64_t sequence) {
  return args.pass == AttentionPass::kWhole ? 0 : args.key_begin[sequence];
}

// Query rows of a tile's first kv head; they ascend in position: token by token, heads of the group within.
class TileRows {
 public:
  TileRows(const AttentionArgs& args, const AttentionTile& tile)
      : args_(args),
        tile_(tile),
        dim_(args.kv.layout.head_dim),
        group_(args.num_heads / args.kv.layout.num_kv_heads),
        size_((tile.token_end - tile.token_begin) * group_),
        first_position_(args.first_position[tile.sequence] + (tile.token_begin - args.query_begin[tile.sequence])),
        first_block_(FirstKeyOf(args, tile.sequence) / kBlockTokens),
        blocks_(args.block_table + args.block_begin[tile.sequence]) {}

  const AttentionArgs& args() const { return args_; }
  const AttentionTile& tile() const { return tile_; }
  std::int64_t size() const { return size_; }
  std::int64_t group() const { return group_; }
  std::int64_t PositionOf(std::int64_t row) const { return first_position_ + row / group_; }
  // First row that sees key `position`.
  std::int64_t FirstRowOf(std::int64_t position) const {
    return std::clamp<std::int64_t>((position - first_position_) * group_, 0, size_);
  }
  // Keys of [begin, end) that a row sees; not positive: none.
  std::int64_t NumKeys(std::int64_t row, std::int64_t begin, std::int64_t end) const {
    return std::min(PositionOf(row) + 1, end) - begin;
  }
  // Of the keys from `begin` on, how many lie before the row's window.
  std::int64_t NumBeforeWindow(std::int64_t row, std::int64_t begin) const {
    return args_.window > 0 ? std::max<std::int64_t>(PositionOf(row) + 1 - args_.window - begin, 0) : 0;
  }
  // Whether every row sees keys [begin, end).
  bool AllSee(std::int64_t begin, std::int64_t end) const {
    return end <= PositionOf(0) + 1 && NumBeforeWindow(size_ - 1, begin) == 0;
  }
  // Element offset of a row in q and out.
  std::int64_t OffsetOf(std::int64_t row) const {
    const std::int64_t head = tile_.kv_head * group_ + row % group_;
    return ((tile_.token_begin + row / group_) * args_.num_heads + head) * dim_;
  }
  // Heads count from the tile's first.
  const std::byte* StripOf(std::int64_t block, int head = 0) const {
    const KvLayout& layout = args_.kv.layout;
    return args_.kv.pool + static_cast<std::size_t>(blocks_[block - first_block_]) * layout.block_bytes() +
           layout.strip_offset(args_.layer, tile_.kv_head + head);
  }
  // Of the rows of a block; only where there is a bias.
  const float* RowBiasOf(std::int64_t block) const {
    return args_.row_bias + blocks_[block - first_block_] * args_.row_bias_stride +
           std::int64_t{tile_.kv_head} * kBlockTokens;
  }
  // Of a row, between passes: out, max, sum.
  float* CarriedState(std::int64_t row) const { return args_.states + OffsetOf(row) / dim_ * (dim_ + 2); }

 private:
  const AttentionArgs& args_;
  const AttentionTile& tile_;
  const std::int64_t dim_;
  const std::int64_t group_;
  const std::int64_t size_;
  const std::int64_t first_position_;
  const std::int64_t first_block_;
  const std::int32_t* const blocks_;
};

// The running states of a tile's rows. Arithmetic<Out> is that of attention_state.h; it is constructed from the head
// dimension and the row of the result, which may be null.
template <template <typename Out> class Arithmetic>
class RowStates {
 public:
  static std::size_t SizeBytes(const TileRows& rows) {
    const auto num_rows = static_cast<std::size_t>(rows.size());
    return (num_rows * (static_cast<std::size_t>(Padded(rows)) * sizeof(float) + sizeof(AttentionState)) + 63) / 64 *
           64;
  }

  // `memory` of SizeBytes, 64-byte aligned.
  RowStates(const TileRows& rows, std::byte* memory)
      : rows_(rows),
        dim_(rows.args().kv.layout.head_dim),
        outs_(reinterpret_cast<float*>(memory)),
        states_(reinterpret_cast<AttentionState*>(outs_ + rows.size() * Padded(rows))) {}

  // Empty, or as the pass before carried them.
  void Begin() {
    const AttentionPass pass = rows_.args().pass;
    const bool is_carried = pass == AttentionPass::kMiddle || pass == AttentionPass::kLast;
    std::fill_n(outs_, rows_.size() * Padded(rows_), 0.0F);
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      states_[r] = AttentionState{};
      states_[r].out = outs_ + r * Padded(rows_);
      if (!is_carried) continue;
      const float* const carried = rows_.CarriedState(r);
      std::copy_n(carried, dim_, states_[r].out);
      states_[r].max = carried[dim_];
      states_[r].sum = carried[dim_ + 1];
    }
  }

  AttentionState& Of(std::int64_t r) { return states_[r]; }

  // Row r's state of the segment at `begin`: merged, or kept where the tile keeps its segments.
  void Take(std::int64_t begin, std::int64_t r, const AttentionState& segment) {
    if (rows_.tile().segment_states == nullptr) {
      Arithmetic<float> arithmetic{dim_, nullptr};
      MergeAttentionState(arithmetic, segment, states_[r]);
      return;
    }
    float* const kept = Kept(begin, r);
    std::copy_n(segment.out, dim_, kept);
    kept[Padded(rows_)] = segment.max;
    kept[Padded(rows_) + 1] = segment.sum;
  }

  // All segments that the items of this tile kept, in position order.
  void MergeKept() {
    Arithmetic<float> arithmetic{dim_, nullptr};
    const AttentionTile& tile = rows_.tile();
    for (std::int64_t begin = tile.key_begin; begin < tile.key_end; begin += kSegmentTokens) {
      for (std::int64_t r = rows_.FirstRowOf(begin); r < rows_.size(); ++r) {
        float* const kept = Kept(begin, r);
        MergeAttentionState(arithmetic, {kept[Padded(rows_)], kept[Padded(rows_) + 1], kept}, states_[r]);
      }
    }
  }

  // Hands the states on to the next pass, or the result to the caller.
  void Finish() {
    const AttentionPass pass = rows_.args().pass;
    if (pass == AttentionPass::kFirst || pass == AttentionPass::kMiddle) {
      Carry();
    } else if (rows_.args().out_dtype == DType::kF32) {
      Normalize<float>();
    } else {
      Normalize<std::uint16_t>();
    }
  }

 private:
  static std::int64_t Padded(const TileRows& rows) { return StateStride(rows.args().kv.layout.head_dim) - 16; }

  float* Kept(std::int64_t begin, std::int64_t r) const {
    const std::int64_t segment = (begin - rows_.tile().key_begin) / kSegmentTokens;
    return rows_.tile().segment_states + (segment * rows_.size() + r) * StateStride(dim_);
  }

  void Carry() const {
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      float* const carried = rows_.CarriedState(r);
      std::copy_n(states_[r].out, dim_, carried);
      carried[dim_] = states_[r].max;
      carried[dim_ + 1] = states_[r].sum;
    }
  }

  template <typename Out>
  void Normalize() const {
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      Arithmetic<Out> arithmetic{dim_, reinterpret_cast<Out*>(rows_.args().out) + rows_.OffsetOf(r)};
      NormalizeAttentionState(arithmetic, states_[r]);
    }
  }

  const TileRows& rows_;
  const std::int64_t dim_;
  float* const outs_;
  AttentionState* const states_;
};

}  // namespace spillway::cpu
