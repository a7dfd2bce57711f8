#pragma once

// Fetches strips from memory ahead of their use.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/cpu/attention_tile.h"

namespace spillway::cpu {

// The strips of a tile, head by head, and behind them those of the tile that the same worker most likely attends next:
// memory is read all the time then, not only between two computations. Of a tile that another one announced as its
// next, the first kStripsAhead are taken to be fetched already.
class StripFetcher {
 public:
  explicit StripFetcher(const TileRows& rows) : rows_(rows), own_(rows.tile()) {
    if (rows.tile().next != nullptr) {
      next_.emplace(rows.args(), *rows.tile().next);
      next_strips_ = Strips(*rows.tile().next);
    }
    MoveTo(std::min(rows.tile().is_announced ? kStripsAhead : 1, own_.num_strips()));
  }

  // Strip `block` of a head is read now. Heads count from the tile's first.
  void Read(int head, std::int64_t block) {
    current_ = head * own_.strips_per_head + block - own_.first_block;
    if (ahead_ <= current_) MoveTo(current_ + 1);
  }
  // The next `num_lines` lines.
  void Fetch(int num_lines) {
    if (at_ == nullptr || ahead_ > current_ + kMostStripsAhead) return;
    for (int i = 0; i < num_lines; ++i) __builtin_prefetch(at_ + 64 * static_cast<std::ptrdiff_t>(i), 0, 2);
    at_ += 64 * static_cast<std::ptrdiff_t>(num_lines);
    if (at_ >= strip_end_) MoveTo(ahead_ + 1);
  }

 private:
  static constexpr std::int64_t kStripsAhead = 24;
  // A segment's keys are read before its values, and half of what is fetched is fetched with them.
  static constexpr std::int64_t kMostStripsAhead = kStripsAhead + kSegmentTokens / kBlockTokens;

  struct Strips {
    std::int64_t first_block = 0;
    std::int64_t strips_per_head = 0;
    std::int64_t num_heads = 0;

    Strips() = default;
    explicit Strips(const AttentionTile& tile)
        : first_block(tile.key_begin / kBlockTokens),
          strips_per_head((tile.key_end + kBlockTokens - 1) / kBlockTokens - first_block),
          num_heads(tile.num_heads) {}
    std::int64_t num_strips() const { return strips_per_head * num_heads; }
  };

  void MoveTo(std::int64_t ahead) {
    ahead_ = ahead;
    at_ = nullptr;
    const bool is_own = ahead < own_.num_strips();
    const Strips& strips = is_own ? own_ : next_strips_;
    const std::int64_t index = is_own ? ahead : ahead - own_.num_strips();
    if (index >= strips.num_strips()) return;
    at_ = (is_own ? rows_ : *next_)
              .StripOf(strips.first_block + index % strips.strips_per_head,
                       static_cast<int>(index / strips.strips_per_head));
    strip_end_ = at_ + rows_.args().kv.layout.strip_bytes();
  }

  const TileRows& rows_;
  const Strips own_;
  std::optional<TileRows> next_;
  Strips next_strips_;
  std::int64_t current_ = 0;
  std::int64_t ahead_ = 0;         // strip that is fetched next; those behind the tile's own are of the next tile
  const std::byte* at_ = nullptr;  // in it; null: there is none
  const std::byte* strip_end_ = nullptr;
};

}  // namespace spillway::cpu
