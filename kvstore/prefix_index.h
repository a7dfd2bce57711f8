#pragma once

// PrefixIndex: block key -> block of one tier's pool, with the block's own tokens, compared on every hit. Safety is not
// left to the hash where certainty costs 64 bytes a block.
//
// A hash table with chains through one array by block: keys are kept once, links are block numbers, and its size is
// fixed, so that it never stops to grow: at most 108 bytes a block. One thread at a time.

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kernels/kv_layout.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"

namespace spillway {

class PrefixIndex {
 public:
  using Tokens = std::array<std::int32_t, kBlockTokens>;

  explicit PrefixIndex(std::uint32_t num_blocks);  // of the pool

  // A key that is known and whose tokens are equal; a collision is a miss.
  std::optional<BlockId> Find(const BlockKey& key, std::span<const std::int32_t> tokens) const;
  // False where the key is known already: the first block stays.
  bool Insert(const BlockKey& key, std::span<const std::int32_t> tokens, BlockId block);
  void Erase(BlockId block);  // a block that is in the index
  bool Contains(BlockId block) const;
  std::size_t size() const { return size_; }
  std::size_t memory_bytes() const;  // that has been used

  void CheckInvariants(const BlockPool& pool) const;  // entries and retained blocks are the same set

 private:
  static constexpr std::uint32_t kEnd = ~0U;     // of a chain
  static constexpr std::uint32_t kAbsent = ~1U;  // the link of a block that is in no chain

  struct Entry {
    BlockKey key;
    Tokens tokens{};
    std::uint32_t next = kAbsent;
  };

  std::size_t ChainOf(const BlockKey& key) const;
  std::uint32_t FindBlock(const BlockKey& key) const;  // kEnd: none

  const std::uint32_t num_blocks_;
  std::vector<std::uint32_t> chains_;  // the first block of each; a power of two of them
  std::vector<Entry> entries_;         // by block, as far as blocks have been inserted; pages come with use
  std::size_t size_ = 0;
};

}  // namespace spillway
