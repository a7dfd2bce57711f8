#pragma once

// HomeKeeper: where the blocks of a long sequence are, one that the device tier cannot hold, or hardly.
//
// Every published block of a running long sequence gets a home copy in the host tier. What has one can leave the device
// at any time, so to the scheduler it is as good as available: it is dropped, oldest segment first, when somebody needs
// blocks, and attention then reads it from home. Where home slots are short, blocks just stay on the device.
//
// Engine thread only.

#include <cstdint>
#include <optional>
#include <span>

#include "engine/input_layout.h"
#include "engine/sequence.h"
#include "kvstore/kv_store.h"

namespace spillway {

class HomeKeeper {
 public:
  // The smallest device tier that can work so: a segment that fills and one that moves.
  static constexpr std::uint32_t kMinDeviceBlocks = 2 * kSegmentBlocks;

  // `store` outlives the keeper. `inputs`: of sequences while they are long; nullopt: none are kept.
  explicit HomeKeeper(KvStore& store, const std::optional<InputLayout>& inputs = std::nullopt)
      : store_(store), inputs_(inputs) {}

  bool IsLong(const Sequence& sequence) const;

  // A home for all known tokens that kMinDeviceBlocks do not hold. True where the sequence is not long.
  bool HasHomeFor(const Sequence& sequence) const;

  // After a match on the device: pins what the host tier has of the prefix, and lets so much of it be at home only that
  // the rest fits the `num_available` device blocks beside those matched. Nothing is copied.
  void PinPrefix(Sequence& sequence, std::span<const BlockKey> keys, std::int64_t num_available) const;

  // Begins home copies of published blocks that lack one, as far as there are home slots.
  void Keep(Sequence& sequence) const;
  // Gives the blocks that the sequence's planned tokens begin slots for their inputs, as far as there are any. A block
  // that was begun without one has none for good.
  void KeepInputs(Sequence& sequence) const;
  // Published blocks of a long sequence wait for a home slot that will come by itself.
  bool AwaitsSlot(const Sequence& sequence) const;

  // Device blocks that may leave, in whole segments.
  static std::int64_t NumDroppable(const Sequence& sequence);
  // The oldest segment of the sequence on the device leaves it. NumDroppable is not 0.
  static void DropSegment(Sequence& sequence);

  static void CheckInvariants(const Sequence& sequence);

 private:
  KvStore& store_;
  const std::optional<InputLayout> inputs_;
};

}  // namespace spillway
