#include "kvstore/prefix_index.h"

#include <algorithm>

#include "kernels/check.h"

namespace spillway {

std::optional<BlockId> PrefixIndex::Find(const BlockKey& key, std::span<const std::int32_t> tokens) const {
  const auto found = entries_.find(key);
  if (found == entries_.end() || !std::ranges::equal(found->second.tokens, tokens)) return std::nullopt;
  return found->second.block;
}

bool PrefixIndex::Insert(const BlockKey& key, std::span<const std::int32_t> tokens, BlockId block) {
  SPILLWAY_CHECK(tokens.size() == kBlockTokens);
  Entry entry{.block = block};
  std::ranges::copy(tokens, entry.tokens.begin());
  if (!entries_.try_emplace(key, entry).second) return false;
  SPILLWAY_CHECK(key_of_.try_emplace(block, key).second)
      << "block " << static_cast<std::uint32_t>(block) << " has two keys";
  return true;
}

void PrefixIndex::Erase(BlockId block) {
  const auto found = key_of_.find(block);
  SPILLWAY_CHECK(found != key_of_.end());
  entries_.erase(found->second);
  key_of_.erase(found);
}

std::size_t PrefixIndex::memory_bytes() const {
  constexpr std::size_t kControlBytes = 1;  // of a flat_hash_map, per slot
  return entries_.capacity() * (sizeof(decltype(entries_)::value_type) + kControlBytes) +
         key_of_.capacity() * (sizeof(decltype(key_of_)::value_type) + kControlBytes);
}

void PrefixIndex::CheckInvariants(const BlockPool& pool) const {
  SPILLWAY_CHECK(entries_.size() == key_of_.size());
  for (const auto& [key, entry] : entries_) {
    const auto found = key_of_.find(entry.block);
    SPILLWAY_CHECK(found != key_of_.end() && found->second == key);
    SPILLWAY_CHECK(pool.is_retained(entry.block));
  }
}

}  // namespace spillway
