#include "kvstore/prefix_index.h"

#include <cstring>
#include <map>
#include <random>

#include "gtest/gtest.h"

namespace spillway {
namespace {

PrefixIndex::Tokens TokensOf(std::uint32_t number) {
  PrefixIndex::Tokens tokens{};
  tokens[3] = static_cast<std::int32_t>(number);
  return tokens;
}

// Keys of equal remainder modulo `num_hashes` agree in what chains are chosen by.
BlockKey KeyOf(std::uint32_t number, std::uint32_t num_hashes) {
  BlockKey key;
  const std::uint64_t hash = number % num_hashes;
  std::memcpy(key.bytes.data(), &hash, sizeof(hash));
  std::memcpy(key.bytes.data() + sizeof(hash), &number, sizeof(number));
  return key;
}

TEST(PrefixIndex, AnEqualKeyWithOtherTokensIsAMiss) {
  PrefixIndex index(4);
  EXPECT_TRUE(index.Insert(KeyOf(1, 8), TokensOf(1), BlockId{2}));
  EXPECT_EQ(index.Find(KeyOf(1, 8), TokensOf(1)), BlockId{2});
  EXPECT_EQ(index.Find(KeyOf(1, 8), TokensOf(9)), std::nullopt);
  EXPECT_FALSE(index.Insert(KeyOf(1, 8), TokensOf(9), BlockId{3})) << "the first block stays";
  EXPECT_EQ(index.size(), 1U);
}

TEST(PrefixIndexDeathTest, ABlockHasOneKey) {
  PrefixIndex index(4);
  EXPECT_TRUE(index.Insert(KeyOf(1, 8), TokensOf(1), BlockId{2}));
  EXPECT_DEATH(index.Insert(KeyOf(2, 8), TokensOf(2), BlockId{2}), "two keys");
  EXPECT_DEATH(index.Erase(BlockId{1}), "");
}

TEST(PrefixIndex, EqualsAMapOverRandomOperations) {
  constexpr std::uint32_t kBlocks = 50;
  constexpr std::uint32_t kKeys = 80;
  for (const std::uint32_t num_hashes : {1U, 7U, 1000U}) {  // all in one chain; crowded; sparse
    std::mt19937 random(num_hashes);
    PrefixIndex index(kBlocks);
    BlockPool pool(kBlocks);
    std::map<std::uint32_t, BlockId> model;  // key -> block
    std::map<BlockId, std::uint32_t> keys;
    for (int step = 0; step < 5000; ++step) {
      const std::uint32_t number = static_cast<std::uint32_t>(random()) % kKeys;
      const BlockId block{static_cast<std::uint32_t>(random()) % kBlocks};
      const bool is_used = keys.contains(block);
      ASSERT_EQ(index.Contains(block), is_used);
      if (is_used) {
        index.Erase(block);
        pool.Forget(block);
        model.erase(keys[block]);
        keys.erase(block);
      } else if (index.Insert(KeyOf(number, num_hashes), TokensOf(number), block)) {
        ASSERT_TRUE(model.emplace(number, block).second);
        keys.emplace(block, number);
        std::vector<BlockRef> taken;  // until it is this block's turn
        while (taken.empty() || taken.back().id() != block) taken.push_back(*pool.Take());
        pool.Retain(block);
      } else {
        ASSERT_TRUE(model.contains(number));
      }
      const std::uint32_t asked = static_cast<std::uint32_t>(random()) % kKeys;
      const auto found = model.find(asked);
      const std::optional<BlockId> wanted = found == model.end() ? std::nullopt : std::optional(found->second);
      ASSERT_EQ(index.Find(KeyOf(asked, num_hashes), TokensOf(asked)), wanted);
      ASSERT_EQ(index.size(), model.size());
      index.CheckInvariants(pool);
      pool.CheckInvariants();
    }
  }
}

}  // namespace
}  // namespace spillway
