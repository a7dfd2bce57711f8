#pragma once

// HostTier: blocks in host DRAM, process-wide, shared by all engines, internally locked.
//
// A slot is free, being written, cached or home. Cached slots are findable, kept in least-recently-used order while
// nobody reads them, and evicted for a write. A slot that is being read or written is pinned: its bytes cannot be
// reused, because its owner still exists. An entry becomes findable only by Commit, after the copy that filled it is
// done. What is cached here is advisory: a write may be declined, an entry may be gone; a lost one is computed again.
// A home slot is the only copy of a live sequence's block: pinned while the sequence runs, and trusted as the weights
// are. It may be findable as well; when its sequence drops it, it is cached or free.
//
// Where a lower tier is attached, committed blocks are written through to it.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "kernels/device.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"
#include "kvstore/tier.h"

namespace spillway {

class HostTier;

// A pinned slot: move-only; dropping it unpins (and frees the slot, if it was being written). Any thread. The tier
// outlives it.
class HostSlot {
 public:
  HostSlot() = default;
  HostSlot(HostTier* tier, BlockRef ref, std::byte* bytes) : tier_(tier), ref_(std::move(ref)), bytes_(bytes) {}
  HostSlot(HostSlot&& other) noexcept = default;
  HostSlot& operator=(HostSlot&& other) noexcept;
  HostSlot(const HostSlot&) = delete;
  HostSlot& operator=(const HostSlot&) = delete;
  ~HostSlot();

  std::byte* bytes() const { return bytes_; }
  BlockId id() const { return ref_.id(); }
  explicit operator bool() const { return static_cast<bool>(ref_); }

 private:
  HostTier* tier_ = nullptr;
  BlockRef ref_;
  std::byte* bytes_ = nullptr;
};

// Whether a write counts sightings against store_threshold, or is a block on its way up from the lower tier.
enum class WriteCause : std::uint8_t { kPublished, kFetched };

enum class KvVerify : std::uint8_t { kOff, kOn };  // on: XXH3 of a slot's bytes, taken at Commit and checked by Verify

struct HostTierOptions {
  std::size_t block_bytes = 0;
  std::uint32_t num_blocks = 0;
  // A block is stored at its Nth sighting; 0 and 1: at the first.
  int store_threshold = 0;
  KvVerify verify = KvVerify::kOff;
  Tier* lower = nullptr;  // outlives this one
};

class HostTier {
 public:
  virtual ~HostTier() = default;

  // A slot to fill with this block. nullopt: declined (known already, seen too rarely, or every slot is pinned).
  virtual std::optional<HostSlot> BeginWrite(const BlockKey& key, std::span<const std::int32_t> tokens,
                                             WriteCause cause) = 0;
  // The slot's bytes are complete. Findable from now on; the returned slot stays pinned for the caller.
  virtual HostSlot Commit(HostSlot slot, const BlockKey& key, std::span<const std::int32_t> tokens) = 0;

  // A home slot to fill; cached slots that nobody reads give way. nullopt: every slot is pinned now.
  virtual std::optional<HostSlot> TakeHome() = 0;

  // A cached block with these tokens, pinned.
  virtual std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) = 0;
  // A block of the device tier was used: its copy here is as recent. False: there is no copy.
  virtual bool Touch(const BlockKey& key, std::span<const std::int32_t> tokens) = 0;
  // Without pinning and without counting; may be out of date at once.
  virtual bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const = 0;
  // DATA_LOSS: the bytes are not those that were committed; the entry is forgotten. OK where checksums are off.
  virtual absl::Status Verify(const HostSlot& slot) = 0;

  virtual void Clear() = 0;  // forgets every cached block that nobody reads
  // Where slots lie: slot i's bytes begin at slab() + i * block_bytes. Null where there are none.
  virtual std::byte* slab() const = 0;
  virtual std::uint32_t num_blocks() const = 0;
  virtual Tier* lower() const = 0;  // null: none
  virtual TierStats stats() const = 0;
  virtual void CheckInvariants() const = 0;

 protected:
  friend class HostSlot;
  virtual void Release(BlockRef ref) = 0;
};

// `slab` holds num_blocks blocks, in host memory that the device can read (MemoryKind::kPinnedHost).
std::unique_ptr<HostTier> MakeHostTier(Buffer slab, const HostTierOptions& options);

// Offloading off: declines everything, finds nothing.
std::unique_ptr<HostTier> MakeNullHostTier();

}  // namespace spillway
