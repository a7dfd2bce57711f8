// Paged causal attention of prompts, for head_dim 64 and 128, q and KV in BF16 or F16, on tensor cores
// (attention_tile.cuh); and which kernels a call takes.
//
// A warp holds 16 query rows, a CTA 128; a tile of keys (K and V rows as stored, 16 positions per strip) lies in shared
// memory, the next one on its way (cp.async, two stages).

#include "kernels/cuda/attention_tile.cuh"

namespace spillway::cuda {
namespace {

constexpr int kRowsPerWarp = 16;
constexpr int kStages = 2;
constexpr int kWarps = 8;
// Sequences of few query rows are decoded: their segments are computed side by side.
constexpr int kMaxSplitRows = 64;

template <int kDim>
constexpr int kTileBytes = 2 * kKeysPerTile* kDim * 2;  // K, then V
template <int kDim>
constexpr int kQueryBytes = kRowsPerWarp* kDim * 2;  // of one warp
constexpr int kBiasBytes = kKeysPerTile * 4;         // of a tile
constexpr int kBiasPieces = kBlockTokens * 4 / 16;   // of a strip
constexpr int kBiasThreads = kStripsPerTile * kBiasPieces;
template <int kDim>
constexpr int kSharedBytes = kStages*(kTileBytes<kDim> + kBiasBytes) + kWarps* kQueryBytes<kDim> + kBiasThreads * 8;
// What a block may have on sm_120, the smallest of our targets; beside it are RowTargets of every thread.
constexpr int kMaxSharedBytes = 99 << 10;
static_assert(kSharedBytes<128> + kWarps * 32 * 8 <= kMaxSharedBytes);

// Byte of 16-byte piece `piece` of row `row` in a tile of q, K or V. The pieces of 8 rows at one column fall into
// different banks: their low three bits are exchanged by the row.
template <int kDim>
__device__ __forceinline__ int TileByte(int row, int piece) {
  return (row * (kDim / 8) + (piece ^ (row & 7))) * 16;
}

// Of the row bias of the loaded tiles, behind them and the queries.
template <int kDim>
__device__ __forceinline__ float* BiasOf(std::byte* shared, int tile) {
  return reinterpret_cast<float*>(shared + kStages * kTileBytes<kDim> + kWarps * kQueryBytes<kDim> +
                                  tile % kStages * kBiasBytes);
}

// Behind that, where in block 0 each of kBiasThreads finds its piece.
template <int kDim>
__device__ __forceinline__ const float** BiasPlaces(std::byte* shared) {
  return reinterpret_cast<const float**>(BiasOf<kDim>(shared, 0) + kStages * kKeysPerTile);
}

template <int kDim, bool kHasBias>
class TileLoader {
 public:
  __device__ TileLoader(const AttentionParams& params, const AttentionItem& item, int key_end, std::byte* shared)
      : blocks_(params.block_table + params.block_begin[item.sequence]),
        strips_(params.kv.pool + item.kv_head * params.kv.strip_bytes),
        block_bytes_(params.kv.block_bytes),
        key_end_(key_end),
        shared_(shared) {
    if (!kHasBias || static_cast<int>(threadIdx.x) >= kBiasThreads) return;
    BiasPlaces<kDim>(shared)[threadIdx.x] =
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
    const float* const place = BiasPlaces<kDim>(shared_)[threadIdx.x];
    CopyAsync(reinterpret_cast<std::byte*>(BiasOf<kDim>(shared_, tile) + threadIdx.x * 4),
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
  std::uint32_t weights[kScoreTiles / 2][4];
  WeighTile<kDim, kType>(scores, first_key, positions, window, scale, 2, state, weights);
  AddValues<kDim, kType>(weights, stage + kTileBytes<kDim> / 2, state.out);
}

template <int kDim, DType kType, bool kHasBias>
__device__ __forceinline__ void AttendItem(const AttentionParams& params, const WorkRange& range,
                                           const AttentionItem& item, std::byte* shared) {
  const RowSpan rows(params, range, item);
  if (item.kv_head == 0) WritePlan(params, rows, item);

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
  const int tile_begin = rows.first_key / kKeysPerTile;
  const int tile_end = CeilDiv(key_end, kKeysPerTile);

  const float scale = params.scale * kLog2E;
  WarpState<kDim> segment;
  WarpState<kDim> running;
  segment.Clear();
  running.Clear();
  TileLoader<kDim, kHasBias> loader(params, item, key_end, shared);
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
    __syncthreads();
    if (tile * kKeysPerTile <= last_position && (tile + 1) * kKeysPerTile > first_position - params.window + 1) {
      AttendTile<kDim, kType>(queries, shared + tile % kStages * kTileBytes<kDim>,
                              kHasBias ? BiasOf<kDim>(shared, tile) : nullptr, params.row_bias_unit,
                              tile * kKeysPerTile, positions, params.window, scale, segment);
    }
    __syncthreads();
    if (tile + kStages < tile_end) loader.Load(params, tile + kStages);
    CommitCopies();
    loader.FetchBlocks(tile + kStages + 1);
    if ((tile + 1) % kTilesPerSegment == 0 || tile + 1 == tile_end) {
      // Not before: the scores' registers are free only now. Nor is the condition kept in one.
      if (tile / kTilesPerSegment == tile_begin / kTilesPerSegment && !params.starts_empty)
        ReadCarried<kDim>(params, targets[threadIdx.x], 0, running);
      MergeSegment<kDim>(segment, scale, running);
      segment.Clear();
    }
  }
  if (tile_end <= tile_begin && !params.starts_empty) ReadCarried<kDim>(params, targets[threadIdx.x], 0, running);
  __syncwarp();  // all have read what WriteRows may overwrite
  WriteRows<kDim, kDim, kType>(params, false, targets[threadIdx.x], 0, running);
}

template <int kDim, DType kType, bool kHasBias>
__global__ void __launch_bounds__(kWarps * 32, kDim == 64 ? 1 : 0)
    TensorAttentionKernel(AttentionParams params, WorkRange range) {
  AttentionItem item;
  ItemCursor cursor;
  if (!FindItem(params, range, static_cast<int>(blockIdx.x), cursor, item)) return;
  AttendItem<kDim, kType, kHasBias>(params, range, item, DynamicShared());
}

template <int kDim, DType kType, bool kHasBias>
cudaError_t LaunchPrefill(const AttentionParams& params, cudaStream_t stream) {
  constexpr int kRows = kWarps * kRowsPerWarp;
  constexpr std::size_t kShared = kSharedBytes<kDim>;
  const auto kernel = TensorAttentionKernel<kDim, kType, kHasBias>;
  const cudaError_t error = AllowShared(kernel, kShared);
  if (error != cudaSuccess) return error;
  const WorkRange range = {kRows, kMaxSplitRows + 1, kMaxRowsPerSequence, false};
  const int num_kv_heads = params.kv.num_kv_heads;
  // No more tiles than if every sequence's last one were almost empty.
  const std::int64_t num_tiles =
      CeilDiv<std::int64_t>(std::int64_t{params.num_tokens} * (params.num_heads / num_kv_heads), kRows) +
      params.num_sequences;
  return Launch(kernel, static_cast<unsigned>(num_tiles * num_kv_heads), kWarps * 32, kShared, stream, params, range);
}

// One token each: all are the decoding kernel's.
bool IsDecode(const AttentionParams& params) { return params.num_tokens <= params.num_sequences; }

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
  if (IsDecode(params)) return LaunchDecodeAttention(params, kMaxRowsPerSequence, stream);
  const auto launch = [&]<DType kType, bool kHasBias>() {
    return params.kv.head_dim == 64 ? LaunchPrefill<64, kType, kHasBias>(params, stream)
                                    : LaunchPrefill<128, kType, kHasBias>(params, stream);
  };
  const auto launch_of = [&]<DType kType>() {
    return params.row_bias == nullptr ? launch.template operator()<kType, false>()
                                      : launch.template operator()<kType, true>();
  };
  const auto launch_prefill = [&] {
    if (HopperPrefillFits(params)) return LaunchHopperPrefill(params, kMaxSplitRows + 1, stream);
    return params.kv.dtype == DType::kBF16 ? launch_of.template operator()<DType::kBF16>()
                                           : launch_of.template operator()<DType::kF16>();
  };
  const cudaError_t error = launch_prefill();
  if (error != cudaSuccess) return error;
  return LaunchDecodeAttention(params, kMaxSplitRows, stream);
}

cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream) {
  if (params.num_sequences == 0 || params.num_tokens == 0) return cudaSuccess;
  const bool is_tensor = TensorAttentionFits(params);
  const cudaError_t error = is_tensor ? LaunchTensorAttention(params, stream) : LaunchPlainAttention(params, stream);
  if (error != cudaSuccess) return error;
  if (!is_tensor) return LaunchMergeAttention(params, MergeExponential::kPolynomial, 0, stream);
  return LaunchMergeAttention(params, MergeExponential::kHardware, IsDecode(params) ? 0 : kMaxSplitRows, stream);
}

}  // namespace spillway::cuda
