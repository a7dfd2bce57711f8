#pragma once

// What the loading warp and the computing warpgroups of attention_hopper.cu have in common: a block's shared memory.
//
// A strip's K rows (and so its V rows) are there as two halves of 8 tokens, of each its parts of 64 elements:
// [half][part][token][64 elements], the unit that wgmma reads (kSwizzleBytes) per half and part.

#include <cstddef>

#include "kernels/cuda/bulk_copy.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/kv_layout.h"

namespace spillway::cuda::hopper {

inline constexpr int kTeams = 3;  // warpgroups that compute
inline constexpr int kTeamThreads = 128;
inline constexpr int kThreads = (1 + kTeams) * kTeamThreads;
inline constexpr int kRowsPerTeam = 64;
inline constexpr int kTileRows = kTeams * kRowsPerTeam;
inline constexpr int kItemSlots = 2;
inline constexpr int kPartElements = 64;
inline constexpr int kHalves = kBlockTokens / kSwizzledRows;  // of a strip
// Those that a block starts with are what its warpgroups can have among them; more would be waited for forever. The
// loading one needs few.
inline constexpr int kStartRegisters = (64 << 10) / kThreads;
inline constexpr int kLoaderRegisters = 32;
inline constexpr int kTeamRegisters = (kStartRegisters * (1 + kTeams) - kLoaderRegisters) / kTeams;
static_assert(kStartRegisters % 8 == 0 && kTeamRegisters % 8 == 0);

// What a kernel is compiled for. A tile has as many keys as a thread of a team has registers for.
template <int kHeadDim, DType kElement>
struct Shape {
  static constexpr int kDim = kHeadDim;
  static constexpr DType kType = kElement;
  static constexpr int kKeys = kDim == 64 ? 128 : 80;
  static constexpr int kStages = 3;
};

// What the warpgroups know of an item. num_rows is 0: there are no more items.
struct ItemSlot {
  int num_rows;
  int row_begin;
  int kv_head;
  int first_token;
  int first_position;
  int tile_begin;
  int tile_end;
};

template <typename S>
struct SharedLayout {
  static constexpr int kDim = S::kDim;
  static constexpr int kKeys = S::kKeys;
  static constexpr int kStages = S::kStages;
  static constexpr int kParts = kDim / kPartElements;
  static constexpr int kStripBytes = kBlockTokens * kDim * 2;  // of K or of V
  static constexpr int kTileBytes = kKeys * kDim * 2;          // of K or of V
  static constexpr int kQueryPartBytes = kTileRows * kSwizzledRowBytes;
  static constexpr int kQueryBytes = kParts * kQueryPartBytes;
  static constexpr int kKeysAt = 0;
  static constexpr int kValuesAt = kStages * kTileBytes;
  static constexpr int kQueriesAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kSlotsAt = kQueriesAt + kItemSlots * kQueryBytes;
  static constexpr int kBarriersAt = kSlotsAt + 64 * kItemSlots;
  static constexpr int kNumBarriers = 4 * kStages + 2 * kItemSlots;
  static constexpr int kBytes = kBarriersAt + kNumBarriers * static_cast<int>(sizeof(Barrier));
  static_assert(sizeof(ItemSlot) <= 64 && kBytes <= 227 << 10);

  std::byte* const base = DynamicShared();

  __device__ std::byte* keys(unsigned stage) const { return base + kKeysAt + stage * kTileBytes; }
  __device__ std::byte* values(unsigned stage) const { return base + kValuesAt + stage * kTileBytes; }
  __device__ std::byte* queries(unsigned slot) const { return base + kQueriesAt + slot * kQueryBytes; }
  __device__ ItemSlot& item(unsigned slot) const { return *reinterpret_cast<ItemSlot*>(base + kSlotsAt + slot * 64); }
  // Full: landed. Empty: every warp of the teams has done with it.
  __device__ Barrier& keys_full(unsigned stage) const { return barrier(stage); }
  __device__ Barrier& keys_empty(unsigned stage) const { return barrier(kStages + stage); }
  __device__ Barrier& values_full(unsigned stage) const { return barrier(2 * kStages + stage); }
  __device__ Barrier& values_empty(unsigned stage) const { return barrier(3 * kStages + stage); }
  __device__ Barrier& item_full(unsigned slot) const { return barrier(4 * kStages + slot); }
  __device__ Barrier& item_empty(unsigned slot) const { return barrier(4 * kStages + kItemSlots + slot); }

  __device__ void InitBarriers() const {
    constexpr int kWarps = kTeams * kTeamThreads / 32;
    for (unsigned stage = 0; stage < kStages; ++stage) {
      InitBarrier(keys_full(stage), 1);
      InitBarrier(keys_empty(stage), kWarps);
      InitBarrier(values_full(stage), 1);
      InitBarrier(values_empty(stage), kWarps);
    }
    for (unsigned slot = 0; slot < kItemSlots; ++slot) {
      InitBarrier(item_full(slot), 1);
      InitBarrier(item_empty(slot), kWarps);
    }
  }

 private:
  __device__ Barrier& barrier(unsigned index) const { return reinterpret_cast<Barrier*>(base + kBarriersAt)[index]; }
};

// Where a ring stands: place and parity of its count-th use.
template <int kPlaces>
__device__ __forceinline__ unsigned PlaceOf(unsigned count) {
  return count % kPlaces;
}
template <int kPlaces>
__device__ __forceinline__ int ParityOf(unsigned count) {
  return static_cast<int>(count / kPlaces & 1U);
}

__device__ __forceinline__ bool IsFirstLane() { return threadIdx.x % 32 == 0; }

}  // namespace spillway::cuda::hopper
