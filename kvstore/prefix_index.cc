#include "kvstore/prefix_index.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/check.h"

namespace spillway {

PrefixIndex::PrefixIndex(std::uint32_t num_blocks)
    : num_blocks_(num_blocks), chains_(std::bit_ceil(std::max(num_blocks, 1U)), kEnd) {
  entries_.reserve(num_blocks);
}

// A key is a SHA-256: any of its bytes are as good as a hash of it.
std::size_t PrefixIndex::ChainOf(const BlockKey& key) const {
  std::uint64_t word = 0;
  std::memcpy(&word, key.bytes.data(), sizeof(word));
  return word & (chains_.size() - 1);
}

std::uint32_t PrefixIndex::FindBlock(const BlockKey& key) const {
  std::uint32_t at = chains_[ChainOf(key)];
  while (at != kEnd && entries_[at].key != key) at = entries_[at].next;
  return at;
}

std::optional<BlockId> PrefixIndex::Find(const BlockKey& key, std::span<const std::int32_t> tokens) const {
  const std::uint32_t found = FindBlock(key);
  if (found == kEnd || !std::ranges::equal(entries_[found].tokens, tokens)) return std::nullopt;
  return BlockId{found};
}

bool PrefixIndex::Insert(const BlockKey& key, std::span<const std::int32_t> tokens, BlockId block) {
  const auto at = static_cast<std::uint32_t>(block);
  SPILLWAY_CHECK(tokens.size() == kBlockTokens && at < num_blocks_);
  if (FindBlock(key) != kEnd) return false;
  SPILLWAY_CHECK(!Contains(block)) << "block " << at << " has two keys";
  if (at >= entries_.size()) entries_.resize(std::size_t{at} + 1);
  Entry& entry = entries_[at];
  entry.key = key;
  std::ranges::copy(tokens, entry.tokens.begin());
  std::uint32_t& first = chains_[ChainOf(key)];
  entry.next = first;
  first = at;
  ++size_;
  return true;
}

void PrefixIndex::Erase(BlockId block) {
  SPILLWAY_CHECK(Contains(block));
  const auto at = static_cast<std::uint32_t>(block);
  std::uint32_t* link = &chains_[ChainOf(entries_[at].key)];
  while (*link != at) link = &entries_[*link].next;
  *link = entries_[at].next;
  entries_[at].next = kAbsent;
  --size_;
}

bool PrefixIndex::Contains(BlockId block) const {
  const auto at = static_cast<std::uint32_t>(block);
  return at < entries_.size() && entries_[at].next != kAbsent;
}

std::size_t PrefixIndex::memory_bytes() const {
  return chains_.capacity() * sizeof(chains_[0]) + entries_.size() * sizeof(entries_[0]);
}

void PrefixIndex::CheckInvariants(const BlockPool& pool) const {
  std::size_t in_chains = 0;
  for (std::size_t chain = 0; chain < chains_.size(); ++chain) {
    for (std::uint32_t at = chains_[chain]; at != kEnd; at = entries_[at].next) {
      SPILLWAY_CHECK(at < entries_.size() && ChainOf(entries_[at].key) == chain) << "chain " << chain;
      SPILLWAY_CHECK(++in_chains <= size_) << "chains hold more than the " << size_ << " entries that are counted";
      SPILLWAY_CHECK(pool.is_retained(BlockId{at})) << "block " << at << " is in the index and not retained";
    }
  }
  SPILLWAY_CHECK(in_chains == size_) << in_chains << " entries in chains, " << size_ << " counted";
  for (std::uint32_t at = 0; at < pool.num_blocks(); ++at) {
    SPILLWAY_CHECK(!pool.is_retained(BlockId{at}) || Contains(BlockId{at}))
        << "block " << at << " is retained for nobody";
  }
}

}  // namespace spillway
