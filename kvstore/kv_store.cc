#include "kvstore/kv_store.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <utility>

#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

// Stores handed to the transfer engine at once: enough for the time until the engine collects again, which may be a
// long step. Each holds its block, so this is also all that write-through can keep from Take for a moment.
std::uint32_t MaxStoring(std::uint32_t num_blocks) { return std::clamp(num_blocks / 8, 4U, 256U); }

}  // namespace

absl::StatusOr<std::unique_ptr<KvStore>> KvStore::Make(Device& device, HostTier& host, const KvStoreOptions& options,
                                                       std::function<void()> wake) {
  const std::size_t block_bytes = options.layout.block_bytes();
  ASSIGN_OR_RETURN(Buffer slab, device.Allocate(MemoryKind::kDevice, options.num_blocks * block_bytes));
  ASSIGN_OR_RETURN(std::unique_ptr<TransferEngine> transfers,
                   TransferEngine::Make(device, host,
                                        {.block_bytes = block_bytes,
                                         .max_bytes_per_second = options.max_transfer_bytes_per_second,
                                         .pacing = options.pacing,
                                         .before_copy = options.before_copy},
                                        std::move(wake)));
  PacedLink* const link = &transfers->link();
  std::unique_ptr<KvStore> store = Make(std::move(slab), std::move(transfers), host, options);
  store->link_ = link;
  return store;
}

std::unique_ptr<KvStore> KvStore::Make(Buffer slab, std::unique_ptr<BlockTransfers> transfers, HostTier& host,
                                       const KvStoreOptions& options) {
  std::unique_ptr<KvStore> store(new KvStore(std::move(slab), host, options));
  store->transfers_ = std::move(transfers);
  return store;
}

KvStore::KvStore(Buffer slab, HostTier& host, const KvStoreOptions& options)
    : slab_(std::move(slab)), options_(options), host_(host), pool_(options.num_blocks), index_(options.num_blocks) {}

std::uint32_t KvStore::OutstandingTransfers::Add(Entry entry) {
  entry.is_used = true;
  if (unused_.empty()) {
    entries_.push_back(std::move(entry));
    return static_cast<std::uint32_t>(entries_.size() - 1);
  }
  const std::uint32_t tag = unused_.back();
  unused_.pop_back();
  entries_[tag] = std::move(entry);
  return tag;
}

KvStore::OutstandingTransfers::Entry KvStore::OutstandingTransfers::Remove(std::uint32_t tag) {
  SPILLWAY_CHECK(tag < entries_.size() && entries_[tag].is_used);
  unused_.push_back(tag);
  return std::exchange(entries_[tag], {});
}

std::byte* KvStore::BytesOf(BlockId block) const {
  return slab_.get() + static_cast<std::size_t>(block) * options_.layout.block_bytes();
}

std::vector<BlockRef> KvStore::Match(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens) {
  std::vector<BlockRef> matched;
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const auto of_block = tokens.subspan(i * kBlockTokens, kBlockTokens);
    const std::optional<BlockId> block = index_.Find(keys[i], of_block);
    if (!block) break;
    matched.push_back(pool_.Share(*block));
  }
  std::vector<std::size_t> not_below;
  MarkUsed(keys.first(matched.size()), tokens, &not_below);
  for (auto each = not_below.rbegin(); each != not_below.rend(); ++each) {
    const std::size_t i = *each;
    QueueWriteThrough(matched[i].id(), keys[i], tokens.subspan(i * kBlockTokens, kBlockTokens));
  }
  return matched;
}

void KvStore::MarkUsed(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens) {
  MarkUsed(keys, tokens, nullptr);
}

// From the tail, so that the head is the most recent. Lists those that lower tiers lack, from the tail too.
void KvStore::MarkUsed(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens,
                       std::vector<std::size_t>* not_below) {
  for (std::size_t i = keys.size(); i-- > 0;) {
    const bool is_below = host_.Touch(keys[i], tokens.subspan(i * kBlockTokens, kBlockTokens));
    if (!is_below && not_below != nullptr) not_below->push_back(i);
  }
}

std::size_t KvStore::CountBelow(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens) {
  const auto begin = std::chrono::steady_clock::now();
  const Tier* const lower = host_.lower();
  std::size_t count = 0;
  for (; count < keys.size(); ++count) {
    const auto of_block = tokens.subspan(count * kBlockTokens, kBlockTokens);
    const bool is_below = restoring_.contains(keys[count]) || host_.Contains(keys[count], of_block) ||
                          (lower != nullptr && lower->Contains(keys[count], of_block));
    if (!is_below) break;
  }
  const std::chrono::duration<double> delay = std::chrono::steady_clock::now() - begin;
  const auto bucket = static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(1e6 * delay.count())));
  ++lookups_.by_microseconds[std::min(bucket, lookups_.by_microseconds.size() - 1)];
  ++lookups_.count;
  lookups_.seconds += delay.count();
  return count;
}

std::optional<BlockRef> KvStore::Take() {
  std::optional<BlockRef> taken = pool_.Take();
  if (taken) return taken;
  const std::optional<BlockId> coldest = pool_.OldestCold();
  if (!coldest) return std::nullopt;
  Evict(*coldest);
  ++num_evicted_;
  return pool_.Take();
}

void KvStore::Evict(BlockId block) {
  index_.Erase(block);
  pool_.Forget(block);
}

void KvStore::Publish(const BlockRef& block, const BlockKey& key, std::span<const std::int32_t> tokens,
                      WriteThrough write_through) {
  if (options_.caching == PrefixCaching::kOff || index_.Contains(block.id())) return;
  if (!index_.Insert(key, tokens, block.id())) return;
  pool_.Retain(block.id());
  if (write_through == WriteThrough::kYes) QueueWriteThrough(block.id(), key, tokens);
}

void KvStore::QueueWriteThrough(BlockId block, const BlockKey& key, std::span<const std::int32_t> tokens) {
  if (host_.num_blocks() == 0 || !storing_keys_.insert(key).second) return;
  Unstored unstored{.block = block, .key = key};
  std::ranges::copy(tokens, unstored.tokens.begin());
  unstored_.push_back(unstored);
  FeedWriteThrough();
}

void KvStore::FeedWriteThrough() {
  while (num_storing_ < MaxStoring(options_.num_blocks) && !unstored_.empty()) {
    const Unstored next = unstored_.front();
    unstored_.pop_front();
    std::optional<HostSlot> slot;
    if (index_.Find(next.key, next.tokens) == next.block) {  // else it was evicted before its turn
      slot = host_.BeginWrite(next.key, next.tokens, WriteCause::kPublished);
    }
    if (!slot) {
      storing_keys_.erase(next.key);
      continue;
    }
    ++num_storing_;
    transfers_->Queue({.kind = Transfer::Kind::kStore,
                       .tag = outstanding_.Add({.block = next.block, .restoring = nullptr, .home = nullptr}),
                       .key = next.key,
                       .tokens = next.tokens,
                       .block = pool_.Share(next.block),
                       .device_bytes = BytesOf(next.block),
                       .slot = *std::move(slot),
                       .status = absl::OkStatus()});
  }
}

std::shared_ptr<HomeBlock> KvStore::KeepHome(const BlockRef& block, const BlockKey& key,
                                             std::span<const std::int32_t> tokens) {
  if (std::shared_ptr<HomeBlock> pinned = PinHome(key, tokens)) return pinned;
  if (num_home_ >= options_.max_home_blocks) return nullptr;
  std::optional<HostSlot> slot = host_.TakeHome();
  if (!slot) return nullptr;
  auto home = std::make_shared<HomeBlock>(num_home_);
  Transfer transfer{.kind = Transfer::Kind::kMoveHome,
                    .tag = outstanding_.Add({.block = block.id(), .restoring = nullptr, .home = home}),
                    .key = key,
                    .block = block.Share(),
                    .device_bytes = BytesOf(block.id()),
                    .slot = *std::move(slot),
                    .commits = options_.caching == PrefixCaching::kOn,
                    .status = absl::OkStatus()};
  std::ranges::copy(tokens, transfer.tokens.begin());
  transfers_->Queue(std::move(transfer));
  ++num_moving_home_;
  return home;
}

std::shared_ptr<HomeBlock> KvStore::PinHome(const BlockKey& key, std::span<const std::int32_t> tokens) {
  if (options_.caching == PrefixCaching::kOff || num_home_ >= options_.max_home_blocks) return nullptr;
  if (!host_.Contains(key, tokens)) return nullptr;
  std::optional<HostSlot> slot = host_.Find(key, tokens);
  if (!slot || !host_.Verify(*slot).ok()) return nullptr;
  auto home = std::make_shared<HomeBlock>(num_home_);
  home->Fill(*std::move(slot));
  return home;
}

void KvStore::Release(std::vector<std::shared_ptr<HomeBlock>>& home) {
  while (!home.empty()) home.pop_back();
}

std::shared_ptr<HomeBlock> KvStore::TakeCompanion() {
  if (num_companions_ >= options_.max_companions) return nullptr;
  std::optional<HostSlot> slot = host_.TakeHome();
  if (!slot) return nullptr;
  auto companion = std::make_shared<HomeBlock>(num_companions_);
  companion->Fill(*std::move(slot));
  return companion;
}

std::optional<KvStore::Restored> KvStore::Restore(const BlockKey& key, std::span<const std::int32_t> tokens) {
  if (const auto found = restoring_.find(key); found != restoring_.end()) {
    ++(*found)->num_waiters;
    return Restored{.block = pool_.Share((*found)->block), .restoring = *found};
  }
  std::optional<BlockRef> block = Take();
  if (!block) return std::nullopt;
  auto restoring = std::make_shared<Restoring>();
  restoring->key = key;
  restoring->block = block->id();
  restoring->num_waiters = 1;
  restoring->tag = outstanding_.Add({.block = block->id(), .restoring = restoring, .home = nullptr});
  restoring_.insert(restoring);
  Transfer transfer{.kind = Transfer::Kind::kRestore,
                    .tag = restoring->tag,
                    .key = key,
                    .block = block->Share(),
                    .device_bytes = BytesOf(block->id()),
                    .slot = HostSlot(),
                    .status = absl::OkStatus()};
  std::ranges::copy(tokens, transfer.tokens.begin());
  restoring->transfer = transfers_->Queue(std::move(transfer));
  return Restored{.block = *std::move(block), .restoring = std::move(restoring)};
}

void KvStore::Detach(const std::shared_ptr<Restoring>& restoring) {
  if (--restoring->num_waiters > 0 || restoring->state != Restoring::State::kPending) return;
  if (!transfers_->Cancel(restoring->transfer)) return;  // under way: it is published when it arrives
  restoring->state = Restoring::State::kFailed;
  outstanding_.Remove(restoring->tag);
  restoring_.erase(restoring->key);
}

bool KvStore::Collect() {
  bool has_restored = false;
  for (Transfer& transfer : transfers_->Collect()) {
    const OutstandingTransfers::Entry outstanding = outstanding_.Remove(transfer.tag);
    if (transfer.kind == Transfer::Kind::kStore) {
      --num_storing_;
      storing_keys_.erase(transfer.key);
    } else if (transfer.kind == Transfer::Kind::kMoveHome) {
      --num_moving_home_;
      if (transfer.status.ok()) {
        outstanding.home->Fill(std::move(transfer.slot));
      } else {
        status_.Update(transfer.status);
      }
    } else {
      has_restored = true;
      Restoring& restoring = *outstanding.restoring;
      restoring.state = transfer.status.ok() ? Restoring::State::kReady : Restoring::State::kFailed;
      if (transfer.status.ok() && index_.Insert(transfer.key, transfer.tokens, transfer.block.id())) {
        pool_.Retain(transfer.block.id());
      }
      restoring_.erase(transfer.key);
    }
  }
  FeedWriteThrough();
  return has_restored;
}

std::uint32_t KvStore::num_returning() const {
  std::uint32_t count = 0;
  for (const auto& each : outstanding_.entries()) count += each.is_used && pool_.refs(each.block) == 1 ? 1 : 0;
  return count;
}

void KvStore::Release(std::vector<BlockRef>& blocks) {
  while (!blocks.empty()) blocks.pop_back();
}

void KvStore::EvictCold() {
  while (const std::optional<BlockId> coldest = pool_.OldestCold()) Evict(*coldest);
}

void KvStore::CheckInvariants() const {
  pool_.CheckInvariants();
  index_.CheckInvariants(pool_);
  SPILLWAY_CHECK(restoring_.size() + num_storing_ + num_moving_home_ == outstanding_.size());
  SPILLWAY_CHECK(num_home_ <= options_.max_home_blocks && num_moving_home_ <= num_home_);
  SPILLWAY_CHECK(num_companions_ <= options_.max_companions);
  SPILLWAY_CHECK(storing_keys_.size() == unstored_.size() + num_storing_);
}

}  // namespace spillway
