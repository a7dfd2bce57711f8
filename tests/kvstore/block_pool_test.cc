#include "kvstore/block_pool.h"

#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace spillway {
namespace {

TEST(BlockPool, TakesEachBlockOnceAndGetsItBack) {
  BlockPool pool(3);
  {
    std::vector<BlockRef> held;
    for (int i = 0; i < 3; ++i) held.push_back(*pool.Take());
    EXPECT_NE(held[0].id(), held[1].id());
    EXPECT_FALSE(pool.Take().has_value());
    EXPECT_EQ(pool.num_held(), 3U);
  }
  EXPECT_EQ(pool.num_free(), 3U);
  pool.CheckInvariants();
}

TEST(BlockPool, SharedBlockStaysUntilTheLastHolder) {
  BlockPool pool(1);
  BlockRef first = *pool.Take();
  BlockRef second = first.Share();
  first = BlockRef();
  EXPECT_EQ(pool.num_held(), 1U);
  second = BlockRef();
  EXPECT_EQ(pool.num_free(), 1U);
}

TEST(BlockPool, RetainedBlocksTurnColdInOrderOfRelease) {
  BlockPool pool(3);
  std::vector<BlockRef> held;
  for (int i = 0; i < 3; ++i) {
    held.push_back(*pool.Take());
    pool.Retain(held.back().id());
  }
  const BlockId a = held[0].id();
  const BlockId b = held[1].id();
  held[1] = BlockRef();
  held[0] = BlockRef();
  EXPECT_EQ(pool.num_cold(), 2U);
  EXPECT_EQ(pool.OldestCold(), b);
  EXPECT_FALSE(pool.Take().has_value()) << "a cold block is not free";
  {
    const BlockRef again = pool.Share(b);
    EXPECT_EQ(pool.OldestCold(), a);
  }
  EXPECT_EQ(pool.OldestCold(), a) << "a use makes it the newest";
  pool.Forget(a);
  EXPECT_EQ(pool.num_free(), 1U);
  pool.CheckInvariants();
}

TEST(BlockPool, MovedRefReleasesOnce) {
  BlockPool pool(2);
  BlockRef first = *pool.Take();
  BlockRef moved = std::move(first);
  EXPECT_FALSE(static_cast<bool>(first));  // NOLINT(bugprone-use-after-move)
  moved = *pool.Take();
  EXPECT_EQ(pool.num_held(), 1U);
}

TEST(BlockPoolDeathTest, LeakIsFatal) {
  EXPECT_DEATH(
      {
        auto* pool = new BlockPool(1);
        auto* leaked = new BlockRef(*pool->Take());
        delete pool;
        delete leaked;
      },
      "still held");
}

TEST(BlockPoolDeathTest, SharingAFreeBlockIsFatal) {
  BlockPool pool(1);
  EXPECT_DEATH(pool.Share(BlockId{0}), "is free");
}

}  // namespace
}  // namespace spillway
