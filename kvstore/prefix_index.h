#pragma once

// PrefixIndex: block key -> block of the device tier, with the block's own tokens, compared on every hit. Safety is not
// left to the hash where certainty costs 64 bytes a block. Engine thread only.

#include <array>
#include <cstdint>
#include <optional>
#include <span>

#include "absl/container/flat_hash_map.h"
#include "kernels/kv_layout.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"

namespace spillway {

class PrefixIndex {
 public:
  using Tokens = std::array<std::int32_t, kBlockTokens>;

  // A key that is known and whose tokens are equal; a collision is a miss.
  std::optional<BlockId> Find(const BlockKey& key, std::span<const std::int32_t> tokens) const;
  // False where the key is known already: the first block stays.
  bool Insert(const BlockKey& key, std::span<const std::int32_t> tokens, BlockId block);
  void Erase(BlockId block);  // a block that is in the index
  bool Contains(BlockId block) const { return key_of_.contains(block); }
  std::size_t size() const { return entries_.size(); }
  std::size_t memory_bytes() const;  // all that the index takes

  void CheckInvariants(const BlockPool& pool) const;  // entries and retained blocks are the same set

 private:
  struct Entry {
    BlockId block{};
    Tokens tokens{};
  };
  absl::flat_hash_map<BlockKey, Entry> entries_;
  absl::flat_hash_map<BlockId, BlockKey> key_of_;
};

}  // namespace spillway
