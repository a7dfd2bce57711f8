// Paged attention of sequences with few query rows, for head_dim 64 and 128, q and KV in BF16 or F16, on tensor cores
// (attention_tile.cuh).
//
// Bound by memory, so: every multiprocessor always has some 100 KiB on their way. Two CTAs of it walk through their
// runs of KV (attention_runs.cuh), tile by tile through a ring of stages in shared memory, across segments and
// sequences without a gap. The four warps of a CTA share a tile: each scores 16 of its 64 keys, all read all scores and
// weigh them alike, each multiplies with a quarter of V's columns. So a tile takes a quarter of one warp's time, short
// sequences too.
//
// Where the device has a copy engine, a strip comes by one instruction; elsewhere by cp.async of all threads.

#include <atomic>

#include "kernels/cuda/attention_runs.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/tensor_map.h"

namespace spillway::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kScoresPerWarp = kScoreTiles / kWarps;  // in tiles of 8 keys
constexpr int kColumnTileBytes = kBlockTokens * kColumnBytes;

template <int kDim, bool kIsBulk>
struct Shared {
  static constexpr int kStages = (kIsBulk ? 3 : 2) * 128 / kDim;
  static constexpr int kStripBytes = kBlockTokens * 2 * kDim * 2;

  std::byte stages[kStages][kStripsPerTile * kStripBytes];
  float4 scores[2][kScoreTiles][32];  // as lanes hold them
  float bias[kStages][kKeysPerTile];
  Barrier is_full[kStages];
};

// Byte of 16-byte piece `piece` of row `row` of a stage: of K, and kDim / 8 pieces on of V. A strip's columns of 128
// bytes follow each other; pieces of 8 rows at one place fall into different banks.
template <int kDim>
__device__ __forceinline__ int StageByte(int row, int piece) {
  return row / kBlockTokens * (kBlockTokens * 2 * kDim * 2) + piece / 8 * kColumnTileBytes +
         row % kBlockTokens * kColumnBytes + ((piece % 8) ^ (row & 7)) * 16;
}

// The tiles of a piece that any of its rows sees, [begin, end) of the launch's keys.
struct TileRange {
  int begin;
  int end;

  __device__ TileRange(const RowSpan& rows, int segment, int segment_end)
      : begin(MaxOf(segment * kTilesPerSegment, rows.first_key / kKeysPerTile)),
        end(MinOf(segment_end * kTilesPerSegment, CeilDiv(rows.num_keys, kKeysPerTile))) {}
};

// Loads the tiles of a run in order. Strips without a key are left out; what stands behind the keys is anything.
template <int kDim, bool kHasBias, bool kIsBulk>
class TileFeed {
 public:
  __device__ TileFeed(const AttentionParams& params, const WorkRange& range, const Run& run)
      : cursor_(run), strips_per_block_(static_cast<int>(params.kv.block_bytes / params.kv.strip_bytes)) {
    Advance(params, range);
  }

  // The next tile into a stage that nothing is read from any more. Called by warp 0 if kIsBulk, else by all.
  __device__ __forceinline__ void Load(const AttentionParams& params, const WorkRange& range, const CUtensorMap& map,
                                       Shared<kDim, kIsBulk>& shared, int stage) {
    if (tile_ < tile_end_) {
      if constexpr (kIsBulk) {
        LoadBulk(params, map, shared, stage);
      } else {
        LoadAsync(params, shared, stage);
      }
      Advance(params, range);
    }
    if constexpr (!kIsBulk) CommitCopies();
  }

 private:
  using Memory = Shared<kDim, kIsBulk>;

  // To the next tile; its block ids are read long before they are needed, by a lane per strip.
  __device__ __forceinline__ void Advance(const AttentionParams& params, const WorkRange& range) {
    ++tile_;
    while (tile_ >= tile_end_) {
      Piece piece;
      if (!cursor_.Next(params, range, piece)) {
        tile_ = tile_end_ = 0;
        return;
      }
      const RowSpan rows(params, range, piece.item);
      const TileRange tiles(rows, piece.item.segment, piece.segment_end);
      tile_ = tiles.begin;
      tile_end_ = tiles.end;
      num_blocks_ = CeilDiv(rows.num_keys, kBlockTokens);
      blocks_ = params.block_table + params.block_begin[piece.item.sequence];
      kv_head_ = piece.item.kv_head;
    }
    const int block = tile_ * kStripsPerTile + static_cast<int>(threadIdx.x % kStripsPerTile);
    if (block < num_blocks_) block_id_ = blocks_[block];
  }

  __device__ __forceinline__ int num_strips() const {
    return MinOf(kStripsPerTile, num_blocks_ - tile_ * kStripsPerTile);
  }

  __device__ __forceinline__ void LoadBulk(const AttentionParams& params, const CUtensorMap& map, Memory& shared,
                                           int stage) {
    const auto lane = static_cast<int>(threadIdx.x % 32);
    constexpr int kBiasBytes = kHasBias ? kBlockTokens * 4 : 0;
    if (lane == 0) ArriveExpecting(shared.is_full[stage], num_strips() * (Memory::kStripBytes + kBiasBytes));
    __syncwarp();
    if (lane >= num_strips()) return;
    CopyBoxOnce(shared.stages[stage] + lane * Memory::kStripBytes, map, block_id_ * strips_per_block_ + kv_head_, 0,
                shared.is_full[stage]);
    if constexpr (kHasBias) {
      const float* const bias = params.row_bias + block_id_ * params.row_bias_stride + kv_head_ * kBlockTokens;
      CopyBulk(reinterpret_cast<std::byte*>(shared.bias[stage] + lane * kBlockTokens),
               reinterpret_cast<const std::byte*>(bias), kBiasBytes, shared.is_full[stage]);
    }
  }

  __device__ __forceinline__ void LoadAsync(const AttentionParams& params, Memory& shared, int stage) {
    constexpr int kPiecesPerRow = 2 * kDim * 2 / 16;
    constexpr int kRowsPerCopy = kThreads / kPiecesPerRow;
    constexpr int kCopiesPerStrip = kBlockTokens / kRowsPerCopy;
    const auto thread = static_cast<int>(threadIdx.x);
    const int piece = thread % kPiecesPerRow;
    const int row = thread / kPiecesPerRow;
#pragma unroll
    for (int s = 0; s < kStripsPerTile; ++s) {
      const int block_id = __shfl_sync(kAllLanes, block_id_, s);
      if (s >= num_strips()) break;
      const std::byte* const from =
          params.kv.pool + block_id * params.kv.block_bytes + kv_head_ * params.kv.strip_bytes + thread * 16;
      std::byte* const to = shared.stages[stage] + s * Memory::kStripBytes;
#pragma unroll
      for (int i = 0; i < kCopiesPerStrip; ++i) {
        CopyAsync(to + StageByte<kDim>(i * kRowsPerCopy + row, piece), from + i * kThreads * 16);
      }
      if (kHasBias && thread < kBlockTokens / 4) {
        const float* const bias = params.row_bias + block_id * params.row_bias_stride + kv_head_ * kBlockTokens;
        CopyAsync(reinterpret_cast<std::byte*>(shared.bias[stage] + s * kBlockTokens + thread * 4),
                  reinterpret_cast<const std::byte*>(bias + thread * 4));
      }
    }
  }

  RunCursor cursor_;
  const int strips_per_block_;
  int tile_ = 0;
  int tile_end_ = 0;
  int num_blocks_ = 0;
  const std::int32_t* blocks_ = nullptr;
  int kv_head_ = 0;
  std::int32_t block_id_ = 0;
};

// The 16 rows of q as the left operands of their products with K, straight from where they lie; zeros for rows that are
// not there.
template <int kDim>
__device__ __forceinline__ void LoadQueries(const AttentionParams& params, const RowSpan& rows, int kv_head,
                                            std::uint32_t (&q)[kDim / 16][4]) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = rows.row_begin + lane / 4 + 8 * r;
    const bool is_there = row < rows.row_end;
    const auto* const from = reinterpret_cast<const std::uint32_t*>(
        params.q + (is_there ? rows.IndexOf(params, kv_head, row) * kDim * 2 : 0) + lane % 4 * 4);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      q[k][r] = is_there ? from[k * 8] : 0;
      q[k][r + 2] = is_there ? from[k * 8 + 4] : 0;
    }
  }
}

// scores[n] = 16 rows x keys [16w + 8n, +8) of the tile, w the warp.
template <int kDim, DType kType>
__device__ __forceinline__ void ScoreKeys(const std::uint32_t (&q)[kDim / 16][4], const std::byte* stage,
                                          float (&scores)[kScoresPerWarp][4]) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const auto warp = static_cast<int>(threadIdx.x / 32);
  static_assert(kScoresPerWarp == 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[0][i] = scores[1][i] = 0;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    // Matrices: keys [0, 8) x dims [16k, +8), the same keys x dims [16k + 8, +8), then keys [8, 16).
    std::uint32_t b[4];
    LoadMatrices(b, stage + StageByte<kDim>(warp * 16 + (lane & 7) + (lane & 16) / 2, k * 2 + (lane & 8) / 8));
    MultiplyAdd<kType>(scores[0], q[k], b[0], b[1]);
    MultiplyAdd<kType>(scores[1], q[k], b[2], b[3]);
  }
}

// out += weights * this warp's columns of V.
template <int kDim, DType kType>
__device__ __forceinline__ void AddValues(const std::uint32_t (&weights)[kScoreTiles / 2][4], const std::byte* stage,
                                          float (&out)[kDim / kWarps / 8][4]) {
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const auto warp = static_cast<int>(threadIdx.x / 32);
#pragma unroll
  for (int k = 0; k < kScoreTiles / 2; ++k) {
#pragma unroll
    for (int d = 0; d < kDim / kWarps / 8; d += 2) {
      // Matrices: keys [16k, +8) x dims [8d, +8), keys [16k + 8, +8) x the same dims, then dims [8d + 8, +8).
      const int piece = kDim / 8 + warp * (kDim / kWarps / 8) + d + (lane & 16) / 16;
      std::uint32_t b[4];
      LoadMatricesTransposed(b, stage + StageByte<kDim>(k * 16 + (lane & 15), piece));
      MultiplyAdd<kType>(out[d], weights[k], b[0], b[1]);
      MultiplyAdd<kType>(out[d + 1], weights[k], b[2], b[3]);
    }
  }
}

// Zeros into this warp's columns of V for keys from num_valid on, since 0 times what lies there may be NaN.
template <int kDim, bool kIsBulk>
__device__ __forceinline__ void ClearValues(std::byte* stage, int num_valid) {
  constexpr int kPieces = kDim / kWarps / 8;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  const auto warp = static_cast<int>(threadIdx.x / 32);
  for (int i = num_valid * kPieces + lane; i < kKeysPerTile * kPieces; i += 32) {
    const int piece = kDim / 8 + warp * kPieces + i % kPieces;
    *reinterpret_cast<uint4*>(stage + StageByte<kDim>(i / kPieces, piece)) = uint4{0, 0, 0, 0};
  }
  if constexpr (kIsBulk) FenceShared();
  __syncwarp();
}

template <int kDim, DType kType, bool kHasBias, bool kIsBulk>
class Decoder {
 public:
  __device__ Decoder(const AttentionParams& params, const WorkRange& range, const CUtensorMap& map, const Run& run,
                     Shared<kDim, kIsBulk>& shared)
      : params_(params), range_(range), map_(map), shared_(shared), run_(run), feed_(params, range, run) {}

  __device__ __forceinline__ void Decode() {
#pragma unroll 1
    for (int stage = 0; stage < kStages; ++stage) LoadNext(stage);
    RunCursor cursor(run_);
    Piece piece;
#pragma unroll 1
    while (cursor.Next(params_, range_, piece)) AttendPiece(piece);
  }

 private:
  static constexpr int kStages = Shared<kDim, kIsBulk>::kStages;
  static constexpr int kColumns = kDim / kWarps;  // of the output, a warp's

  __device__ __forceinline__ void LoadNext(int stage) {
    if (!kIsBulk || threadIdx.x < 32) feed_.Load(params_, range_, map_, shared_, stage);
  }

  // The oldest tile of the ring is there, for all threads.
  __device__ __forceinline__ void AwaitTile() {
    if constexpr (kIsBulk) {
      AwaitPhase(shared_.is_full[stage_], parity_);
    } else {
      AwaitCopies<kStages - 2>();
      __syncthreads();
    }
  }

  __device__ __forceinline__ void AttendPiece(const Piece& piece) {
    const AttentionItem& item = piece.item;
    const RowSpan rows(params_, range_, item);
    if (item.kv_head == 0 && item.segment == piece.first_segment) {
      WritePlan(params_, rows, piece, run_);
    }
    const auto warp = static_cast<int>(threadIdx.x / 32);
    const auto lane = static_cast<int>(threadIdx.x % 32);
    const int lane_rows[2] = {rows.row_begin + lane / 4, rows.row_begin + lane / 4 + 8};
    // Rows that are not there see what the last one sees: nothing is masked for their sake.
    const int positions[2] = {rows.PositionOf(MinOf(lane_rows[0], rows.row_end - 1)),
                              rows.PositionOf(MinOf(lane_rows[1], rows.row_end - 1))};
    const int num_halves = rows.row_end - rows.row_begin > 8 ? 2 : 1;
    const float scale = params_.scale * kLog2E;
    std::uint32_t q[kDim / 16][4];
    LoadQueries<kDim>(params_, rows, item.kv_head, q);
    AttentionItem first = item;
    first.segment -= piece.first_segment;  // there are states from that on
    RowTargets targets = TargetsOf(params_, rows, first, lane_rows);
    WarpState<kColumns> running;
    running.Clear();
    if (!item.work.is_split && !params_.starts_empty) {
      ReadCarried<kDim>(params_, targets, warp * kColumns, running);
      __syncwarp();  // all have read what WriteRows may overwrite
    }
#pragma unroll 1
    for (int segment = item.segment; segment < piece.segment_end; ++segment) {
      const TileRange tiles(rows, segment, segment + 1);
      WarpState<kColumns> state;
      state.Clear();
#pragma unroll 1
      for (int tile = tiles.begin; tile < tiles.end; ++tile) {
        AttendTile(q, tile * kKeysPerTile, rows.num_keys, positions, scale, num_halves, state);
      }
      if (item.work.is_split) running.Clear();
      MergeSegment(state, scale, running);
      if (!item.work.is_split) continue;
      WriteRows<kDim, kColumns, kType>(params_, true, targets, warp * kColumns, running);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (targets.at[r] >= 0) targets.at[r] += params_.kv.num_kv_heads * item.work.num_rows;
      }
    }
    if (!item.work.is_split) WriteRows<kDim, kColumns, kType>(params_, false, targets, warp * kColumns, running);
  }

  __device__ __forceinline__ void AttendTile(const std::uint32_t (&q)[kDim / 16][4], int first_key, int num_keys,
                                             const int (&positions)[2], float scale, int num_halves,
                                             WarpState<kColumns>& state) {
    const auto warp = static_cast<int>(threadIdx.x / 32);
    const auto lane = static_cast<int>(threadIdx.x % 32);
    std::byte* const stage = shared_.stages[stage_];
    float4(&exchange)[kScoreTiles][32] = shared_.scores[num_tiles_ & 1];
    AwaitTile();
    {
      float mine[kScoresPerWarp][4];
      ScoreKeys<kDim, kType>(q, stage, mine);
      if constexpr (kHasBias) AddBias(shared_.bias[stage_] + warp * 16, params_.row_bias_unit, mine);
#pragma unroll
      for (int n = 0; n < kScoresPerWarp; ++n) {
        exchange[warp * kScoresPerWarp + n][lane] = {mine[n][0], mine[n][1], mine[n][2], mine[n][3]};
      }
    }
    // All scores are there. Of the tile before this one nothing is read any more, nor of the scores before those.
    __syncthreads();
    if (num_tiles_ > 0) LoadNext(stage_ == 0 ? kStages - 1 : stage_ - 1);
    float scores[kScoreTiles][4];
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
      const float4 four = exchange[n][lane];
      scores[n][0] = four.x;
      scores[n][1] = four.y;
      scores[n][2] = four.z;
      scores[n][3] = four.w;
    }
    std::uint32_t weights[kScoreTiles / 2][4];
    WeighTile<kColumns, kType>(scores, first_key, positions, params_.window, scale, num_halves, state, weights);
    if (num_keys - first_key < kKeysPerTile) ClearValues<kDim, kIsBulk>(stage, num_keys - first_key);
    AddValues<kDim, kType>(weights, stage, state.out);
    ++num_tiles_;
    if (++stage_ == kStages) {
      stage_ = 0;
      parity_ ^= 1;
    }
  }

  const AttentionParams& params_;
  const WorkRange& range_;
  const CUtensorMap& map_;
  Shared<kDim, kIsBulk>& shared_;
  const Run run_;
  TileFeed<kDim, kHasBias, kIsBulk> feed_;
  int num_tiles_ = 0;  // attended to
  int stage_ = 0;      // of the next one
  int parity_ = 0;
};

template <int kDim, DType kType, bool kHasBias, bool kIsBulk>
__global__ void __launch_bounds__(kThreads, 2)
    DecodeKernel(AttentionParams params, WorkRange range, const __grid_constant__ CUtensorMap map) {
  using Memory = Shared<kDim, kIsBulk>;
  auto& shared = *reinterpret_cast<Memory*>(DynamicShared());
  if (kIsBulk && threadIdx.x == 0) {
    PrefetchMap(map);
#pragma unroll
    for (int stage = 0; stage < Memory::kStages; ++stage) InitBarrier(shared.is_full[stage], 1);
  }
  Run run;
  if (!FindRun<kThreads>(params, range, run)) return;
  Decoder<kDim, kType, kHasBias, kIsBulk>(params, range, map, run, shared).Decode();
}

// CTAs of a kernel that a multiprocessor runs at once, asked for once per kernel and device: the question costs as much
// as a launch.
template <typename Kernel>
cudaError_t FindCtas(Kernel kernel, std::size_t shared_bytes, std::atomic<int>& known, int* num_ctas) {
  *num_ctas = known.load();
  if (*num_ctas > 0) return cudaSuccess;
  cudaError_t error = AllowShared(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(num_ctas, reinterpret_cast<const void*>(kernel), kThreads,
                                                        shared_bytes);
  if (error == cudaSuccess) known.store(*num_ctas);
  return error;
}

template <int kDim, DType kType, bool kHasBias, bool kIsBulk>
cudaError_t LaunchKernel(const AttentionParams& params, int max_rows, cudaStream_t stream) {
  constexpr int kMaxDevices = 64;
  static std::atomic<int> known[kMaxDevices];
  const auto kernel = DecodeKernel<kDim, kType, kHasBias, kIsBulk>;
  constexpr std::size_t kSharedBytes = sizeof(Shared<kDim, kIsBulk>);
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  int num_ctas = 0;
  error = FindCtas(kernel, kSharedBytes, known[device], &num_ctas);
  if (error != cudaSuccess) return error;
  CUtensorMap map = {};
  if constexpr (kIsBulk) {
    error = EncodeStrips(params.kv, 2 * kDim * 2 / kColumnBytes, &map);
    if (error != cudaSuccess) return error;
  }
  const WorkRange range = {kDecodeRows, 1, max_rows, true};
  return Launch(kernel, static_cast<unsigned>(params.num_multiprocessors * num_ctas), kThreads, kSharedBytes, stream,
                params, range, map);
}

template <int kDim, DType kType, bool kHasBias>
cudaError_t LaunchFor(const AttentionParams& params, int max_rows, cudaStream_t stream) {
  return params.has_copy_engine ? LaunchKernel<kDim, kType, kHasBias, true>(params, max_rows, stream)
                                : LaunchKernel<kDim, kType, kHasBias, false>(params, max_rows, stream);
}

}  // namespace

cudaError_t FindCopyEngine(bool* has_copy_engine) {
  // Code of before 9.0 traps; with less shared memory than two CTAs need, smaller stages are better.
  cudaFuncAttributes attributes = {};
  cudaError_t error =
      cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(DecodeKernel<128, DType::kBF16, false, true>));
  if (error != cudaSuccess) return error;
  int device = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  int shared_bytes = 0;
  error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  constexpr int kReservedBytes = 1 << 10;  // of every CTA
  constexpr int kNeeded = 2 * (static_cast<int>(sizeof(Shared<128, true>)) + kReservedBytes);
  *has_copy_engine = attributes.ptxVersion >= 90 && shared_bytes >= kNeeded;
  return error;
}

cudaError_t LaunchDecodeAttention(const AttentionParams& params, int max_rows, cudaStream_t stream) {
  const auto launch = [&]<DType kType, bool kHasBias>() {
    return params.kv.head_dim == 64 ? LaunchFor<64, kType, kHasBias>(params, max_rows, stream)
                                    : LaunchFor<128, kType, kHasBias>(params, max_rows, stream);
  };
  if (params.kv.dtype == DType::kBF16) {
    return params.row_bias == nullptr ? launch.template operator()<DType::kBF16, false>()
                                      : launch.template operator()<DType::kBF16, true>();
  }
  return params.row_bias == nullptr ? launch.template operator()<DType::kF16, false>()
                                    : launch.template operator()<DType::kF16, true>();
}

}  // namespace spillway::cuda
