#include "engine/home_keeper.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace spillway {
namespace {

std::span<const std::int32_t> TokensOf(const Sequence& sequence, std::size_t block) {
  return std::span<const std::int32_t>(sequence.tokens).subspan(block * kBlockTokens, kBlockTokens);
}

std::int64_t WholeSegments(std::int64_t blocks) { return blocks / kSegmentBlocks * kSegmentBlocks; }

}  // namespace

// A segment before it must be, so that blocks are home when the first of them has to leave.
bool HomeKeeper::IsLong(const Sequence& sequence) const {
  const std::int64_t num_blocks = BlocksFor(sequence.size());
  return store_.max_home() > 0 && num_blocks + kSegmentBlocks > static_cast<std::int64_t>(store_.num_blocks());
}

bool HomeKeeper::HasHomeFor(const Sequence& sequence) const {
  if (!IsLong(sequence)) return true;
  const std::int64_t num_homeless = BlocksFor(sequence.size()) - static_cast<std::int64_t>(sequence.home.size());
  return num_homeless - kMinDeviceBlocks <= std::int64_t{store_.max_home()} - store_.num_home();
}

void HomeKeeper::PinPrefix(Sequence& sequence, std::span<const BlockKey> keys, std::int64_t num_available) const {
  for (std::size_t i = 0; i < keys.size(); ++i) {
    std::shared_ptr<HomeBlock> pinned = store_.PinHome(keys[i], TokensOf(sequence, i));
    if (!pinned) break;
    sequence.home.push_back(std::move(pinned));
  }
  const auto num_matched = static_cast<std::int64_t>(sequence.blocks.size());
  const auto num_pinned = static_cast<std::int64_t>(sequence.home.size());
  if (num_pinned <= num_matched) return;
  const std::int64_t num_excess = num_pinned + kMinDeviceBlocks - (num_matched + num_available);
  const std::int64_t num_home =
      std::clamp<std::int64_t>(WholeSegments(num_excess + kSegmentBlocks - 1), 0, WholeSegments(num_pinned));
  sequence.num_home = static_cast<std::int32_t>(num_home);
  sequence.blocks.erase(sequence.blocks.begin(), sequence.blocks.begin() + std::min(num_home, num_matched));
}

void HomeKeeper::Keep(Sequence& sequence) const {
  if (!IsLong(sequence)) return;
  while (static_cast<std::int32_t>(sequence.home.size()) < sequence.num_published) {
    const std::size_t i = sequence.home.size();
    const BlockRef& block = sequence.blocks[i - static_cast<std::size_t>(sequence.num_home)];
    std::shared_ptr<HomeBlock> home = store_.KeepHome(block, sequence.keys[i], TokensOf(sequence, i));
    if (!home) return;
    sequence.home.push_back(std::move(home));
  }
}

void HomeKeeper::KeepInputs(Sequence& sequence) const {
  if (!inputs_ || !IsLong(sequence)) return;
  const std::size_t per_slot = inputs_->blocks_per_slot(store_.layout());
  const auto begin = static_cast<std::size_t>(BlocksFor(sequence.num_computed));
  const auto end = static_cast<std::size_t>(BlocksFor(sequence.num_computed + sequence.num_planned));
  if (sequence.inputs.size() < end) sequence.inputs.resize(end);
  for (std::size_t i = begin; i < end; ++i) {
    const std::size_t index = i % per_slot;
    KeptInputs& kept = sequence.inputs[i];
    if (index > 0) kept.slot = sequence.inputs[i - 1].slot;
    if (kept.slot == nullptr) kept.slot = store_.TakeCompanion();
    if (kept.slot == nullptr) continue;
    kept.bytes = kept.slot->slot().bytes() + index * inputs_->block_bytes();
  }
}

bool HomeKeeper::AwaitsSlot(const Sequence& sequence) const {
  return IsLong(sequence) && static_cast<std::int32_t>(sequence.home.size()) < sequence.num_published &&
         store_.num_home() < store_.max_home();
}

std::int64_t HomeKeeper::NumDroppable(const Sequence& sequence) {
  const auto num_kept =
      std::min(static_cast<std::int64_t>(sequence.home.size()), static_cast<std::int64_t>(sequence.num_published));
  const auto begin = sequence.home.begin() + sequence.num_home;
  const auto end = sequence.home.begin() + std::max<std::int64_t>(num_kept, sequence.num_home);
  const auto is_moving = [](const auto& home) { return !home->is_ready(); };
  return WholeSegments(std::find_if(begin, end, is_moving) - begin);
}

void HomeKeeper::DropSegment(Sequence& sequence) {
  for (std::int32_t i = 0; i < kSegmentBlocks; ++i) {
    SPILLWAY_CHECK(sequence.home[static_cast<std::size_t>(sequence.num_home + i)]->is_ready());
  }
  // Back to front, as all releases are.
  for (std::int32_t i = kSegmentBlocks; i > 0; --i) {
    const BlockRef dropped = std::move(sequence.blocks[static_cast<std::size_t>(i - 1)]);
  }
  sequence.blocks.erase(sequence.blocks.begin(), sequence.blocks.begin() + kSegmentBlocks);
  sequence.num_home += kSegmentBlocks;
}

void HomeKeeper::CheckInvariants(const Sequence& sequence) {
  SPILLWAY_CHECK(sequence.num_home % kSegmentBlocks == 0);
  SPILLWAY_CHECK(sequence.num_home <= static_cast<std::int32_t>(sequence.home.size()));
  for (std::int32_t i = 0; i < sequence.num_home; ++i) {
    SPILLWAY_CHECK(sequence.home[static_cast<std::size_t>(i)]->is_ready()) << "block " << i << " is nowhere";
  }
}

}  // namespace spillway
