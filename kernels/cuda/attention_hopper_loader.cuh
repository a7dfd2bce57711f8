#pragma once

// The loading warp of attention_hopper.cu.

#include <cuda.h>

#include "kernels/cuda/attention_hopper_shared.cuh"
#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/launch.h"

namespace spillway::cuda::hopper {

template <typename S>
class Loader {
 public:
  using Layout = SharedLayout<S>;
  static constexpr int kDim = S::kDim;
  static constexpr int kKeys = S::kKeys;
  static constexpr int kStages = S::kStages;

  __device__ Loader(const AttentionParams& params, const CUtensorMap& query_map, const CUtensorMap& kv_map)
      : params_(params), query_map_(query_map), kv_map_(kv_map) {}

  __device__ void Run(const WorkRange& range) {
    ItemCursor cursor;
    AttentionItem item;
    auto index = static_cast<int>(blockIdx.x);
    for (unsigned count = 0;; ++count) {
      const bool is_found = FindItem(params_, range, index, cursor, item);
      AwaitPhase(shared_.item_empty(PlaceOf<kItemSlots>(count)), ParityOf<kItemSlots>(count) ^ 1);
      if (!is_found) {
        if (IsFirstLane()) {
          shared_.item(PlaceOf<kItemSlots>(count)).num_rows = 0;
          Arrive(shared_.item_full(PlaceOf<kItemSlots>(count)));
        }
        break;
      }
      int next = 0;
      if (IsFirstLane()) next = static_cast<int>(gridDim.x + atomicAdd(params_.tickets, 1U));
      LoadItem(range, item, PlaceOf<kItemSlots>(count));
      index = __shfl_sync(kAllLanes, next, 0);
    }
    if (IsFirstLane()) ReturnTickets();
  }

 private:
  // The last block leaves them as the next launch has to find them.
  __device__ void ReturnTickets() const {
    if (atomicAdd(params_.tickets + 1, 1U) + 1 != gridDim.x) return;
    params_.tickets[0] = 0;
    params_.tickets[1] = 0;
  }

  __device__ void LoadItem(const WorkRange& range, const AttentionItem& item, unsigned slot) {
    const RowSpan rows(params_, range, item);
    const int num_keys = KeyRange(params_, item.sequence).end;
    // Whole strips as far as they are written: only a sequence's end needs LoadLastValues.
    const int key_end = MinOf(CeilDiv(rows.num_keys, kBlockTokens) * kBlockTokens, num_keys);
    const int tile_begin = rows.first_key / kKeys;
    const int tile_end = CeilDiv(key_end, kKeys);
    if (IsFirstLane()) {
      shared_.item(slot) = {rows.row_end - rows.row_begin, rows.row_begin, item.kv_head, rows.first_token,
                            rows.first_position,           tile_begin,     tile_end};
      ArriveExpecting(shared_.item_full(slot), Layout::kParts * range.rows_per_tile * kSwizzledRowBytes);
#pragma unroll
      for (int part = 0; part < Layout::kParts; ++part) {
        CopyBox(shared_.queries(slot) + part * Layout::kQueryPartBytes, query_map_,
                item.kv_head * rows.group * Layout::kParts + part, rows.first_token + rows.row_begin / rows.group,
                shared_.item_full(slot));
      }
    }
    if (item.kv_head == 0) WriteUnsplit(rows);
    const std::int32_t* const blocks = params_.block_table + params_.block_begin[item.sequence];
    int strips = FetchStrips(blocks, tile_end - 1, key_end, item.kv_head);
    for (int tile = tile_end - 1; tile >= tile_begin; --tile) {
      const int next_strips = tile > tile_begin ? FetchStrips(blocks, tile - 1, key_end, item.kv_head) : -1;
      const unsigned stage = PlaceOf<kStages>(num_tiles_);
      const int parity = ParityOf<kStages>(num_tiles_) ^ 1;
      AwaitPhase(shared_.keys_empty(stage), parity);
      LoadTile(shared_.keys(stage), strips, 0, shared_.keys_full(stage));
      AwaitPhase(shared_.values_empty(stage), parity);
      const int num_last = key_end % kBlockTokens;
      if (tile == tile_end - 1 && num_last != 0) {
        LoadLastValues(strips, (key_end - tile * kKeys) / kBlockTokens, num_last, stage);
      } else {
        LoadTile(shared_.values(stage), strips, Layout::kParts, shared_.values_full(stage));
      }
      ++num_tiles_;
      strips = next_strips;
    }
  }

  // Every token of these rows is final as it is written here: nothing to merge.
  __device__ void WriteUnsplit(const RowSpan& rows) const {
    const int end = (rows.row_end - 1) / rows.group + 1;
    for (int token = rows.row_begin / rows.group + static_cast<int>(threadIdx.x % 32); token < end; token += 32) {
      params_.plan[rows.first_token + token].num_segments = 0;
    }
  }

  // A lane's strip of a tile, as TMA counts them; -1, which is outside the pool and so zeros, behind the keys.
  __device__ int FetchStrips(const std::int32_t* blocks, int tile, int key_end, int kv_head) const {
    const int block = tile * kStrips + static_cast<int>(threadIdx.x % kStrips);
    if (block * kBlockTokens >= key_end) return -1;
    return blocks[block] * static_cast<int>(params_.kv.block_bytes / params_.kv.strip_bytes) + kv_head;
  }

  // Parts [part, part + kParts) of a tile's strips, but for strip `left_out`.
  __device__ void LoadTile(std::byte* to, int strips, int part, Barrier& full, int left_out = kStrips) const {
    const int num_strips = left_out < kStrips ? kStrips - 1 : kStrips;
    if (IsFirstLane()) ArriveExpecting(full, num_strips * Layout::kStripBytes);
#pragma unroll
    for (int s = 0; s < kStrips; ++s) {
      const int strip = __shfl_sync(kAllLanes, strips, s);
      if (IsFirstLane() && s != left_out) CopyBox(to + s * Layout::kStripBytes, kv_map_, strip * kHalves, part, full);
    }
  }

  // V of a tile whose strip `last` has num_last tokens only: the others become zeros, since 0 times what lies there may
  // be NaN.
  __device__ __forceinline__ void LoadLastValues(int strips, int last, int num_last, unsigned stage) const {
    const int strip = __shfl_sync(kAllLanes, strips, last);
    const std::byte* const from = params_.kv.pool + strip * params_.kv.strip_bytes + kDim * 2;
    std::byte* const to = shared_.values(stage) + last * Layout::kStripBytes;
    constexpr int kPieces = kDim / 8;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x % 32); i < kBlockTokens * kPieces; i += 32) {
      const int row = i / kPieces;
      const int piece = i % kPieces;
      const int unit = row / kSwizzledRows * Layout::kParts + piece / kSwizzledRows;
      uint4 value = {0, 0, 0, 0};
      if (row < num_last) value = *reinterpret_cast<const uint4*>(from + row * params_.kv.row_bytes + piece * 16);
      *reinterpret_cast<uint4*>(to + unit * kSwizzleBytes + row % kSwizzledRows * kSwizzledRowBytes +
                                ((piece ^ row) % kSwizzledRows) * 16) = value;
    }
    FenceShared();
    __syncwarp();
    LoadTile(shared_.values(stage), strips, Layout::kParts, shared_.values_full(stage), last);
  }

  static constexpr int kStrips = kKeys / kBlockTokens;
  const AttentionParams& params_;
  const CUtensorMap& query_map_;
  const CUtensorMap& kv_map_;
  const Layout shared_;
  unsigned num_tiles_ = 0;
};

}  // namespace spillway::cuda::hopper
