#include "kvstore/kv_store.h"

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace spillway {
namespace {

constexpr KvLayout kTinyLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 2, .dtype = DType::kF32};

class KvStoreTest : public ::testing::Test {
 protected:
  std::unique_ptr<KvStore> MakeStore(std::uint32_t num_blocks, PrefixCaching caching = PrefixCaching::kOn) {
    return *KvStore::Make(
        *device_, *host_,
        {.layout = kTinyLayout, .num_blocks = num_blocks, .caching = caching, .pacing = {}, .before_copy = nullptr},
        [] {});
  }
  // `count` blocks of tokens, all derived from `seed`, and their keys.
  void Name(std::int32_t seed, int count, std::vector<std::int32_t>& tokens, std::vector<BlockKey>& keys) const {
    for (int i = 0; i < count * kBlockTokens; ++i) tokens.push_back(seed * 1000 + i);
    for (int i = 0; i < count; ++i) {
      keys.push_back(chain_.Next(
          i == 0 ? chain_.root() : keys.back(),
          std::span<const std::int32_t>(tokens).subspan(static_cast<std::size_t>(i) * kBlockTokens, kBlockTokens), ""));
    }
  }
  std::vector<BlockRef> TakeAndPublish(KvStore& store, const std::vector<std::int32_t>& tokens,
                                       const std::vector<BlockKey>& keys) {
    std::vector<BlockRef> blocks;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      blocks.push_back(*store.Take());
      store.Publish(blocks.back(), keys[i],
                    std::span<const std::int32_t>(tokens).subspan(i * kBlockTokens, kBlockTokens));
    }
    return blocks;
  }
  std::unique_ptr<Device> device_ = *MakeCpuDevice({});
  std::unique_ptr<HostTier> host_ = MakeNullHostTier();
  KeyChain chain_{"0"};
};

TEST_F(KvStoreTest, MatchesTheLongestPublishedRun) {
  const std::unique_ptr<KvStore> owned = MakeStore(8);
  KvStore& store = *owned;
  std::vector<std::int32_t> tokens;
  std::vector<BlockKey> keys;
  Name(1, 3, tokens, keys);
  std::vector<BlockRef> blocks = TakeAndPublish(store, tokens, keys);
  const BlockId first = blocks[0].id();
  KvStore::Release(blocks);
  EXPECT_EQ(store.num_held(), 0U);
  std::vector<BlockRef> matched = store.Match(keys, tokens);
  ASSERT_EQ(matched.size(), 3U);
  EXPECT_EQ(matched[0].id(), first);
  EXPECT_EQ(store.Match(std::span(keys).first(2), tokens).size(), 2U);
  store.CheckInvariants();
}

TEST_F(KvStoreTest, EqualKeyWithOtherTokensIsAMiss) {
  const std::unique_ptr<KvStore> owned = MakeStore(2);
  KvStore& store = *owned;
  std::vector<std::int32_t> tokens;
  std::vector<BlockKey> keys;
  Name(1, 1, tokens, keys);
  std::vector<BlockRef> blocks = TakeAndPublish(store, tokens, keys);
  tokens[7] += 1;
  EXPECT_TRUE(store.Match(keys, tokens).empty());
}

TEST_F(KvStoreTest, EvictsAPrefixFromItsTail) {
  const std::unique_ptr<KvStore> owned = MakeStore(3);
  KvStore& store = *owned;
  std::vector<std::int32_t> tokens;
  std::vector<BlockKey> keys;
  Name(1, 3, tokens, keys);
  std::vector<BlockRef> blocks = TakeAndPublish(store, tokens, keys);
  KvStore::Release(blocks);
  const std::optional<BlockRef> taken = store.Take();
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(store.Match(keys, tokens).size(), 2U);
}

TEST_F(KvStoreTest, NothingIsFoundWithCachingOff) {
  const std::unique_ptr<KvStore> owned = MakeStore(3, PrefixCaching::kOff);
  KvStore& store = *owned;
  std::vector<std::int32_t> tokens;
  std::vector<BlockKey> keys;
  Name(1, 2, tokens, keys);
  std::vector<BlockRef> blocks = TakeAndPublish(store, tokens, keys);
  KvStore::Release(blocks);
  EXPECT_TRUE(store.Match(keys, tokens).empty());
  EXPECT_EQ(store.num_cold(), 0U);
}

TEST_F(KvStoreTest, EvictColdForgetsOnlyWhatNobodyHolds) {
  const std::unique_ptr<KvStore> owned = MakeStore(4);
  KvStore& store = *owned;
  std::vector<std::int32_t> tokens;
  std::vector<BlockKey> keys;
  Name(1, 2, tokens, keys);
  std::vector<BlockRef> blocks = TakeAndPublish(store, tokens, keys);
  blocks.pop_back();
  store.EvictCold();
  EXPECT_EQ(store.Match(keys, tokens).size(), 1U);
}

// Random operations beside a model made of maps: what Match finds must have been published with those tokens and not
// been evicted; a block never has two owners that both write it.
TEST_F(KvStoreTest, AgreesWithAModelOverRandomOperations) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  constexpr std::uint32_t kBlocks = 24;
  constexpr int kPrefixes = 6;
  const std::unique_ptr<KvStore> owned = MakeStore(kBlocks);
  KvStore& store = *owned;
  struct Prefix {
    std::vector<std::int32_t> tokens;
    std::vector<BlockKey> keys;
  };
  std::vector<Prefix> prefixes(kPrefixes);
  for (int i = 0; i < kPrefixes; ++i)
    Name(i % 3, 2 + i, prefixes[static_cast<std::size_t>(i)].tokens, prefixes[static_cast<std::size_t>(i)].keys);
  std::map<BlockId, std::pair<int, std::size_t>> content;  // what was last published in a block: seed and index
  std::vector<std::vector<BlockRef>> holders;
  for (int step = 0; step < 20'000; ++step) {
    const auto kind = random() % 10;
    if (kind < 4) {
      const int which = static_cast<int>(random() % kPrefixes);
      const Prefix& prefix = prefixes[static_cast<std::size_t>(which)];
      std::vector<BlockRef> blocks = store.Match(prefix.keys, prefix.tokens);
      for (std::size_t i = 0; i < blocks.size(); ++i) {
        ASSERT_TRUE(content.contains(blocks[i].id()));
        EXPECT_EQ(content[blocks[i].id()], (std::pair{which % 3, i}));
      }
      while (blocks.size() < prefix.keys.size()) {
        std::optional<BlockRef> taken = store.Take();
        if (!taken) break;
        for (const auto& held : holders) {
          for (const BlockRef& other : held) ASSERT_NE(other.id(), taken->id()) << "taken while held";
        }
        for (const BlockRef& mine : blocks) ASSERT_NE(mine.id(), taken->id());
        const std::size_t i = blocks.size();
        const auto tokens = std::span<const std::int32_t>(prefix.tokens).subspan(i * kBlockTokens, kBlockTokens);
        store.Publish(*taken, prefix.keys[i], tokens);
        content[taken->id()] = {which % 3, i};
        blocks.push_back(*std::move(taken));
      }
      holders.push_back(std::move(blocks));
    } else if (kind < 9 && !holders.empty()) {
      const std::size_t which = random() % holders.size();
      KvStore::Release(holders[which]);
      holders.erase(holders.begin() + static_cast<std::ptrdiff_t>(which));
    } else if (random() % 20 == 0) {
      store.EvictCold();
      EXPECT_EQ(store.num_cold(), 0U);
    }
    store.CheckInvariants();
    ASSERT_EQ(store.num_available() + store.num_held(), kBlocks);
  }
  for (auto& held : holders) KvStore::Release(held);
}

}  // namespace
}  // namespace spillway
