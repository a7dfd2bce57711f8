#pragma once

// Fetches strips from memory ahead of their use.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "kernels/cpu/attention_tile.h"

namespace spillway::cpu {

// The strips of a tile, and behind them those of the tile that the same worker most likely attends next: memory is read
// all the time then, not only between two computations. Of a tile that another one announced as its next, the first
// kStripsAhead are taken to be fetched already.
class StripFetcher {
 public:
  explicit StripFetcher(const TileRows& rows)
      : rows_(rows),
        end_((rows.tile().key_end + kBlockTokens - 1) / kBlockTokens),
        strip_bytes_(rows.args().kv.layout.strip_bytes()),
        ahead_(std::min(rows.tile().key_begin / kBlockTokens + (rows.tile().is_announced ? kStripsAhead : 1), end_)) {
    if (rows.tile().next != nullptr) next_.emplace(rows.args(), *rows.tile().next);
  }

  // The next `num_lines` lines, while strip `current` of the tile is read.
  void Fetch(std::int64_t current, int num_lines) {
    if (ahead_ <= current) {
      ahead_ = current + 1;
      ahead_bytes_ = 0;
    }
    if (ahead_ > current + kMostStripsAhead) return;
    const std::byte* strip = nullptr;
    if (ahead_ < end_) {
      strip = rows_.StripOf(ahead_);
    } else {
      if (!next_.has_value()) return;
      const std::int64_t block = next_->tile().key_begin / kBlockTokens + (ahead_ - end_);
      if (block * kBlockTokens >= next_->tile().key_end) return;
      strip = next_->StripOf(block);
    }
    const std::byte* const at = strip + ahead_bytes_;
    for (int i = 0; i < num_lines; ++i) __builtin_prefetch(at + 64 * static_cast<std::ptrdiff_t>(i), 0, 2);
    ahead_bytes_ += 64 * static_cast<std::size_t>(num_lines);
    if (ahead_bytes_ < strip_bytes_) return;
    ++ahead_;
    ahead_bytes_ = 0;
  }

 private:
  static constexpr std::int64_t kStripsAhead = 24;
  // A segment's keys are read before its values, and half of what is fetched is fetched with them.
  static constexpr std::int64_t kMostStripsAhead = kStripsAhead + kSegmentTokens / kBlockTokens;

  const TileRows& rows_;
  const std::int64_t end_;
  const std::size_t strip_bytes_;
  std::optional<TileRows> next_;
  std::int64_t ahead_;  // strip that is fetched next; those from end_ on are of the next tile
  std::size_t ahead_bytes_ = 0;
};

}  // namespace spillway::cpu
