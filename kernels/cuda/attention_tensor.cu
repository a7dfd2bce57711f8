// Paged causal attention on tensor cores for head_dim 64 and 128, q and KV in BF16 or F16: one micro-kernel for prefill
// and decode.
//
// A warp holds 16 query rows; a tile of kKeysPerTile keys (K and V rows as stored, 16 positions per strip) lies in
// shared memory, the next one on its way (cp.async, two stages). Scores are q K^T by mma.sync m16n8k16, the softmax is
// the online one (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022), the weights are rounded to the
// type of V for the product with it. At the end of each segment of 256 positions the state joins the running one
// (kernels/attention_state.h).
//
// A row's arithmetic never depends on its neighbours, on the number of warps or on where the tile begins: a masked key
// contributes exact zeros, a tile that is all masked changes nothing. So prefill (8 warps: 128 rows, segments in turn)
// and decode (1 warp: the heads of a group share each K and V load; segments side by side) give the same bits.

#include "kernels/cuda/attention_plan.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda {
namespace {

constexpr int kRowsPerWarp = 16;
constexpr int kKeysPerTile = 64;
constexpr int kStripsPerTile = kKeysPerTile / kBlockTokens;
constexpr int kTilesPerSegment = kSegmentPositions / kKeysPerTile;
constexpr int kStages = 2;
constexpr int kScoreTiles = kKeysPerTile / 8;

constexpr int kPrefillWarps = 8;
constexpr int kDecodeWarps = 1;
// Sequences of few query rows are cut into segments, the others not.
constexpr int kMaxSplitRows = 64;

template <int kDim>
constexpr int kTileBytes = 2 * kKeysPerTile* kDim * 2;  // K, then V
template <int kDim>
constexpr int kQueryBytes = kRowsPerWarp* kDim * 2;  // of one warp
constexpr int kBiasBytes = kKeysPerTile * 4;         // of a tile
constexpr int kBiasPieces = kBlockTokens * 4 / 16;   // of a strip
constexpr int kBiasThreads = kStripsPerTile * kBiasPieces;
template <int kDim, int kWarps>
constexpr int kSharedBytes = kStages*(kTileBytes<kDim> + kBiasBytes) + kWarps* kQueryBytes<kDim> + kBiasThreads * 8;
// What a block may have on sm_120, the smallest of our targets; beside it are RowTargets of every thread.
constexpr int kMaxSharedBytes = 99 << 10;
static_assert(kSharedBytes<128, kPrefillWarps> + kPrefillWarps * 32 * 8 <= kMaxSharedBytes);

// Byte of 16-byte piece `piece` of row `row` in a tile of q, K or V. The pieces of 8 rows at one column fall into
// different banks: their low three bits are exchanged by the row.
template <int kDim>
__device__ __forceinline__ int TileByte(int row, int piece) {
  return (row * (kDim / 8) + (piece ^ (row & 7))) * 16;
}

// One warp's 16 rows. Lane l holds of rows g = l / 4 and g + 8 the columns 2 * (l % 4) + {0, 1} of every 8.
template <int kDim>
struct WarpState {
  float out[kDim / 8][4];
  float max[2];  // of raw scores; times scale it is in units of log2
  float sum[2];  // of this lane's keys

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[i][j] = 0;
    }
    max[0] = max[1] = -kInfinity;
    sum[0] = sum[1] = 0;
  }
};

// Sum or maximum over the four lanes that share a row.
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// Of the row bias of the loaded tiles, behind them and the queries.
template <int kDim, int kWarps>
__device__ __forceinline__ float* BiasOf(std::byte* shared, int tile) {
  return reinterpret_cast<float*>(shared + kStages * kTileBytes<kDim> + kWarps * kQueryBytes<kDim> +
                                  tile % kStages * kBiasBytes);
}

// Behind that, where in block 0 each of kBiasThreads finds its piece.
template <int kDim, int kWarps>
__device__ __forceinline__ const float** BiasPlaces(std::byte* shared) {
  return reinterpret_cast<const float**>(BiasOf<kDim, kWarps>(shared, 0) + kStages * kKeysPerTile);
}

template <int kDim, int kWarps, bool kHasBias>
class TileLoader {
 public:
  __device__ TileLoader(const AttentionParams& params, const AttentionItem& item, int key_end, std::byte* shared)
      : blocks_(params.block_table + params.block_begin[item.sequence]),
        strips_(params.kv.pool + item.kv_head * params.kv.strip_bytes),
        block_bytes_(params.kv.block_bytes),
        key_end_(key_end),
        shared_(shared) {
    if (!kHasBias || static_cast<int>(threadIdx.x) >= kBiasThreads) return;
    BiasPlaces<kDim, kWarps>(shared)[threadIdx.x] =
        params.row_bias + item.kv_head * kBlockTokens + threadIdx.x % kBiasPieces * 4;
  }

  // Block ids of a tile, a lane each, one tile ahead of its copies so that they do not wait for them.
  __device__ __forceinline__ void FetchBlocks(int tile) {
    const int block = tile * kStripsPerTile + static_cast<int>(threadIdx.x % kStripsPerTile);
    block_id_ = block * kBlockTokens < key_end_ ? blocks_[block] : -1;
  }

  // Rows [K | V] of the fetched tile; keys from key_end on become zeros, since 0 times what lies there may be NaN.
  // Called by whole warps.
  __device__ __forceinline__ void Load(const AttentionParams& params, int tile) {
    std::byte* const stage = shared_ + tile % kStages * kTileBytes<kDim>;
    const int thread = ThreadAnew();
#pragma unroll
    for (int s = 0; s < kStripsPerTile; ++s) {
      const int block_id = __shfl_sync(kAllLanes, block_id_, s);
      const int num_valid = key_end_ - (tile * kStripsPerTile + s) * kBlockTokens;
      std::byte* const to = stage + s * kBlockTokens * kRowBytes;
      if (num_valid >= kBlockTokens) {
        const std::byte* const from = strips_ + block_id * block_bytes_ + thread * 16;
#pragma unroll
        for (int i = 0; i < kCopiesPerStrip; ++i) CopyAsync(to + PlaceOf(thread, i), from + i * kThreads * 16);
      } else {
#pragma unroll 1
        for (int i = 0; i < kCopiesPerStrip; ++i) {
          const int offset = (i * kThreads + thread) * 16;
          const bool is_valid = offset / (2 * kRowBytes) < num_valid;
          CopyAsync(to + PlaceOf(thread, i), is_valid ? strips_ + block_id * block_bytes_ + offset : strips_, is_valid);
        }
      }
    }
    if constexpr (kHasBias) LoadBias(params, tile);
  }

 private:
  static constexpr int kRowBytes = kDim * 2;  // of K or V
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kCopiesPerStrip = kBlockTokens * 2 * kRowBytes / (kThreads * 16);
  static constexpr int kRowsPerCopy = kThreads * 16 / (2 * kRowBytes);
  static_assert(kCopiesPerStrip * kRowsPerCopy == kBlockTokens && (kRowsPerCopy <= 8 || kCopiesPerStrip == 1));

  // Where a thread's i-th piece of a strip goes: TileByte of its row and piece, taken apart so that all but one
  // exclusive or of it is known to the compiler or the same for every i.
  __device__ __forceinline__ static int PlaceOf(int thread, int i) {
    constexpr int kPieces = kRowBytes / 16;
    const int piece = thread % (2 * kPieces);
    const int row = thread / (2 * kPieces);
    const int place = row * kRowBytes + ((piece % kPieces) ^ (row & 7)) * 16;
    return piece / kPieces * (kTileBytes<kDim> / 2) + i * kRowsPerCopy * kRowBytes +
           (place ^ (((i * kRowsPerCopy) & 7) * 16));
  }

  // kBiasThreads take a piece each. What lies beyond the keys is masked.
  __device__ __forceinline__ void LoadBias(const AttentionParams& params, int tile) {
    const int block_id = __shfl_sync(kAllLanes, block_id_, static_cast<int>(threadIdx.x) / kBiasPieces);
    if (static_cast<int>(threadIdx.x) >= kBiasThreads) return;
    const float* const place = BiasPlaces<kDim, kWarps>(shared_)[threadIdx.x];
    CopyAsync(reinterpret_cast<std::byte*>(BiasOf<kDim, kWarps>(shared_, tile) + threadIdx.x * 4),
              reinterpret_cast<const std::byte*>(place + (block_id >= 0 ? block_id * params.row_bias_stride : 0)),
              block_id >= 0);
  }

  const std::int32_t* const blocks_;
  const std::byte* const strips_;
  const std::int64_t block_bytes_;
  const int key_end_;
  std::byte* const shared_;
  std::int32_t block_id_ = -1;
};

// The warp's 16 rows of q into its shared memory, zeros for rows that are not there. They stay there, since registers
// are what this kernel is short of.
template <int kDim>
__device__ __forceinline__ void StoreQueries(const AttentionParams& params, const RowSpan& rows, int kv_head,
                                             int warp_begin, std::byte* queries) {
  constexpr int kPieces = kDim / 8;
  __syncwarp();  // the previous item's reads are over
#pragma unroll
  for (int i = 0; i < kRowsPerWarp * kPieces / 32; ++i) {
    const int index = i * 32 + static_cast<int>(threadIdx.x % 32);
    const int row = index / kPieces;
    uint4 piece = {0, 0, 0, 0};
    if (warp_begin + row < rows.row_end) {
      const std::int64_t at = rows.IndexOf(params, kv_head, warp_begin + row) * kDim + index % kPieces * 8;
      piece = *reinterpret_cast<const uint4*>(params.q + at * 2);
    }
    *reinterpret_cast<uint4*>(queries + TileByte<kDim>(row, index % kPieces)) = piece;
  }
  __syncwarp();
}

// scores[n] = 16 rows x keys [8n, 8n + 8) of the tile.
template <int kDim, DType kType>
__device__ __forceinline__ void ScoreTile(const std::byte* queries, const std::byte* keys,
                                          float (&scores)[kScoreTiles][4]) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] = 0;
  }
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    // Matrices: rows [0, 8) x dims [16k, +8), rows [8, 16) x the same dims, then dims [16k + 8, +8).
    std::uint32_t a[4];
    LoadMatrices(a, queries + TileByte<kDim>(lane & 15, k * 2 + (lane & 16) / 16));
#pragma unroll
    for (int n = 0; n < kScoreTiles; n += 2) {
      // Matrices: keys [8n, +8) x dims [16k, +8), the same keys x dims [16k + 8, +8), then keys [8n + 8, +8).
      const int row = n * 8 + (lane & 7) + (lane & 16) / 2;
      const int piece = k * 2 + (lane & 8) / 8;
      std::uint32_t b[4];
      LoadMatrices(b, keys + TileByte<kDim>(row, piece));
      MultiplyAdd<kType>(scores[n], a, b[0], b[1]);
      MultiplyAdd<kType>(scores[n + 1], a, b[2], b[3]);
    }
  }
}

// To the scores of 16 rows, which are not scaled yet; hence the bias in units of 1 / `unit`.
__device__ __forceinline__ void AddBias(const float* bias, float unit, float (&scores)[kScoreTiles][4]) {
  const auto column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int n = 0; n < kScoreTiles; ++n) {
    const float2 pair = *reinterpret_cast<const float2*>(bias + n * 8 + column);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scores[n][2 * r] = fmaf(pair.x, unit, scores[n][2 * r]);
      scores[n][2 * r + 1] = fmaf(pair.y, unit, scores[n][2 * r + 1]);
    }
  }
}

// out += weights * V of the tile.
template <int kDim, DType kType>
__device__ __forceinline__ void AddValues(const std::uint32_t (&weights)[kScoreTiles / 2][4], const std::byte* values,
                                          float (&out)[kDim / 8][4]) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int k = 0; k < kScoreTiles / 2; ++k) {
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      // Matrices: keys [16k, +8) x dims [8d, +8), keys [16k + 8, +8) x the same dims, then dims [8d + 8, +8).
      const int row = k * 16 + (lane & 15);
      const int piece = d + (lane & 16) / 16;
      std::uint32_t b[4];
      LoadMatricesTransposed(b, values + TileByte<kDim>(row, piece));
      MultiplyAdd<kType>(out[d], weights[k], b[0], b[1]);
      MultiplyAdd<kType>(out[d + 1], weights[k], b[2], b[3]);
    }
  }
}

// One tile of keys into the segment's state. `scale` is in units of log2; positions are those of this lane's two rows,
// which see `window` keys up to themselves. `bias` may be null.
template <int kDim, DType kType>
__device__ __forceinline__ void AttendTile(const std::byte* queries, const std::byte* stage, const float* bias,
                                           float bias_unit, int first_key, const int (&positions)[2], int window,
                                           float scale, WarpState<kDim>& state) {
  float scores[kScoreTiles][4];
  ScoreTile<kDim, kType>(queries, stage, scores);
  if (bias != nullptr) AddBias(bias, bias_unit, scores);
  if (first_key + kKeysPerTile - 1 > MinOf(positions[0], positions[1]) ||
      first_key <= MaxOf(positions[0], positions[1]) - window) {
    const auto column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + n * 8 + column + i % 2;
        if (key > positions[i / 2] || key <= positions[i / 2] - window) scores[n][i] = -kInfinity;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max = state.max[r];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) max = fmaxf(max, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
    max = QuadMax(max);
    // No key yet: any finite number keeps minus infinity minus it from being NaN.
    const float shift = max == -kInfinity ? 0.0F : max * scale;
    const float factor = Exp2Hardware(state.max[r] * scale - shift);
    state.max[r] = max;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[n][i] = Exp2Hardware(fmaf(scores[n][i], scale, -shift));
        sum += scores[n][i];
      }
    }
    state.sum[r] = fmaf(state.sum[r], factor, sum);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      state.out[d][2 * r] *= factor;
      state.out[d][2 * r + 1] *= factor;
    }
  }
  // The accumulators of two neighbouring products are the left operand of the next one.
  std::uint32_t weights[kScoreTiles / 2][4];
#pragma unroll
  for (int k = 0; k < kScoreTiles / 2; ++k) {
    weights[k][0] = PackPair<kType>(scores[2 * k][0], scores[2 * k][1]);
    weights[k][1] = PackPair<kType>(scores[2 * k][2], scores[2 * k][3]);
    weights[k][2] = PackPair<kType>(scores[2 * k + 1][0], scores[2 * k + 1][1]);
    weights[k][3] = PackPair<kType>(scores[2 * k + 1][2], scores[2 * k + 1][3]);
  }
  AddValues<kDim, kType>(weights, stage + kTileBytes<kDim> / 2, state.out);
}

// The segment's state into the running one, whose max is in units of log2 and whose sum is complete.
template <int kDim>
__device__ __forceinline__ void MergeSegment(const WarpState<kDim>& segment, float scale, WarpState<kDim>& running) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const MergeFactors factors = MergeFactorsOf(running.max[r], segment.max[r] * scale, Exp2Hardware);
    running.max[r] = factors.max;
    running.sum[r] = Merged(running.sum[r], QuadSum(segment.sum[r]), factors);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      running.out[d][2 * r] = Merged(running.out[d][2 * r], segment.out[d][2 * r], factors);
      running.out[d][2 * r + 1] = Merged(running.out[d][2 * r + 1], segment.out[d][2 * r + 1], factors);
    }
  }
}

// Where a lane's two rows go: an index of a state of the workspace if the item is split, else of `out` and of the
// carried states; -1: no row.
struct RowTargets {
  std::int32_t at[2];
};
static_assert(sizeof(RowTargets) == 8);

__device__ __forceinline__ RowTargets TargetsOf(const AttentionParams& params, const RowSpan& rows,
                                                const AttentionItem& item, const int (&lane_rows)[2]) {
  RowTargets targets;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    targets.at[r] = static_cast<std::int32_t>(item.work.is_split ? StateIndex(item.work.state_base, item.segment,
                                                                              params.kv.num_kv_heads, item.kv_head,
                                                                              item.work.num_rows, lane_rows[r])
                                                                 : rows.IndexOf(params, item.kv_head, lane_rows[r]));
    if (lane_rows[r] >= rows.row_end) targets.at[r] = -1;
  }
  return targets;
}

// What the pass before this one left of a lane's two rows.
template <int kDim>
__device__ __forceinline__ void ReadCarried(const AttentionParams& params, const RowTargets& targets,
                                            WarpState<kDim>& state) {
  const auto column = static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (targets.at[r] < 0) continue;
    const float* const carried = params.carried + std::int64_t{targets.at[r]} * (kDim + 2);
#pragma unroll
    for (int d = 0; d < kDim / 8; ++d) {
      const float2 pair = *reinterpret_cast<const float2*>(carried + column + d * 8);
      state.out[d][2 * r] = pair.x;
      state.out[d][2 * r + 1] = pair.y;
    }
    state.max[r] = carried[kDim];
    state.sum[r] = carried[kDim + 1];
  }
}

template <int kDim, DType kType>
__device__ __forceinline__ void WriteRows(const AttentionParams& params, bool is_split, const RowTargets& targets,
                                          const WarpState<kDim>& state) {
  const auto column = static_cast<int>(threadIdx.x % 4) * 2;
  const bool is_state = is_split || !params.finishes;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const std::int64_t at = targets.at[r];
    if (at < 0) continue;
    const float factor = is_state ? 1.0F : Normalizer(state.sum[r]);
    float* const carried = params.carried + at * (kDim + 2);
    if (is_state && column == 0) {
      float2* const max_sum = is_split ? params.state_max_sum + at : reinterpret_cast<float2*>(carried + kDim);
      *max_sum = {state.max[r], state.sum[r]};
    }
    if (is_state || params.out_dtype == DType::kF32) {
      float* out = reinterpret_cast<float*>(params.out) + at * kDim;
      if (is_state) out = is_split ? params.state_out + at * kDim : carried;
      out += column;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<float2*>(out + d * 8) = {state.out[d][2 * r] * factor, state.out[d][2 * r + 1] * factor};
      }
    } else {
      std::uint16_t* const out = reinterpret_cast<std::uint16_t*>(params.out) + at * kDim + column;
#pragma unroll
      for (int d = 0; d < kDim / 8; ++d) {
        *reinterpret_cast<std::uint32_t*>(out + d * 8) =
            PackPair<kType>(state.out[d][2 * r] * factor, state.out[d][2 * r + 1] * factor);
      }
    }
  }
}

// A block of one warp needs no barrier of the block.
template <int kWarps>
__device__ __forceinline__ void SyncBlock() {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <int kDim, int kWarps, DType kType, bool kHasBias>
__device__ __forceinline__ void AttendItem(const AttentionParams& params, const WorkRange& range,
                                           const AttentionItem& item, std::byte* shared) {
  const RowSpan rows(params, range, item);
  if (item.kv_head == 0 && item.segment == 0) WritePlan(params, rows, item);

  const auto warp = static_cast<int>(threadIdx.x / 32);
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const int warp_begin = rows.row_begin + warp * kRowsPerWarp;
  const int lane_rows[2] = {warp_begin + lane / 4, warp_begin + lane / 4 + 8};
  std::byte* const queries = shared + kStages * kTileBytes<kDim> + warp * kQueryBytes<kDim>;
  int positions[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) positions[r] = lane_rows[r] < rows.row_end ? rows.PositionOf(lane_rows[r]) : -1;
  // A warp without rows, or whose last row lies before a tile, leaves it out.
  const int warp_end = MinOf(warp_begin + kRowsPerWarp, rows.row_end);
  const int last_position = warp_begin < warp_end ? rows.PositionOf(warp_end - 1) : -1;
  const int first_position = rows.PositionOf(warp_begin);

  // In shared memory until the end: registers are scarce in between.
  __shared__ RowTargets targets[kWarps * 32];
  targets[threadIdx.x] = TargetsOf(params, rows, item, lane_rows);
  const int key_end = rows.num_keys;
  const int tile_begin = MaxOf(item.work.is_split ? item.segment * kTilesPerSegment : 0, rows.first_key / kKeysPerTile);
  const int last_tile = CeilDiv(key_end, kKeysPerTile);
  const int tile_end = item.work.is_split ? MinOf((item.segment + 1) * kTilesPerSegment, last_tile) : last_tile;

  const float scale = params.scale * kLog2E;
  WarpState<kDim> segment;
  WarpState<kDim> running;
  segment.Clear();
  running.Clear();
  TileLoader<kDim, kWarps, kHasBias> loader(params, item, key_end, shared);
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    loader.FetchBlocks(tile_begin + stage);
    if (tile_begin + stage < tile_end) loader.Load(params, tile_begin + stage);
    CommitCopies();
  }
  loader.FetchBlocks(tile_begin + kStages);
  StoreQueries<kDim>(params, rows, item.kv_head, warp_begin, queries);
#pragma unroll 1
  for (int tile = tile_begin; tile < tile_end; ++tile) {
    AwaitCopies<kStages - 1>();
    SyncBlock<kWarps>();
    if (tile * kKeysPerTile <= last_position && (tile + 1) * kKeysPerTile > first_position - params.window + 1) {
      AttendTile<kDim, kType>(queries, shared + tile % kStages * kTileBytes<kDim>,
                              kHasBias ? BiasOf<kDim, kWarps>(shared, tile) : nullptr, params.row_bias_unit,
                              tile * kKeysPerTile, positions, params.window, scale, segment);
    }
    SyncBlock<kWarps>();
    if (tile + kStages < tile_end) loader.Load(params, tile + kStages);
    CommitCopies();
    loader.FetchBlocks(tile + kStages + 1);
    if ((tile + 1) % kTilesPerSegment == 0 || tile + 1 == tile_end) {
      // Not before: the scores' registers are free only now. Nor is the condition kept in one.
      if (tile / kTilesPerSegment == tile_begin / kTilesPerSegment && !params.starts_empty && !item.work.is_split)
        ReadCarried(params, targets[threadIdx.x], running);
      MergeSegment<kDim>(segment, scale, running);
      segment.Clear();
    }
  }
  if (tile_end <= tile_begin && !params.starts_empty && !item.work.is_split)
    ReadCarried(params, targets[threadIdx.x], running);
  __syncwarp();  // all have read what WriteRows may overwrite
  WriteRows<kDim, kType>(params, item.work.is_split, targets[threadIdx.x], running);
}

template <int kDim, int kWarps, DType kType, bool kHasBias>
__global__ void __launch_bounds__(kWarps * 32, kDim == 64 ? 1 : 0)
    TensorAttentionKernel(AttentionParams params, WorkRange range) {
  std::byte* const shared = DynamicShared();
  AttentionItem item;
  if constexpr (kWarps == kDecodeWarps) {
    __shared__ ItemCursor kept;  // between items: registers are scarce in them
    if (threadIdx.x == 0) kept = ItemCursor();
    for (auto index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
      __syncwarp();
      ItemCursor cursor = kept;
      if (!FindItem(params, range, index, cursor, item)) break;
      __syncwarp();
      if (threadIdx.x == 0) kept = cursor;
      AttendItem<kDim, kWarps, kType, kHasBias>(params, range, item, shared);
    }
  } else {
    ItemCursor cursor;
    if (!FindItem(params, range, static_cast<int>(blockIdx.x), cursor, item)) return;
    AttendItem<kDim, kWarps, kType, kHasBias>(params, range, item, shared);
  }
}

template <int kDim, DType kType, bool kHasBias>
cudaError_t LaunchPrefill(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kRows = kPrefillWarps * kRowsPerWarp;
  constexpr std::size_t kShared = kSharedBytes<kDim, kPrefillWarps>;
  const auto kernel = TensorAttentionKernel<kDim, kPrefillWarps, kType, kHasBias>;
  const cudaError_t error = AllowShared(kernel, kShared);
  if (error != cudaSuccess) return error;
  const WorkRange range = {kRows, kMaxSplitRows + 1, kMaxRowsPerSequence, false};
  const int num_kv_heads = params.kv.num_kv_heads;
  // No more tiles than if every sequence's last one were almost empty.
  const std::int64_t num_tiles =
      CeilDiv<std::int64_t>(std::int64_t{params.num_tokens} * (params.num_heads / num_kv_heads), kRows) +
      params.num_sequences;
  return Launch(kernel, static_cast<unsigned>(num_tiles * num_kv_heads), kPrefillWarps * 32, kShared, stream, params,
                range);
}

// As many CTAs as run at once; they share the items among them.
template <int kDim, DType kType, bool kHasBias>
cudaError_t LaunchDecode(const AttentionParams& params, int max_rows, cudaStream_t stream) {
  constexpr std::size_t kShared = kSharedBytes<kDim, kDecodeWarps>;
  const auto kernel = TensorAttentionKernel<kDim, kDecodeWarps, kType, kHasBias>;
  cudaError_t error = AllowShared(kernel, kShared);
  if (error != cudaSuccess) return error;
  int ctas_per_multiprocessor = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&ctas_per_multiprocessor, reinterpret_cast<const void*>(kernel),
                                                        kDecodeWarps * 32, kShared);
  if (error != cudaSuccess) return error;
  const WorkRange range = {kDecodeWarps * kRowsPerWarp, 1, max_rows, true};
  return Launch(kernel, static_cast<unsigned>(params.num_multiprocessors * ctas_per_multiprocessor), kDecodeWarps * 32,
                kShared, stream, params, range);
}

template <int kDim, DType kType, bool kHasBias>
cudaError_t LaunchFor(const AttentionParams& params, cudaStream_t stream) {
  const bool is_decode = params.num_tokens <= params.num_sequences;
  if (!is_decode) {
    const cudaError_t error = LaunchPrefill<kDim, kType, kHasBias>(params, stream);
    if (error != cudaSuccess) return error;
  }
  return LaunchDecode<kDim, kType, kHasBias>(params, is_decode ? kMaxRowsPerSequence : kMaxSplitRows, stream);
}

}  // namespace

bool TensorAttentionFits(const AttentionParams& params) {
  const auto is_aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
  return (params.kv.head_dim == 64 || params.kv.head_dim == 128) && params.kv.dtype != DType::kF32 &&
         params.q_dtype == params.kv.dtype &&
         (params.out_dtype == DType::kF32 || params.out_dtype == params.kv.dtype) && params.scale > 0 &&
         is_aligned(params.q) && is_aligned(params.kv.pool) && is_aligned(params.out) && is_aligned(params.carried) &&
         is_aligned(params.row_bias) && params.row_bias_stride % 4 == 0;
}

cudaError_t LaunchTensorAttention(const AttentionParams& params, cudaStream_t stream) {
  const auto launch = [&]<DType kType, bool kHasBias>() {
    return params.kv.head_dim == 64 ? LaunchFor<64, kType, kHasBias>(params, stream)
                                    : LaunchFor<128, kType, kHasBias>(params, stream);
  };
  if (params.kv.dtype == DType::kBF16) {
    return params.row_bias == nullptr ? launch.template operator()<DType::kBF16, false>()
                                      : launch.template operator()<DType::kBF16, true>();
  }
  return params.row_bias == nullptr ? launch.template operator()<DType::kF16, false>()
                                    : launch.template operator()<DType::kF16, true>();
}

cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0 || params.num_tokens == 0) return cudaSuccess;
  const bool is_tensor = TensorAttentionFits(params);
  const cudaError_t error = is_tensor ? LaunchTensorAttention(params, stream) : LaunchPlainAttention(params, stream);
  if (error != cudaSuccess) return error;
  return LaunchMergeAttention(params, is_tensor ? MergeExponential::kHardware : MergeExponential::kPolynomial, stream);
}

}  // namespace spillway::cuda
