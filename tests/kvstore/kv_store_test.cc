#include "kvstore/kv_store.h"

#include <memory>
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

TEST_F(KvStoreTest, TheHostTierEvictsAPrefixFromItsTail) {
  constexpr std::uint32_t kHostBlocks = 6;
  const std::size_t block_bytes = kTinyLayout.block_bytes();
  host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, kHostBlocks * block_bytes),
                       {.block_bytes = block_bytes, .num_blocks = kHostBlocks});
  const std::unique_ptr<KvStore> owned = MakeStore(12);
  KvStore& store = *owned;
  const auto settle = [&] {
    while (store.has_transfers()) store.Collect();
  };
  std::vector<std::int32_t> tokens, other_tokens;
  std::vector<BlockKey> keys, other_keys;
  Name(1, 5, tokens, keys);
  Name(2, 3, other_tokens, other_keys);
  std::vector<BlockRef> blocks = TakeAndPublish(store, tokens, keys);
  settle();
  ASSERT_EQ(store.CountBelow(keys, tokens), 5U);
  store.MarkUsed(keys, tokens);
  KvStore::Release(blocks);
  blocks = TakeAndPublish(store, other_tokens, other_keys);  // needs two slots of the first
  settle();
  EXPECT_EQ(store.CountBelow(other_keys, other_tokens), 3U);
  EXPECT_EQ(store.CountBelow(keys, tokens), 3U) << "the head stays, so that what is left can be found";
  KvStore::Release(blocks);
}

}  // namespace
}  // namespace spillway
