#include "kvstore/file_tier_index.h"

#include <algorithm>

#include "kernels/check.h"

namespace spillway {

bool FileTierIndex::Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const {
  const auto found = by_key_.find(key);
  return found != by_key_.end() && std::ranges::equal((*found)->tokens, tokens);
}

std::optional<FileTierIndex::Pin> FileTierIndex::FindAndPin(const BlockKey& key, std::span<const std::int32_t> tokens) {
  const auto found = by_key_.find(key);
  if (found == by_key_.end() || !std::ranges::equal((*found)->tokens, tokens)) return std::nullopt;
  const Pin pin = *found;
  ++pin->readers;
  resident_.splice(resident_.end(), resident_, pin);
  return pin;
}

void FileTierIndex::Unpin(Pin pin, Verdict verdict) {
  SPILLWAY_CHECK(pin->readers > 0);
  --pin->readers;
  const auto found = by_key_.find(pin->key);
  const bool is_resident = found != by_key_.end() && *found == pin;
  if (is_resident && verdict == Verdict::kKeep) return;
  if (is_resident) {
    by_key_.erase(found);
    leaving_.splice(leaving_.end(), resident_, pin);
  }
  if (pin->readers > 0) return;
  free_.push_back(pin->slot);
  leaving_.erase(pin);
}

std::optional<std::uint32_t> FileTierIndex::TakeFree() {
  if (free_.empty()) return std::nullopt;
  const std::uint32_t slot = free_.back();
  free_.pop_back();
  ++num_taken_;
  return slot;
}

std::uint32_t FileTierIndex::TakeNew() {
  ++num_taken_;
  return num_slots_++;
}

std::optional<std::uint32_t> FileTierIndex::TakeOldest() {
  // Blocks being read are among the newest, and there are no more of them than threads that read.
  const auto oldest = std::ranges::find(resident_, 0U, &Block::readers);
  if (oldest == resident_.end()) return std::nullopt;
  const std::uint32_t slot = oldest->slot;
  by_key_.erase(oldest->key);
  resident_.erase(oldest);
  ++num_taken_;
  return slot;
}

void FileTierIndex::GiveBack(std::uint32_t slot) {
  SPILLWAY_CHECK(num_taken_ > 0 && slot < num_slots_);
  --num_taken_;
  free_.push_back(slot);
}

void FileTierIndex::Add(const BlockKey& key, const BlockTokens& tokens, std::uint64_t payload_checksum,
                        std::uint32_t slot) {
  SPILLWAY_CHECK(num_taken_ > 0 && slot < num_slots_);
  --num_taken_;
  resident_.push_back({.key = key, .tokens = tokens, .payload_checksum = payload_checksum, .slot = slot});
  const bool is_new = by_key_.insert(std::prev(resident_.end())).second;
  SPILLWAY_CHECK(is_new);
}

std::size_t FileTierIndex::memory_bytes() const {
  constexpr std::size_t kNodeBytes = sizeof(Block) + 4 * sizeof(void*);  // links and the allocator's own
  constexpr std::size_t kSetBytes = sizeof(Pin) + 1;
  return (resident_.size() + leaving_.size()) * kNodeBytes + by_key_.capacity() * kSetBytes +
         free_.capacity() * sizeof(free_[0]);
}

void FileTierIndex::CheckInvariants() const {
  SPILLWAY_CHECK(resident_.size() == by_key_.size());
  SPILLWAY_CHECK(resident_.size() + leaving_.size() + free_.size() + num_taken_ == num_slots_);
  std::vector<bool> seen(num_slots_, false);
  const auto see = [&seen](std::uint32_t slot) {
    SPILLWAY_CHECK(slot < seen.size() && !seen[slot]) << slot;
    seen[slot] = true;
  };
  for (const Block& block : resident_) see(block.slot);
  for (const Block& block : leaving_) {
    see(block.slot);
    SPILLWAY_CHECK(block.readers > 0);
  }
  for (const std::uint32_t slot : free_) see(slot);
}

}  // namespace spillway
