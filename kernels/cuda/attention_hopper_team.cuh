#pragma once

// A computing warpgroup of attention_hopper.cu.

#include "kernels/cuda/attention_hopper_shared.cuh"
#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"

namespace spillway::cuda::hopper {

inline constexpr int kRowsPerWarp = 16;

// Words 0 to 3 of lane q of a quad go to lanes 0 to 3, each the q-th.
__device__ __forceinline__ uint4 TransposeQuad(const std::uint32_t (&words)[4]) {
  const bool is_odd = (threadIdx.x & 1U) != 0;
  const bool is_high = (threadIdx.x & 2U) != 0;
  const std::uint32_t from_low = __shfl_xor_sync(kAllLanes, is_odd ? words[0] : words[1], 1);
  const std::uint32_t from_high = __shfl_xor_sync(kAllLanes, is_odd ? words[2] : words[3], 1);
  const std::uint32_t low[2] = {is_odd ? from_low : words[0], is_odd ? words[1] : from_low};
  const std::uint32_t high[2] = {is_odd ? from_high : words[2], is_odd ? words[3] : from_high};
  const std::uint32_t first = __shfl_xor_sync(kAllLanes, is_high ? low[0] : high[0], 2);
  const std::uint32_t second = __shfl_xor_sync(kAllLanes, is_high ? low[1] : high[1], 2);
  return is_high ? uint4{first, second, high[0], high[1]} : uint4{low[0], low[1], first, second};
}

// A warpgroup that computes.
template <typename S>
class Team {
 public:
  using Layout = SharedLayout<S>;
  static constexpr int kDim = S::kDim;
  static constexpr DType kType = S::kType;
  static constexpr int kKeys = S::kKeys;
  static constexpr int kStages = S::kStages;

  // The compiler learns that the team's number, and so every address in shared memory, is one for all lanes.
  __device__ Team(const AttentionParams& params)
      : params_(params),
        team_(__shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kTeamThreads - 1, 0)),
        scale_(params.scale * kLog2E) {}

  __device__ __forceinline__ void Run() {
    for (unsigned count = 0;; ++count) {
      const unsigned slot = PlaceOf<kItemSlots>(count);
      AwaitPhase(shared_.item_full(slot), ParityOf<kItemSlots>(count));
      const ItemSlot item = shared_.item(slot);
      if (item.num_rows == 0) break;
      Attend(item, slot);
    }
  }

 private:
  static constexpr int kScores = kKeys / 2;
  static constexpr int kOuts = kDim / 2;
  static constexpr int kNextRows = Layout::kParts * kSwizzleBytes;  // from 8 keys to the next 8

  // The lane's two rows in the tile.
  __device__ __forceinline__ int RowOf(int r) const {
    return team_ * kRowsPerTeam + static_cast<int>(threadIdx.x % kTeamThreads / 32) * kRowsPerWarp +
           static_cast<int>(threadIdx.x % 32 / 4) + r * 8;
  }
  // Of a row in the tile; those that are not there stand where the last one does, and are not written.
  __device__ __forceinline__ int PositionOf(const ItemSlot& item, int row) const {
    const int group = params_.num_heads / params_.kv.num_kv_heads;
    return item.first_position + (item.row_begin + MinOf(row, item.num_rows - 1)) / group;
  }

  __device__ __forceinline__ static void Release(Barrier& barrier) {
    if (IsFirstLane()) Arrive(barrier);
  }

  __device__ __forceinline__ void Attend(const ItemSlot& item, unsigned slot) {
    positions_[0] = PositionOf(item, RowOf(0));
    positions_[1] = PositionOf(item, RowOf(1));
    const int warp_row = RowOf(0) - static_cast<int>(threadIdx.x % 32 / 4);
    unmasked_end_ = PositionOf(item, warp_row) + 1;
    unmasked_begin_ = PositionOf(item, warp_row + kRowsPerWarp - 1) - params_.window + 1;
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out_[i] = 0;
    max_[0] = max_[1] = -kInfinity;
    sum_[0] = sum_[1] = 0;

    const std::uint64_t queries =
        DescribeMatrix(shared_.queries(slot) + team_ * kRowsPerTeam * kSwizzledRowBytes, kSwizzleBytes, kSwizzleBytes);
    const int last_position = PositionOf(item, team_ * kRowsPerTeam + kRowsPerTeam - 1);
    const int tile_end = MinOf(item.tile_end, last_position / kKeys + 1);
    for (int tile = item.tile_end; tile > tile_end; --tile) PassTile();

    float factors[2];
    AwaitKeys(num_tiles_);
    MultiplyKeys(queries, num_tiles_);
    AwaitProducts<0>();
    HoldRegisters(scores_);
    Release(shared_.keys_empty(PlaceOf<kStages>(num_tiles_)));
    WeighScores((tile_end - 1) * kKeys, factors);
    PackWeights();
    if (tile_end - 2 >= item.tile_begin) AwaitKeys(num_tiles_ + 1);
    for (int tile = tile_end - 2; tile >= item.tile_begin; --tile) {
      MultiplyKeys(queries, num_tiles_ + 1);
      AwaitValues(num_tiles_);
      MultiplyValues(num_tiles_);
      AwaitProducts<1>();
      HoldRegisters(scores_);
      Release(shared_.keys_empty(PlaceOf<kStages>(num_tiles_ + 1)));
      WeighScores(tile * kKeys, factors);
      // Here, since the compiler would await the products before the exponentials if nothing were between.
      if (tile > item.tile_begin) AwaitKeys(num_tiles_ + 2);
      AwaitProducts<0>();
      HoldRegisters(out_);
      Release(shared_.values_empty(PlaceOf<kStages>(num_tiles_)));
      PackWeights();
      // Most tiles bring no new maximum.
      if (__any_sync(kAllLanes, factors[0] != 1 || factors[1] != 1)) Rescale(factors);
      ++num_tiles_;
    }
    Release(shared_.item_empty(slot));
    AwaitValues(num_tiles_);
    MultiplyValues(num_tiles_);
    AwaitProducts<0>();
    HoldRegisters(out_);
    Release(shared_.values_empty(PlaceOf<kStages>(num_tiles_)));
    ++num_tiles_;
    Write(item);
  }

  __device__ __forceinline__ void AwaitKeys(unsigned count) const {
    AwaitPhase(shared_.keys_full(PlaceOf<kStages>(count)), ParityOf<kStages>(count));
  }
  __device__ __forceinline__ void AwaitValues(unsigned count) const {
    AwaitPhase(shared_.values_full(PlaceOf<kStages>(count)), ParityOf<kStages>(count));
  }

  // The next tile has no key that any of the team's rows sees.
  __device__ __forceinline__ void PassTile() {
    AwaitKeys(num_tiles_);
    Release(shared_.keys_empty(PlaceOf<kStages>(num_tiles_)));
    AwaitValues(num_tiles_);
    Release(shared_.values_empty(PlaceOf<kStages>(num_tiles_)));
    ++num_tiles_;
  }

  // Queues scores = queries * keys of the count-th tile.
  __device__ __forceinline__ void MultiplyKeys(std::uint64_t queries, unsigned count) {
    const std::uint64_t keys = DescribeMatrix(shared_.keys(PlaceOf<kStages>(count)), kNextRows, kSwizzleBytes);
    HoldRegisters(scores_);
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const int part = k / (kPartElements / 16);
      const int inside = k % (kPartElements / 16) * 32;
      MultiplyShared<kType, kKeys>(scores_, Advance(queries, part * Layout::kQueryPartBytes + inside),
                                   Advance(keys, part * kSwizzleBytes + inside), k > 0);
    }
    CommitProducts();
  }

  // Queues out += weights * values of the count-th tile.
  __device__ __forceinline__ void MultiplyValues(unsigned count) {
    const std::uint64_t values = DescribeMatrix(shared_.values(PlaceOf<kStages>(count)), kNextRows, kSwizzleBytes);
    HoldRegisters(out_);
    BeginProducts();
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      MultiplyRegisters<kType, kDim>(out_, weights_[k], Advance(values, k * Layout::kStripBytes));
    }
    CommitProducts();
  }

  // Scores of keys from first_key on to weights under the new maximum, which their sums then are under too; what is
  // computed under the old one has to be multiplied by the factors.
  __device__ __forceinline__ void WeighScores(int first_key, float (&factors)[2]) {
    if (first_key + kKeys > unmasked_end_ || first_key < unmasked_begin_) Mask(first_key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max[2] = {max_[r], -kInfinity};
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
        max[0] = fmaxf(max[0], scores_[i + 2 * r]);
        max[1] = fmaxf(max[1], scores_[i + 2 * r + 1]);
      }
      const float new_max = QuadMax(fmaxf(max[0], max[1]));
      // No key yet: any finite number keeps minus infinity minus it from being NaN.
      const float shift = new_max == -kInfinity ? 0.0F : new_max * scale_;
      factors[r] = Exp2Hardware(max_[r] * scale_ - shift);
      max_[r] = new_max;
      float sums[2] = {sum_[r] * factors[r], 0};
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores_[i + 2 * r + j];
          score = Exp2Hardware(fmaf(score, scale_, -shift));
          sums[j] += score;
        }
      }
      sum_[r] = sums[0] + sums[1];
    }
  }

  __device__ __forceinline__ void Mask(int first_key) {
    const int lane_key = first_key + static_cast<int>(threadIdx.x % 4) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int last = positions_[r] - lane_key;
      const int before = last - params_.window;
#pragma unroll
      for (int i = 0; i < kScores; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = i * 2 + j;
          if (key > last || key <= before) scores_[i + 2 * r + j] = -kInfinity;
        }
      }
    }
  }

  // The accumulators of two neighbouring products are the left operand of the next one.
  __device__ __forceinline__ void PackWeights() {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights_[k][i] = PackPair<kType>(scores_[8 * k + 2 * i], scores_[8 * k + 2 * i + 1]);
    }
  }

  __device__ __forceinline__ void Rescale(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < kOuts; ++i) out_[i] *= factors[i / 2 % 2];
  }

  __device__ __forceinline__ void Write(const ItemSlot& item) {
    const int group = params_.num_heads / params_.kv.num_kv_heads;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = Normalizer(QuadSum(sum_[r]));
      const int row = item.row_begin + RowOf(r);
      const std::int64_t token = item.first_token + row / group;
      const std::int64_t at = (token * params_.num_heads + item.kv_head * group + row % group) * kDim;
      const bool is_there = RowOf(r) < item.num_rows;
      if (params_.out_dtype == DType::kF32) {
        float* const to = reinterpret_cast<float*>(params_.out) + at + threadIdx.x % 4 * 2;
#pragma unroll
        for (int d = 0; d < kDim / 8; ++d) {
          const float2 pair = {out_[4 * d + 2 * r] * factor, out_[4 * d + 2 * r + 1] * factor};
          if (is_there) *reinterpret_cast<float2*>(to + d * 8) = pair;
        }
      } else {
        std::byte* const to = params_.out + at * 2 + threadIdx.x % 4 * 16;
#pragma unroll
        for (int d = 0; d < kDim / 8; d += 4) {
          std::uint32_t words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            words[i] = PackPair<kType>(out_[4 * (d + i) + 2 * r] * factor, out_[4 * (d + i) + 2 * r + 1] * factor);
          }
          const uint4 eight = TransposeQuad(words);
          if (is_there) *reinterpret_cast<uint4*>(to + d * 16) = eight;
        }
      }
    }
  }

  const AttentionParams& params_;
  const Layout shared_;
  const int team_;
  const float scale_;
  unsigned num_tiles_ = 0;
  int positions_[2];
  int unmasked_begin_;  // of the warp's rows: every one sees the keys of [begin, end)
  int unmasked_end_;
  float scores_[kScores];  // of a tile; then its weights
  std::uint32_t weights_[kKeys / 16][4];
  float out_[kOuts];
  float max_[2];  // of raw scores; times scale_ it is in units of log2
  float sum_[2];  // of this lane's keys
};

}  // namespace spillway::cuda::hopper
