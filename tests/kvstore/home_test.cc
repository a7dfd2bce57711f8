// Home blocks of KvStore: the copies of a running sequence in the host tier.

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/kv_store.h"

namespace spillway {
namespace {

constexpr KvLayout kTinyLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 2, .dtype = DType::kF32};
constexpr std::uint32_t kHostBlocks = 4;

class HomeTest : public ::testing::Test {
 protected:
  void Start(std::uint32_t max_home, PrefixCaching caching = PrefixCaching::kOn) {
    host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, kHostBlocks * kTinyLayout.block_bytes()),
                         {.block_bytes = kTinyLayout.block_bytes(), .num_blocks = kHostBlocks});
    store_ = *KvStore::Make(*device_, *host_,
                            {.layout = kTinyLayout,
                             .num_blocks = 8,
                             .max_home_blocks = max_home,
                             .caching = caching,
                             .pacing = {},
                             .before_copy = nullptr},
                            [this] {
                              const std::lock_guard lock(mutex_);
                              has_mail_ = true;
                              arrived_.notify_one();
                            });
  }
  static PrefixIndex::Tokens TokensOf(std::int32_t number) {
    PrefixIndex::Tokens tokens{};
    tokens.fill(number);
    return tokens;
  }
  BlockKey KeyOf(std::int32_t number) const { return chain_.Next(chain_.root(), TokensOf(number), ""); }
  // A published device block full of `number`.
  BlockRef Publish(std::int32_t number) {
    BlockRef block = *store_->Take();
    std::byte* const bytes = store_->view().pool + static_cast<std::size_t>(block.id()) * kTinyLayout.block_bytes();
    std::memset(bytes, number, kTinyLayout.block_bytes());
    store_->Publish(block, KeyOf(number), TokensOf(number), WriteThrough::kNo);
    return block;
  }
  std::shared_ptr<HomeBlock> KeepHome(const BlockRef& block, std::int32_t number) {
    return store_->KeepHome(block, KeyOf(number), TokensOf(number));
  }
  void AwaitMoves() {
    while (store_->has_transfers()) {
      std::unique_lock lock(mutex_);
      arrived_.wait(lock, [this] { return has_mail_; });
      has_mail_ = false;
      lock.unlock();
      store_->Collect();
    }
  }
  static bool IsFullOf(const HomeBlock& home, std::int32_t number) {
    return std::all_of(home.slot().bytes(), home.slot().bytes() + kTinyLayout.block_bytes(),
                       [&](std::byte byte) { return byte == static_cast<std::byte>(number); });
  }

  const KeyChain chain_{"0"};
  std::unique_ptr<Device> device_ = *MakeCpuDevice({});
  std::mutex mutex_;
  std::condition_variable arrived_;
  bool has_mail_ = false;
  std::unique_ptr<HostTier> host_;
  std::unique_ptr<KvStore> store_;
};

TEST_F(HomeTest, ACopyIsReadyOnceItIsCollectedAndIsCachedOnceItIsDropped) {
  Start(kHostBlocks);
  std::shared_ptr<HomeBlock> home = KeepHome(Publish(1), 1);
  ASSERT_TRUE(home);
  EXPECT_FALSE(home->is_ready());
  EXPECT_EQ(store_->num_home(), 1U);
  AwaitMoves();
  ASSERT_TRUE(home->is_ready());
  EXPECT_TRUE(IsFullOf(*home, 1));
  EXPECT_EQ(store_->home_view().pool + static_cast<std::size_t>(home->slot().id()) * kTinyLayout.block_bytes(),
            home->slot().bytes());
  home.reset();
  EXPECT_EQ(store_->num_home(), 0U);
  EXPECT_EQ(host_->stats().in_flight, 0);
  const std::shared_ptr<HomeBlock> again = store_->PinHome(KeyOf(1), TokensOf(1));
  ASSERT_TRUE(again);
  EXPECT_TRUE(again->is_ready());
  store_->CheckInvariants();
}

TEST_F(HomeTest, CachedBlocksGiveWayAndHomeBlocksDoNot) {
  Start(kHostBlocks);
  for (std::int32_t i = 10; i < 14; ++i) {
    const BlockRef block = *store_->Take();
    store_->Publish(block, KeyOf(i), TokensOf(i));
  }
  AwaitMoves();
  EXPECT_EQ(host_->stats().resident_blocks, 4);
  std::vector<std::shared_ptr<HomeBlock>> home;
  for (std::int32_t i = 1; i <= 3; ++i) home.push_back(KeepHome(Publish(i), i));
  AwaitMoves();
  EXPECT_EQ(host_->stats().evictions, 3);
  for (std::int32_t i = 20; i < 24; ++i) {  // a storm of cached writes
    const BlockRef block = *store_->Take();
    store_->Publish(block, KeyOf(i), TokensOf(i));
  }
  AwaitMoves();
  for (std::int32_t i = 1; i <= 3; ++i) {
    EXPECT_TRUE(IsFullOf(*home[static_cast<std::size_t>(i - 1)], i));
    EXPECT_TRUE(host_->Contains(KeyOf(i), TokensOf(i)));
  }
  KvStore::Release(home);
  store_->CheckInvariants();
}

TEST_F(HomeTest, NoMoreThanItsShareIsTaken) {
  Start(2);
  const std::shared_ptr<HomeBlock> first = KeepHome(Publish(1), 1);
  const std::shared_ptr<HomeBlock> second = KeepHome(Publish(2), 2);
  EXPECT_TRUE(first && second);
  EXPECT_FALSE(KeepHome(Publish(3), 3));
  EXPECT_FALSE(store_->PinHome(KeyOf(1), TokensOf(1)));
  AwaitMoves();
}

TEST_F(HomeTest, ASequenceThatGoesBeforeItsMoveEndsLeavesNothingPinned) {
  Start(kHostBlocks);
  KeepHome(Publish(1), 1).reset();
  AwaitMoves();
  EXPECT_EQ(store_->num_home(), 0U);
  EXPECT_EQ(store_->num_held(), 0U);
  EXPECT_EQ(host_->stats().in_flight, 0);
  EXPECT_TRUE(host_->Contains(KeyOf(1), TokensOf(1)));
}

TEST_F(HomeTest, WithoutPrefixCachingACopyIsNotFindable) {
  Start(kHostBlocks, PrefixCaching::kOff);
  const std::shared_ptr<HomeBlock> home = KeepHome(*store_->Take(), 1);
  AwaitMoves();
  EXPECT_TRUE(home->is_ready());
  EXPECT_FALSE(host_->Contains(KeyOf(1), TokensOf(1)));
}

}  // namespace
}  // namespace spillway
