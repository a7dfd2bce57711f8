#pragma once

// BlockKey: the name of a full block's content, chained over everything before it. Equal to vLLM's sha256_cbor block
// hashes, so that routers which compute those find our blocks: SHA-256 of the canonical CBOR of [parent, [tokens],
// extra], where the first parent is SHA-256 of the seed as a CBOR text string, and extra is [cache_salt] on the first
// block of a salted request, else null.

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <vector>

namespace spillway {

struct BlockKey {
  std::array<std::uint8_t, 32> bytes{};

  friend bool operator==(const BlockKey&, const BlockKey&) = default;
  template <typename H>
  friend H AbslHashValue(H state, const BlockKey& key) {
    std::uint64_t word = 0;
    std::memcpy(&word, key.bytes.data(), sizeof(word));
    return H::combine(std::move(state), word);
  }
};

// Immutable; any thread.
class KeyChain {
 public:
  explicit KeyChain(std::string_view seed);

  const BlockKey& root() const { return root_; }
  // `tokens`: the block's 16. `cache_salt` only counts where parent is the root.
  BlockKey Next(const BlockKey& parent, std::span<const std::int32_t> tokens, std::string_view cache_salt) const;
  // Of every full block of `tokens`, which begin a sequence.
  std::vector<BlockKey> Keys(std::span<const std::int32_t> tokens, std::string_view cache_salt) const;

 private:
  BlockKey root_;
};

}  // namespace spillway
