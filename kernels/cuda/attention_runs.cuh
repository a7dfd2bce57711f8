#pragma once

// Which CTA of the decoding kernel computes what. A unit is a segment of an item (attention_plan.cuh) that its rows
// see; units are in order: sequences, kv heads and tiles, segments. A CTA has a run of units, so that its loads go on
// without a gap from segment to segment and item to item. An item whose units are all of one run is merged on the way;
// else it is split. If the workspace has no room for the states of a sequence, who has the first unit of one of its
// items computes them all.

#include "kernels/cuda/attention_plan.cuh"

namespace spillway::cuda {

// Runs of equal length, but for one more unit in the first num_longer of them.
struct Partition {
  int length = 0;
  int num_longer = 0;

  SPILLWAY_HOST_DEVICE int BeginOf(int run) const { return run * length + MinOf(run, num_longer); }
  SPILLWAY_HOST_DEVICE int RunOf(int unit) const {
    const int in_longer = num_longer * (length + 1);
    return unit < in_longer ? unit / (length + 1) : num_longer + (unit - in_longer) / length;
  }
};

struct Run {
  int begin = 0;  // units
  int end = 0;
  Partition partition;
  // The sequence of unit `begin`, and what comes before it.
  int sequence = 0;
  int unit_base = 0;
  std::int64_t state_base = 0;
};

// An item's units are its segments from first_segment on, one at least.
struct RunWork {
  SequenceWork work;
  int first_segment = 0;
  int num_units = 0;

  __device__ RunWork(const AttentionParams& params, const WorkRange& range, int sequence)
      : work(WorkOf(params, range, sequence)) {
    if (work.num_rows == 0) return;
    const int first_key = params.first_position[sequence] - KeyRange(params, sequence).begin - params.window + 1;
    first_segment = MinOf(MaxOf(0, first_key) / kSegmentPositions, MaxOf(0, work.num_segments - 1));
    work.num_segments -= first_segment;
    num_units = MaxOf(1, work.num_segments);
  }
  __device__ int units_of_sequence(int num_kv_heads) const { return num_kv_heads * work.num_tiles * num_units; }
};

// The block's run; false: there is none. Called by all kThreads threads of it.
template <int kThreads>
__device__ inline bool FindRun(const AttentionParams& params, const WorkRange& range, Run& run) {
  const auto warp = static_cast<int>(threadIdx.x / 32);
  const int num_kv_heads = params.kv.num_kv_heads;
  const int per_thread = CeilDiv(params.num_sequences, kThreads);
  const int first = static_cast<int>(threadIdx.x) * per_thread;
  int units = 0;
  std::int64_t states = 0;
  for (int i = 0; i < per_thread; ++i) {
    const RunWork work(params, range, first + i);
    units += work.units_of_sequence(num_kv_heads);
    states += work.work.num_states(num_kv_heads);
  }
  int units_after = InclusiveSum(units);
  std::int64_t states_after = InclusiveSum(states);
  __shared__ int warp_units[kThreads / 32];
  __shared__ std::int64_t warp_states[kThreads / 32];
  __shared__ Run found;
  if (threadIdx.x % 32 == 31) {
    warp_units[warp] = units_after;
    warp_states[warp] = states_after;
  }
  __syncthreads();
  int total = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) {
    total += warp_units[w];
    if (w >= warp) continue;
    units_after += warp_units[w];
    states_after += warp_states[w];
  }
  const auto num_runs = static_cast<int>(gridDim.x);
  const Partition partition = {total / num_runs, total % num_runs};
  const int begin = partition.BeginOf(static_cast<int>(blockIdx.x));
  const int end = partition.BeginOf(static_cast<int>(blockIdx.x) + 1);
  if (begin >= end) return false;
  int unit_base = units_after - units;
  if (unit_base <= begin && begin < units_after) {
    std::int64_t state_base = states_after - states;
    int sequence = first;
    for (;; ++sequence) {
      const RunWork work(params, range, sequence);
      const int units_here = work.units_of_sequence(num_kv_heads);
      if (begin < unit_base + units_here) break;
      unit_base += units_here;
      state_base += work.work.num_states(num_kv_heads);
    }
    found = {begin, end, partition, sequence, unit_base, state_base};
  }
  __syncthreads();
  run = found;
  return true;
}

// Segments [item.segment, segment_end) of an item, for one CTA. Segments count from the first that the launch reads.
struct Piece {
  AttentionItem item;
  int segment_end;
  int first_segment;  // of the item
  int unit_base;      // of the sequence
  bool may_split;     // the sequence
};

// The pieces of a run in order. Uniform in the block.
class RunCursor {
 public:
  __device__ explicit RunCursor(const Run& run) : run_(run), unit_(run.begin) {}

  __device__ __forceinline__ bool Next(const AttentionParams& params, const WorkRange& range, Piece& piece) {
    const int num_kv_heads = params.kv.num_kv_heads;
    while (unit_ < run_.end) {
      const RunWork sequence(params, range, run_.sequence);
      const int units_here = sequence.units_of_sequence(num_kv_heads);
      const std::int64_t states_after = run_.state_base + sequence.work.num_states(num_kv_heads);
      if (unit_ >= run_.unit_base + units_here) {
        ++run_.sequence;
        run_.unit_base += units_here;
        run_.state_base = states_after;
        continue;
      }
      const int index = (unit_ - run_.unit_base) / sequence.num_units;
      const int item_begin = run_.unit_base + index * sequence.num_units;
      const int item_end = item_begin + sequence.num_units;
      const bool may_split = range.may_split && states_after <= params.state_capacity;
      const int begin = unit_;
      const int end = may_split ? MinOf(item_end, run_.end) : item_end;
      unit_ = end;
      if (!may_split && begin > item_begin) continue;
      piece.item = {run_.sequence, index / sequence.work.num_tiles, index % sequence.work.num_tiles,
                    begin - item_begin + sequence.first_segment, sequence.work};
      piece.item.work.state_base = run_.state_base;
      piece.item.work.is_split = may_split && (begin > item_begin || end < item_end);
      piece.segment_end = end - item_begin + sequence.first_segment;
      piece.first_segment = sequence.first_segment;
      piece.unit_base = run_.unit_base;
      piece.may_split = may_split;
      return true;
    }
    return false;
  }

 private:
  Run run_;
  int unit_;
};

// Tells the merge about the tokens of a piece.
__device__ inline void WritePlan(const AttentionParams& params, const RowSpan& rows, const Piece& piece,
                                 const Run& run) {
  WritePlan(params, rows,
            {.state_base = static_cast<std::int32_t>(piece.item.work.state_base),
             .num_segments = piece.may_split ? piece.item.work.num_segments : 0,
             .num_rows = piece.item.work.num_rows,
             .token = 0,
             .unit_base = piece.unit_base,
             .run_length = run.partition.length,
             .num_longer_runs = run.partition.num_longer});
}

}  // namespace spillway::cuda
