#pragma once

// FileTierIndex: which slot of a block file holds which block, in order of use.
//
// Every slot below num_slots() is in exactly one state:
//   free       its content means nothing
//   taken      handed out, being written
//   resident   holds a block that can be found; readers pin it
//   leaving    forgotten while somebody still reads it; free when the last reader is done
//
// Not locked: the owner's mutex covers it.

#include <cstdint>
#include <list>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/hash/hash.h"
#include "kvstore/block_key.h"
#include "kvstore/file_tier_format.h"

namespace spillway {

class FileTierIndex {
 public:
  struct Block {
    BlockKey key;
    BlockTokens tokens{};
    std::uint64_t payload_checksum = 0;
    std::uint32_t slot = 0;
    std::uint32_t readers = 0;
  };
  using Pin = std::list<Block>::iterator;  // points at its block until Unpin
  enum class Verdict : std::uint8_t { kKeep, kForget };

  // A key that is known and whose tokens are equal.
  bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const;
  bool ContainsKey(const BlockKey& key) const { return by_key_.contains(key); }

  std::optional<Pin> FindAndPin(const BlockKey& key, std::span<const std::int32_t> tokens);  // it becomes the newest
  void Unpin(Pin pin, Verdict verdict);

  std::optional<std::uint32_t> TakeFree();
  std::uint32_t TakeNew();                    // num_slots() grows by one
  std::optional<std::uint32_t> TakeOldest();  // forgets the least recently used block that nobody reads
  void GiveBack(std::uint32_t slot);          // a taken slot becomes free
  // A taken slot becomes resident, the newest. The key is not known yet.
  void Add(const BlockKey& key, const BlockTokens& tokens, std::uint64_t payload_checksum, std::uint32_t slot);

  std::uint32_t num_slots() const { return num_slots_; }
  std::uint32_t num_blocks() const { return static_cast<std::uint32_t>(resident_.size()); }
  std::size_t memory_bytes() const;  // all that the index takes

  void CheckInvariants() const;

 private:
  // Pins by the key of their blocks, which is kept there alone.
  struct HashOfKey {
    using is_transparent = void;
    std::size_t operator()(const BlockKey& key) const { return absl::HashOf(key); }
    std::size_t operator()(Pin pin) const { return absl::HashOf(pin->key); }
  };
  struct EqualKeys {
    using is_transparent = void;
    static const BlockKey& KeyOf(const BlockKey& key) { return key; }
    static const BlockKey& KeyOf(Pin pin) { return pin->key; }
    bool operator()(const auto& left, const auto& right) const { return KeyOf(left) == KeyOf(right); }
  };

  std::list<Block> resident_;  // least recently used first
  std::list<Block> leaving_;
  absl::flat_hash_set<Pin, HashOfKey, EqualKeys> by_key_;  // of resident_
  std::vector<std::uint32_t> free_;
  std::uint32_t num_taken_ = 0;
  std::uint32_t num_slots_ = 0;
};

}  // namespace spillway
