#pragma once

// Which CTA computes what, found by the CTAs themselves: lengths and chunk sizes are known to the device only, and a
// launch whose grid depends on num_sequences and num_tokens alone can be replayed from a graph.
//
// The query rows of a sequence and kv head are its (token, head of the group) pairs, token by token; a tile is
// rows_per_tile consecutive ones. The keys are cut into segments of kSegmentTokens positions. A work item is
//   split      (kv head, tile, segment): its partial state goes to the workspace, merged by MergeKernel
//   not split  (kv head, tile): all segments in order, merged on the way; the result is final
// A pass over a part of the keys merges its segments, either way, into the state that the pass before it left.
// Both do the same arithmetic, so which one is taken shows in no bit.

#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"
#include "kernels/kv_layout.h"

namespace spillway::cuda {

inline constexpr int kSegmentPositions = 256;  // kSegmentTokens of kernels/kernels.h
inline constexpr int kMaxRowsPerSequence = 0x7fffffff;
inline constexpr int kDecodeRows = 16;  // rows_per_tile of the decoding kernel

// The sequences that one launch handles are those with min_rows <= query rows <= max_rows.
struct WorkRange {
  int rows_per_tile;
  int min_rows;
  int max_rows;
  bool may_split;
};

struct SequenceWork {
  int num_rows = 0;  // 0: another launch's
  int num_tiles = 0;
  int num_segments = 0;
  bool is_split = false;
  std::int64_t state_base = 0;

  // Of this sequence, over all kv heads.
  SPILLWAY_HOST_DEVICE std::int64_t num_states(int num_kv_heads) const {
    return num_segments > 1 ? std::int64_t{num_rows} * num_kv_heads * num_segments : 0;
  }
  SPILLWAY_HOST_DEVICE int num_items(int num_kv_heads) const {
    return num_kv_heads * num_tiles * (is_split ? num_segments : 1);
  }
};

// The keys of a sequence that the launch reads: positions [begin, end), none if end <= begin.
struct KeyRange {
  int begin;
  int end;

  SPILLWAY_HOST_DEVICE KeyRange(const AttentionParams& params, int sequence)
      : begin(params.key_begin == nullptr ? 0 : params.key_begin[sequence]),
        end(params.first_position[sequence] + params.query_begin[sequence + 1] - params.query_begin[sequence]) {
    if (params.key_begin != nullptr) end = MinOf(end, params.key_end[sequence]);
  }
};

SPILLWAY_HOST_DEVICE SequenceWork WorkOf(const AttentionParams& params, const WorkRange& range, int sequence) {
  SequenceWork work;
  if (sequence >= params.num_sequences) return work;
  const int num_tokens = params.query_begin[sequence + 1] - params.query_begin[sequence];
  const int num_rows = num_tokens * (params.num_heads / params.kv.num_kv_heads);
  if (num_rows == 0 || num_rows < range.min_rows || num_rows > range.max_rows) return work;
  work.num_rows = num_rows;
  work.num_tiles = CeilDiv(num_rows, range.rows_per_tile);
  const KeyRange keys(params, sequence);
  work.num_segments = keys.begin < keys.end ? CeilDiv(keys.end - keys.begin, kSegmentPositions) : 0;
  return work;
}

// One work item, in full.
struct AttentionItem {
  int sequence;
  int kv_head;
  int tile;
  int segment;  // of a split item
  SequenceWork work;
};

// Items of a sequence in order: segments, then kv heads, then tiles, which share keys and so L2; the tiles of a long
// prompt from its end, where they are longest.
SPILLWAY_HOST_DEVICE AttentionItem ItemOf(const SequenceWork& work, int sequence, int num_kv_heads, int index) {
  const int tile = work.num_tiles - 1 - index % work.num_tiles;
  const int rest = index / work.num_tiles;
  return {sequence, rest % num_kv_heads, tile, rest / num_kv_heads, work};
}

// Position of the search: a CTA asks for ascending items.
struct ItemCursor {
  int sequence = 0;  // the first of 32
  int items_before = 0;
  std::int64_t states_before = 0;
};

template <typename T>
__device__ __forceinline__ T InclusiveSum(T value) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Item number `index` of the launch (2^31 at most); false if there are fewer. Called by whole warps with uniform
// arguments.
__device__ inline bool FindItem(const AttentionParams& params, const WorkRange& range, int index, ItemCursor& cursor,
                                AttentionItem& item) {
  const int num_kv_heads = params.kv.num_kv_heads;
  for (; cursor.sequence < params.num_sequences; cursor.sequence += 32) {
    const int sequence = cursor.sequence + static_cast<int>(threadIdx.x % 32);
    SequenceWork work = WorkOf(params, range, sequence);
    const std::int64_t states_after = cursor.states_before + InclusiveSum(work.num_states(num_kv_heads));
    work.state_base = states_after - work.num_states(num_kv_heads);
    work.is_split = range.may_split && work.num_segments > 1 && states_after <= params.state_capacity;
    const int items_after = cursor.items_before + InclusiveSum(work.num_items(num_kv_heads));
    const unsigned behind = __ballot_sync(kAllLanes, items_after > index);
    if (behind == 0) {
      cursor.items_before = __shfl_sync(kAllLanes, items_after, 31);
      cursor.states_before = __shfl_sync(kAllLanes, states_after, 31);
      continue;
    }
    const int lane = __ffs(static_cast<int>(behind)) - 1;
    const int items_before = __shfl_sync(kAllLanes, items_after - work.num_items(num_kv_heads), lane);
    work.num_rows = __shfl_sync(kAllLanes, work.num_rows, lane);
    work.num_tiles = __shfl_sync(kAllLanes, work.num_tiles, lane);
    work.num_segments = __shfl_sync(kAllLanes, work.num_segments, lane);
    work.is_split = __shfl_sync(kAllLanes, work.is_split ? 1 : 0, lane) != 0;
    work.state_base = __shfl_sync(kAllLanes, work.state_base, lane);
    item = ItemOf(work, cursor.sequence + lane, num_kv_heads, index - items_before);
    return true;
  }
  return false;
}

// State of (segment, kv head, row) within a sequence's states.
SPILLWAY_HOST_DEVICE std::int64_t StateIndex(std::int64_t base, int segment, int num_kv_heads, int kv_head,
                                             int num_rows, int row) {
  return base + (std::int64_t{segment} * num_kv_heads + kv_head) * num_rows + row;
}

// The query rows [row_begin, row_end) of an item and where they are. Positions, of rows and keys alike, count from the
// first key that the launch reads; a row that lies before it has a negative one, and sees no key.
struct RowSpan {
  int row_begin;
  int row_end;
  int group;
  int first_token;     // row of the step
  int first_position;  // of first_token
  int num_keys;        // that any row may see
  int first_key;       // before it none sees any

  SPILLWAY_HOST_DEVICE RowSpan(const AttentionParams& params, const WorkRange& range, const AttentionItem& item)
      : row_begin(item.tile * range.rows_per_tile),
        row_end(MinOf(row_begin + range.rows_per_tile, item.work.num_rows)),
        group(params.num_heads / params.kv.num_kv_heads),
        first_token(params.query_begin[item.sequence]),
        first_position(params.first_position[item.sequence]) {
    const KeyRange keys(params, item.sequence);
    first_position -= keys.begin;
    num_keys = MinOf(keys.end - keys.begin, PositionOf(row_end - 1) + 1);
    first_key = MaxOf(0, PositionOf(row_begin) - params.window + 1);
  }

  SPILLWAY_HOST_DEVICE int PositionOf(int row) const { return first_position + row / group; }
  // Index of a row among the (token, head) pairs of the step: of q, out and carried states.
  SPILLWAY_HOST_DEVICE std::int64_t IndexOf(const AttentionParams& params, int kv_head, int row) const {
    const std::int64_t token = first_token + row / group;
    return token * params.num_heads + kv_head * group + row % group;
  }
};

// Tells the merge about the tokens of an item, whose number in the sequence is filled in; every item of a token writes
// the same.
__device__ inline void WritePlan(const AttentionParams& params, const RowSpan& rows, TokenPlan plan) {
  const int begin = rows.row_begin / rows.group;
  const int end = (rows.row_end - 1) / rows.group + 1;
  for (int token = begin + static_cast<int>(threadIdx.x); token < end; token += static_cast<int>(blockDim.x)) {
    plan.token = token;
    params.plan[rows.first_token + token] = plan;
  }
}
__device__ inline void WritePlan(const AttentionParams& params, const RowSpan& rows, const AttentionItem& item) {
  WritePlan(params, rows,
            {.state_base = static_cast<std::int32_t>(item.work.state_base),
             .num_segments = item.work.is_split ? item.work.num_segments : 0,
             .num_rows = item.work.num_rows,
             .token = 0,
             .unit_base = 0,
             .run_length = 0,
             .num_longer_runs = 0});
}

}  // namespace spillway::cuda
