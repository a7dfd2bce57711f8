#include "kvstore/host_tier.h"

#include <mutex>
#include <utility>
#include <vector>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kvstore/prefix_index.h"

namespace spillway {

HostSlot& HostSlot::operator=(HostSlot&& other) noexcept {
  if (this != &other) {
    if (ref_) tier_->Release(std::move(ref_));
    tier_ = other.tier_;
    ref_ = std::move(other.ref_);
    bytes_ = other.bytes_;
  }
  return *this;
}

HostSlot::~HostSlot() {
  if (ref_) tier_->Release(std::move(ref_));
}

namespace {

// Sightings are remembered for this many blocks that are not stored; then counting starts over.
constexpr std::size_t kMaxSightings = 64'000;

class DramTier : public HostTier {
 public:
  DramTier(Buffer slab, const HostTierOptions& options)
      : slab_(std::move(slab)), options_(options), pool_(options.num_blocks), index_(options.num_blocks) {
    if (options.verify == KvVerify::kOn) checksums_.resize(options.num_blocks);
    SPILLWAY_CHECK(slab_.size_bytes >= options.block_bytes * options.num_blocks);
  }

  std::optional<HostSlot> BeginWrite(const BlockKey& key, std::span<const std::int32_t> tokens,
                                     WriteCause cause) override {
    const std::lock_guard lock(mutex_);
    if (index_.Find(key, tokens)) return std::nullopt;
    if (cause == WriteCause::kPublished && options_.store_threshold > 1) {
      if (sightings_.size() >= kMaxSightings) sightings_.clear();
      if (++sightings_[key] < options_.store_threshold) {
        ++stats_.skipped;
        return std::nullopt;
      }
    }
    std::optional<BlockRef> taken = TakeSlot();
    if (!taken) {
      ++(cause == WriteCause::kFetched ? stats_.fetches_declined : stats_.declined);
      return std::nullopt;
    }
    sightings_.erase(key);
    std::byte* const bytes = BytesOf(taken->id());
    return HostSlot(this, *std::move(taken), bytes);
  }

  std::optional<HostSlot> TakeHome() override {
    const std::lock_guard lock(mutex_);
    std::optional<BlockRef> taken = TakeSlot();
    if (!taken) return std::nullopt;
    std::byte* const bytes = BytesOf(taken->id());
    return HostSlot(this, *std::move(taken), bytes);
  }

  HostSlot Commit(HostSlot slot, const BlockKey& key, std::span<const std::int32_t> tokens) override {
    const bool is_checked = options_.verify == KvVerify::kOn;
    const std::uint64_t checksum = is_checked ? Checksum(slot.bytes()) : 0;
    std::optional<HostSlot> written_through;
    {
      const std::lock_guard lock(mutex_);
      if (is_checked) checksums_[Index(slot.id())] = checksum;
      if (index_.Insert(key, tokens, slot.id())) {
        pool_.Retain(slot.id());
        if (options_.lower != nullptr) written_through.emplace(this, pool_.Share(slot.id()), slot.bytes());
      }
      stats_.written_bytes += static_cast<std::int64_t>(options_.block_bytes);
    }
    if (written_through) {
      const std::span<const std::byte> bytes(slot.bytes(), options_.block_bytes);
      auto pinned = std::make_shared<HostSlot>(*std::move(written_through));
      options_.lower->Put(key, tokens, bytes, [pinned](const absl::Status&) mutable { pinned.reset(); });
    }
    return slot;
  }

  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    const std::lock_guard lock(mutex_);
    const std::optional<BlockId> found = index_.Find(key, tokens);
    if (!found) {
      ++stats_.misses;
      return std::nullopt;
    }
    ++stats_.hits;
    stats_.read_bytes += static_cast<std::int64_t>(options_.block_bytes);
    return HostSlot(this, pool_.Share(*found), BytesOf(*found));
  }

  bool Touch(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    const std::lock_guard lock(mutex_);
    const std::optional<BlockId> found = index_.Find(key, tokens);
    if (found) pool_.Share(*found);  // released at once, as the newest
    return found.has_value();
  }

  bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const override {
    const std::lock_guard lock(mutex_);
    return index_.Find(key, tokens).has_value();
  }

  absl::Status Verify(const HostSlot& slot) override {
    if (options_.verify == KvVerify::kOff) return absl::OkStatus();
    const std::uint64_t checksum = Checksum(slot.bytes());
    const std::lock_guard lock(mutex_);
    if (checksum == checksums_[Index(slot.id())]) return absl::OkStatus();
    ++stats_.checksum_failures;
    if (index_.Contains(slot.id())) {
      index_.Erase(slot.id());
      pool_.Forget(slot.id());
    }
    return absl::DataLossError(absl::StrCat("host tier: slot ", Index(slot.id()), " has changed since it was written"));
  }

  void Clear() override {
    const std::lock_guard lock(mutex_);
    while (const std::optional<BlockId> coldest = pool_.OldestCold()) {
      index_.Erase(*coldest);
      pool_.Forget(*coldest);
    }
    sightings_.clear();
  }

  std::byte* slab() const override { return slab_.get(); }
  std::uint32_t num_blocks() const override { return options_.num_blocks; }
  Tier* lower() const override { return options_.lower; }

  TierStats stats() const override {
    const std::lock_guard lock(mutex_);
    TierStats stats = stats_;
    stats.in_flight = pool_.num_held();
    stats.resident_blocks = static_cast<std::int64_t>(index_.size());
    stats.resident_bytes = stats.resident_blocks * static_cast<std::int64_t>(options_.block_bytes);
    stats.capacity_blocks = options_.num_blocks;
    stats.capacity_bytes =
        static_cast<std::int64_t>(options_.num_blocks) * static_cast<std::int64_t>(options_.block_bytes);
    stats.bookkeeping_bytes = static_cast<std::int64_t>(
        pool_.memory_bytes() + index_.memory_bytes() + checksums_.capacity() * sizeof(checksums_[0]) +
        sightings_.capacity() * (sizeof(decltype(sightings_)::value_type) + 1));
    return stats;
  }

  void CheckInvariants() const override {
    const std::lock_guard lock(mutex_);
    pool_.CheckInvariants();
    index_.CheckInvariants(pool_);
  }

 protected:
  void Release(BlockRef ref) override {
    const std::lock_guard lock(mutex_);
    const BlockRef released = std::move(ref);
  }

 private:
  // A free slot, else that of the coldest cached block; under the lock.
  std::optional<BlockRef> TakeSlot() {
    std::optional<BlockRef> taken = pool_.Take();
    if (taken) return taken;
    const std::optional<BlockId> coldest = pool_.OldestCold();
    if (!coldest) return std::nullopt;
    index_.Erase(*coldest);
    pool_.Forget(*coldest);
    ++stats_.evictions;
    return pool_.Take();
  }

  static std::size_t Index(BlockId id) { return static_cast<std::size_t>(id); }
  std::byte* BytesOf(BlockId id) const { return slab_.get() + Index(id) * options_.block_bytes; }
  std::uint64_t Checksum(const std::byte* bytes) const { return XXH3_64bits(bytes, options_.block_bytes); }

  const Buffer slab_;
  const HostTierOptions options_;
  mutable std::mutex mutex_;  // guards all below
  BlockPool pool_;
  PrefixIndex index_;
  std::vector<std::uint64_t> checksums_;  // by slot; empty where they are off
  absl::flat_hash_map<BlockKey, int> sightings_;
  TierStats stats_;
};

class NullHostTier : public HostTier {
 public:
  std::optional<HostSlot> BeginWrite(const BlockKey&, std::span<const std::int32_t>, WriteCause) override {
    return std::nullopt;
  }
  HostSlot Commit(HostSlot slot, const BlockKey&, std::span<const std::int32_t>) override { return slot; }
  std::optional<HostSlot> TakeHome() override { return std::nullopt; }
  std::optional<HostSlot> Find(const BlockKey&, std::span<const std::int32_t>) override { return std::nullopt; }
  bool Touch(const BlockKey&, std::span<const std::int32_t>) override { return false; }
  bool Contains(const BlockKey&, std::span<const std::int32_t>) const override { return false; }
  absl::Status Verify(const HostSlot&) override { return absl::OkStatus(); }
  void Clear() override {}
  std::byte* slab() const override { return nullptr; }
  std::uint32_t num_blocks() const override { return 0; }
  Tier* lower() const override { return nullptr; }
  TierStats stats() const override { return {}; }
  void CheckInvariants() const override {}

 protected:
  void Release(BlockRef) override {}
};

}  // namespace

std::unique_ptr<HostTier> MakeHostTier(Buffer slab, const HostTierOptions& options) {
  return std::make_unique<DramTier>(std::move(slab), options);
}

std::unique_ptr<HostTier> MakeNullHostTier() { return std::make_unique<NullHostTier>(); }

}  // namespace spillway
