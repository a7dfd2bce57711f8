#pragma once

// A HostTier that passes everything on to a real one: the base of tiers that observe or misbehave. For tests.

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kvstore/host_tier.h"

namespace spillway::testing {

class WrappedHostTier : public HostTier {
 public:
  explicit WrappedHostTier(std::unique_ptr<HostTier> real) : real_(std::move(real)) {}

  std::optional<HostSlot> BeginWrite(const BlockKey& key, std::span<const std::int32_t> tokens,
                                     WriteCause cause) override {
    return real_->BeginWrite(key, tokens, cause);
  }
  HostSlot Commit(HostSlot slot, const BlockKey& key, std::span<const std::int32_t> tokens) override {
    return real_->Commit(std::move(slot), key, tokens);
  }
  std::optional<HostSlot> TakeHome() override { return real_->TakeHome(); }
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    return real_->Find(key, tokens);
  }
  bool Touch(const BlockKey& key, std::span<const std::int32_t> tokens) override { return real_->Touch(key, tokens); }
  bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const override {
    return real_->Contains(key, tokens);
  }
  absl::Status Verify(const HostSlot& slot) override { return real_->Verify(slot); }
  void Clear() override { real_->Clear(); }
  std::byte* slab() const override { return real_->slab(); }
  std::uint32_t num_blocks() const override { return real_->num_blocks(); }
  Tier* lower() const override { return real_->lower(); }
  TierStats stats() const override { return real_->stats(); }
  void CheckInvariants() const override { real_->CheckInvariants(); }

 protected:
  void Release(BlockRef) override { SPILLWAY_CHECK(false) << "slots belong to the real tier"; }

 private:
  const std::unique_ptr<HostTier> real_;
};

// Remembers the slots that running sequences take for blocks at home, in order.
class RecordingHostTier : public WrappedHostTier {
 public:
  using WrappedHostTier::WrappedHostTier;
  std::optional<HostSlot> TakeHome() override {
    std::optional<HostSlot> slot = WrappedHostTier::TakeHome();
    if (slot) homes.push_back(slot->bytes());
    return slot;
  }
  std::vector<std::byte*> homes;  // engine thread
};

}  // namespace spillway::testing
