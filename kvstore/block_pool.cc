#include "kvstore/block_pool.h"

#include <utility>

#include "kernels/check.h"

namespace spillway {

BlockRef::BlockRef(BlockRef&& other) noexcept : pool_(std::exchange(other.pool_, nullptr)), id_(other.id_) {}

BlockRef& BlockRef::operator=(BlockRef&& other) noexcept {
  if (this != &other) {
    if (pool_ != nullptr) pool_->Release(id_);
    pool_ = std::exchange(other.pool_, nullptr);
    id_ = other.id_;
  }
  return *this;
}

BlockRef::~BlockRef() {
  if (pool_ != nullptr) pool_->Release(id_);
}

BlockRef BlockRef::Share() const {
  SPILLWAY_CHECK(pool_ != nullptr);
  return pool_->Share(id_);
}

BlockPool::BlockPool(std::uint32_t num_blocks) : slots_(num_blocks) {
  for (std::uint32_t i = num_blocks; i > 0; --i) PushFree(i - 1);
}

BlockPool::~BlockPool() { SPILLWAY_CHECK(num_held() == 0) << num_held() << " blocks are still held"; }

std::optional<BlockRef> BlockPool::Take() {
  if (first_free_ == kNone) return std::nullopt;
  const std::uint32_t index = first_free_;
  first_free_ = std::exchange(slots_[index].warmer, kNone);
  --num_free_;
  slots_[index].refs = 1;
  return BlockRef(this, BlockId{index});
}

BlockRef BlockPool::Share(BlockId id) {
  Slot& shared = slot(id);
  if (shared.refs == 0) {
    SPILLWAY_CHECK(shared.retained) << "block " << static_cast<std::uint32_t>(id) << " is free";
    UnlinkCold(static_cast<std::uint32_t>(id));
  }
  ++shared.refs;
  return {this, id};
}

void BlockPool::Retain(BlockId id) {
  SPILLWAY_CHECK(slot(id).refs > 0);
  slot(id).retained = true;
}

void BlockPool::Forget(BlockId id) {
  Slot& forgotten = slot(id);
  SPILLWAY_CHECK(forgotten.retained);
  forgotten.retained = false;
  if (forgotten.refs == 0) {
    UnlinkCold(static_cast<std::uint32_t>(id));
    PushFree(static_cast<std::uint32_t>(id));
  }
}

std::optional<BlockId> BlockPool::OldestCold() const {
  if (oldest_ == kNone) return std::nullopt;
  return BlockId{oldest_};
}

void BlockPool::Release(BlockId id) {
  Slot& released = slot(id);
  SPILLWAY_CHECK(released.refs > 0);
  if (--released.refs > 0) return;
  if (released.retained) {
    PushCold(static_cast<std::uint32_t>(id));
  } else {
    PushFree(static_cast<std::uint32_t>(id));
  }
}

void BlockPool::PushFree(std::uint32_t index) {
  slots_[index].warmer = std::exchange(first_free_, index);
  ++num_free_;
}

void BlockPool::PushCold(std::uint32_t index) {
  slots_[index].colder = newest_;
  slots_[index].warmer = kNone;
  (newest_ == kNone ? oldest_ : slots_[newest_].warmer) = index;
  newest_ = index;
  ++num_cold_;
}

void BlockPool::UnlinkCold(std::uint32_t index) {
  Slot& unlinked = slots_[index];
  (unlinked.colder == kNone ? oldest_ : slots_[unlinked.colder].warmer) = unlinked.warmer;
  (unlinked.warmer == kNone ? newest_ : slots_[unlinked.warmer].colder) = unlinked.colder;
  unlinked.colder = unlinked.warmer = kNone;
  --num_cold_;
}

void BlockPool::CheckInvariants() const {
  std::uint32_t cold = 0;
  std::uint32_t previous = kNone;
  for (std::uint32_t i = oldest_; i != kNone; i = slots_[i].warmer) {
    SPILLWAY_CHECK(slots_[i].refs == 0 && slots_[i].retained && slots_[i].colder == previous) << "cold block " << i;
    previous = i;
    SPILLWAY_CHECK(++cold <= num_cold_) << "cold list is longer than its count " << num_cold_;
  }
  SPILLWAY_CHECK(cold == num_cold_ && previous == newest_);
  std::uint32_t free = 0;
  for (std::uint32_t i = first_free_; i != kNone; i = slots_[i].warmer) {
    SPILLWAY_CHECK(slots_[i].refs == 0 && !slots_[i].retained) << "free block " << i;
    SPILLWAY_CHECK(++free <= num_free_) << "free list is longer than its count " << num_free_;
  }
  SPILLWAY_CHECK(free == num_free_);
  std::uint32_t held = 0;
  for (const Slot& each : slots_) held += each.refs > 0 ? 1 : 0;
  SPILLWAY_CHECK(held == num_held()) << held << " blocks have references, " << num_held() << " are counted as held";
}

}  // namespace spillway
