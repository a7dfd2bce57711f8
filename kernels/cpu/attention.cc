#include "kernels/cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <new>

namespace spillway::cpu {
namespace {

// Tiles of more rows are not cut along their keys: there are enough of them, and states are large.
constexpr std::int64_t kMaxRowsOfCutTile = 64;
// Items per worker that cutting aims at, and segments of an item at least.
constexpr std::int64_t kItemsPerWorker = 4;
constexpr std::int64_t kMinSegmentsPerItem = 2;
// Work per segment that does not depend on the number of rows, in rows.
constexpr std::int64_t kRowsOfPacking = 16;

// Query rows of a sequence that share their keys, for every kv head: items of `heads_per_item` heads, and of up to
// `segments_per_item` segments.
struct PlannedTile {
  AttentionTile tile;  // of kv head 0, with all its keys
  std::int64_t num_rows = 0;
  std::int64_t num_segments = 0;
  std::int64_t segments_per_item = 0;
  int heads_per_item = 1;
  std::int64_t item_begin = 0;    // items of the tiles before
  std::int64_t states_begin = 0;  // floats kept by the tiles before, for all kv heads
  std::int64_t counter_begin = 0;

  std::int64_t num_cuts() const {
    return std::max<std::int64_t>(1, (num_segments + segments_per_item - 1) / segments_per_item);
  }
};

std::int64_t RoundUp(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

class Plan {
 public:
  Plan(const AttentionArgs& args, const AttentionBodies& bodies, int num_workers, Scratch& scratch)
      : args_(args),
        bodies_(bodies),
        num_workers_(num_workers),
        num_kv_heads_(args.kv.layout.num_kv_heads),
        group_(args.num_heads / num_kv_heads_),
        tokens_per_tile_(std::max<std::int64_t>(1, bodies.rows_per_tile / group_)) {
    for (std::int64_t s = 0; s < args.num_sequences; ++s) {
      num_tiles_ += RoundUp(args.query_begin[s + 1] - args.query_begin[s], tokens_per_tile_) / tokens_per_tile_;
    }
    const std::int64_t tile_bytes = RoundUp(num_tiles_ * static_cast<std::int64_t>(sizeof(PlannedTile)), 64);
    // The tiles are laid out twice where states are kept: first to see how much there is to keep.
    tiles_ = reinterpret_cast<PlannedTile*>(scratch.Get(static_cast<std::size_t>(tile_bytes)));
    Fill();
    Cut();
    if (num_counters_ == 0) return;
    const std::int64_t counter_bytes = RoundUp(num_counters_ * static_cast<std::int64_t>(sizeof(*counters_)), 64);
    std::byte* const memory = scratch.Get(static_cast<std::size_t>(tile_bytes + counter_bytes + num_states_ * 4));
    tiles_ = reinterpret_cast<PlannedTile*>(memory);
    counters_ = reinterpret_cast<std::atomic<std::int32_t>*>(memory + tile_bytes);
    states_ = reinterpret_cast<float*>(memory + tile_bytes + counter_bytes);
    Fill();
    Cut();
    for (std::int64_t t = 0; t < num_tiles_; ++t) {
      if (tiles_[t].num_cuts() == 1) continue;
      for (int h = 0; h < num_kv_heads_; ++h) {
        new (counters_ + tiles_[t].counter_begin + h)
            std::atomic<std::int32_t>(static_cast<std::int32_t>(tiles_[t].num_cuts()));
      }
    }
  }

  std::int64_t num_items() const { return num_items_; }

  void Run(const WorkerPool& pool, std::int64_t item, Scratch& scratch) const {
    const PlannedTile& planned = PlannedOf(item);
    AttentionTile part = TileOf(item);
    const bool has_next = item + 1 < num_items() && !pool.BeginsShare(item + 1, num_items());
    const AttentionTile next = has_next ? TileOf(item + 1) : AttentionTile();
    if (has_next) part.next = &next;
    part.is_announced = !pool.BeginsShare(item, num_items());
    bodies_.attend(args_, part, scratch);
    if (part.segment_states == nullptr) return;
    const bool is_last = counters_[planned.counter_begin + part.kv_head].fetch_sub(1, std::memory_order_acq_rel) == 1;
    if (!is_last) return;
    AttentionTile whole = planned.tile;
    whole.kv_head = part.kv_head;
    whole.segment_states = StatesOf(planned, part.kv_head);
    bodies_.merge(args_, whole, scratch);
  }

 private:
  // The last tiles of a sequence see most keys: they go first.
  std::int64_t IndexOf(std::int64_t item) const { return num_items_ - 1 - item; }
  const PlannedTile& PlannedOf(std::int64_t item) const {
    return *(std::upper_bound(tiles_, tiles_ + num_tiles_, IndexOf(item),
                              [](std::int64_t i, const PlannedTile& tile) { return i < tile.item_begin; }) -
             1);
  }
  float* StatesOf(const PlannedTile& planned, int kv_head) const {
    return states_ + planned.states_begin + kv_head * planned.num_segments * SegmentFloats(planned);
  }
  std::int64_t ItemsPerCut(const PlannedTile& planned) const {
    return (num_kv_heads_ + planned.heads_per_item - 1) / planned.heads_per_item;
  }
  std::int64_t SegmentFloats(const PlannedTile& planned) const {
    return planned.num_rows * StateStride(args_.kv.layout.head_dim);
  }
  AttentionTile TileOf(std::int64_t item) const {
    const PlannedTile& planned = PlannedOf(item);
    AttentionTile tile = planned.tile;
    // Heads by heads, those of the last segments first.
    const std::int64_t index = IndexOf(item) - planned.item_begin;
    const std::int64_t items_per_cut = ItemsPerCut(planned);
    tile.kv_head = static_cast<int>(items_per_cut - 1 - index % items_per_cut) * planned.heads_per_item;
    tile.num_heads = std::min(planned.heads_per_item, num_kv_heads_ - tile.kv_head);
    if (planned.num_cuts() == 1) return tile;
    const std::int64_t segment = index / items_per_cut * planned.segments_per_item;
    tile.key_begin += segment * kSegmentTokens;
    tile.key_end = std::min(tile.key_end, tile.key_begin + planned.segments_per_item * kSegmentTokens);
    tile.segment_states = StatesOf(planned, tile.kv_head) + segment * SegmentFloats(planned);
    return tile;
  }

  void Fill() {
    PlannedTile* at = tiles_;
    for (std::int64_t s = 0; s < args_.num_sequences; ++s) {
      for (std::int64_t t = args_.query_begin[s]; t < args_.query_begin[s + 1]; t += tokens_per_tile_) {
        PlannedTile& planned = *new (at++) PlannedTile;
        AttentionTile& tile = planned.tile;
        tile.sequence = s;
        tile.token_begin = t;
        tile.token_end = std::min<std::int64_t>(t + tokens_per_tile_, args_.query_begin[s + 1]);
        tile.key_begin = FirstKeyOf(args_, s);
        tile.key_end = args_.first_position[s] + (tile.token_end - args_.query_begin[s]);
        // Segments before the first row's window are left out.
        if (args_.window > 0) {
          const std::int64_t seen_from = args_.first_position[s] + (t - args_.query_begin[s]) + 1 - args_.window;
          tile.key_begin = std::max(tile.key_begin, seen_from / kSegmentTokens * kSegmentTokens);
        }
        if (args_.pass != AttentionPass::kWhole) tile.key_end = std::min<std::int64_t>(tile.key_end, args_.key_end[s]);
        tile.key_end = std::max(tile.key_begin, tile.key_end);
        planned.num_rows = (tile.token_end - tile.token_begin) * group_;
        planned.num_segments = RoundUp(tile.key_end - tile.key_begin, kSegmentTokens) / kSegmentTokens;
      }
    }
  }

  static std::int64_t CostOfSegment(const PlannedTile& planned) { return planned.num_rows + kRowsOfPacking; }

  void Cut() {
    std::int64_t cost = 0;
    for (std::int64_t t = 0; t < num_tiles_; ++t) cost += tiles_[t].num_segments * CostOfSegment(tiles_[t]);
    const std::int64_t cost_of_item = cost * num_kv_heads_ / (kItemsPerWorker * num_workers_);
    num_items_ = num_counters_ = num_states_ = 0;
    for (std::int64_t t = 0; t < num_tiles_; ++t) {
      PlannedTile& planned = tiles_[t];
      planned.segments_per_item = std::max<std::int64_t>(1, planned.num_segments);
      if (num_workers_ > 1 && planned.num_rows <= kMaxRowsOfCutTile) {
        planned.segments_per_item = std::clamp(cost_of_item / CostOfSegment(planned), kMinSegmentsPerItem,
                                               std::max(kMinSegmentsPerItem, planned.num_segments));
      }
      planned.heads_per_item = 1;
      if (planned.num_cuts() == 1 && planned.num_rows == group_) {
        // As many as leave enough items.
        planned.heads_per_item = static_cast<int>(std::clamp<std::int64_t>(
            num_tiles_ * num_kv_heads_ / (kItemsPerWorker * num_workers_), 1, bodies_.heads_of_token));
      }
      planned.item_begin = num_items_;
      planned.counter_begin = num_counters_;
      planned.states_begin = num_states_;
      num_items_ += planned.num_cuts() * ItemsPerCut(planned);
      if (planned.num_cuts() == 1) continue;
      num_counters_ += num_kv_heads_;
      num_states_ += num_kv_heads_ * planned.num_segments * planned.num_rows * StateStride(args_.kv.layout.head_dim);
    }
  }

  const AttentionArgs& args_;
  const AttentionBodies& bodies_;
  const int num_workers_;
  const int num_kv_heads_;
  const std::int64_t group_;
  const std::int64_t tokens_per_tile_;
  std::int64_t num_tiles_ = 0;
  std::int64_t num_items_ = 0;
  std::int64_t num_counters_ = 0;
  std::int64_t num_states_ = 0;  // floats
  PlannedTile* tiles_ = nullptr;
  std::atomic<std::int32_t>* counters_ = nullptr;  // items of a tile and kv head that are not done
  float* states_ = nullptr;
};

}  // namespace

void RunAttention(Target target, const WorkPlace& place, const AttentionArgs& args) {
  const bool is_bf16 = args.q_dtype == DType::kBF16 && args.kv.layout.dtype == DType::kBF16;
  const AttentionBodies* const bf16_bodies = is_bf16 ? Bf16AttentionBodiesOf(target) : nullptr;
  const AttentionBodies& bodies = bf16_bodies != nullptr ? *bf16_bodies : AttentionBodiesOf(target);
  const Plan plan(args, bodies, place.pool.num_workers(), place.call);
  place.pool.ParallelFor(plan.num_items(), place.worker,
                         [&](std::int64_t item, Scratch& scratch) { plan.Run(place.pool, item, scratch); });
}

}  // namespace spillway::cpu
