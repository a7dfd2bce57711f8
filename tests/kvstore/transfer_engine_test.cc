#include "kvstore/transfer_engine.h"

#include <algorithm>
#include <cstring>
#include <future>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace spillway {
namespace {

constexpr std::size_t kBlockBytes = 4096;
constexpr std::uint32_t kBlocks = 32;

class TransferEngineTest : public ::testing::Test {
 protected:
  void Start(TransferOptions options = {}) {
    options.block_bytes = kBlockBytes;
    engine_ = *TransferEngine::Make(*device_, *host_, options, [this] {
      const std::lock_guard lock(mutex_);
      has_mail_ = true;
      arrived_.notify_one();
    });
  }
  static BlockKey KeyOf(std::uint32_t number) {
    BlockKey key;
    std::memcpy(key.bytes.data(), &number, sizeof(number));
    return key;
  }
  static PrefixIndex::Tokens TokensOf(std::uint32_t number) {
    PrefixIndex::Tokens tokens;
    tokens.fill(static_cast<std::int32_t>(number));
    return tokens;
  }
  std::byte* BytesOf(const BlockRef& block) const {
    return slab_.get() + static_cast<std::size_t>(block.id()) * kBlockBytes;
  }
  // Queues the store of a new device block whose bytes say `number`.
  std::uint64_t Store(std::uint32_t number, BlockRef block) {
    std::memset(BytesOf(block), static_cast<int>(number + 1), kBlockBytes);
    Transfer transfer;
    transfer.kind = Transfer::Kind::kStore;
    transfer.key = KeyOf(number);
    transfer.tokens = TokensOf(number);
    transfer.device_bytes = BytesOf(block);
    transfer.block = std::move(block);
    transfer.slot = *host_->BeginWrite(transfer.key, transfer.tokens, WriteCause::kPublished);
    return engine_->Queue(std::move(transfer));
  }
  std::uint64_t Restore(std::uint32_t number, BlockRef block) {
    Transfer transfer;
    transfer.key = KeyOf(number);
    transfer.tokens = TokensOf(number);
    transfer.device_bytes = BytesOf(block);
    transfer.block = std::move(block);
    return engine_->Queue(std::move(transfer));
  }
  // The next `count` that end, in order.
  std::vector<Transfer> Await(std::size_t count) {
    std::vector<Transfer> ended;
    while (ended.size() < count) {
      for (Transfer& transfer : engine_->Collect()) ended.push_back(std::move(transfer));
      if (ended.size() >= count) break;
      std::unique_lock lock(mutex_);
      arrived_.wait(lock, [this] { return std::exchange(has_mail_, false); });
    }
    return ended;
  }
  void StoreAndAwait(std::uint32_t count) {
    for (std::uint32_t i = 0; i < count; ++i) Store(i, *pool_.Take());
    for (const Transfer& transfer : Await(count)) ASSERT_TRUE(transfer.status.ok()) << transfer.status;
  }

  std::unique_ptr<Device> device_ = *MakeCpuDevice({});
  Buffer slab_ = *device_->Allocate(MemoryKind::kDevice, kBlocks* kBlockBytes);
  std::unique_ptr<HostTier> host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, kBlocks* kBlockBytes),
                                                 {.block_bytes = kBlockBytes, .num_blocks = kBlocks});
  BlockPool pool_{kBlocks};
  std::mutex mutex_;
  std::condition_variable arrived_;
  bool has_mail_ = false;
  std::unique_ptr<TransferEngine> engine_;
};

// A transfer thread that is held before its first copy, so that what is queued meanwhile is there at once.
class Hold {
 public:
  // Holds the transfer of `number`; notes the order of all.
  std::function<absl::Status(const Transfer&)> At(std::uint32_t number) {
    return [this, number](const Transfer& transfer) {
      const auto token = static_cast<std::uint32_t>(transfer.tokens[0]);
      if (token == number) {
        reached_.set_value();
        open_.get_future().wait();
      }
      order.push_back((transfer.kind == Transfer::Kind::kRestore ? "restore " : "store ") + std::to_string(token));
      return absl::OkStatus();
    };
  }
  void AwaitReached() { reached_.get_future().wait(); }
  void Open() { open_.set_value(); }

  std::vector<std::string> order;  // the transfer thread's until all has ended

 private:
  std::promise<void> reached_;
  std::promise<void> open_;
};

TEST_F(TransferEngineTest, BringsBackWhatItStored) {
  Start();
  StoreAndAwait(kBlocks);
  EXPECT_EQ(pool_.num_held(), 0U) << "a record that was dropped holds nothing";
  std::memset(slab_.get(), 0, slab_.size_bytes);
  std::vector<BlockRef> blocks;
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    blocks.push_back(*pool_.Take());
    Restore((i * 7 + 3) % kBlocks, blocks.back().Share());
  }
  for (const Transfer& transfer : Await(kBlocks)) ASSERT_TRUE(transfer.status.ok()) << transfer.status;
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    const auto wanted = static_cast<std::byte>((i * 7 + 3) % kBlocks + 1);
    EXPECT_TRUE(std::all_of(BytesOf(blocks[i]), BytesOf(blocks[i]) + kBlockBytes, [&](std::byte b) {
      return b == wanted;
    })) << i;
  }
  EXPECT_EQ(host_->stats().in_flight, 0);
}

TEST_F(TransferEngineTest, CopiesAdjacentBlocksAtOnce) {
  Hold hold;
  TransferOptions options;
  options.before_copy = hold.At(0);
  options.store_batch_bytes = 8 * kBlockBytes;
  Start(options);
  Store(0, *pool_.Take());
  hold.AwaitReached();
  for (std::uint32_t i = 1; i < 17; ++i) Store(i, *pool_.Take());  // adjacent in both tiers, in batches of 8
  hold.Open();
  Await(17);
  const TransferStats stats = engine_->stats(Transfer::Kind::kStore);
  EXPECT_EQ(stats.blocks, 17);
  const CopyStats& ones = stats.by_copy_size[12];
  EXPECT_EQ(ones.copies, 1);
  const CopyStats& eights = stats.by_copy_size[15];  // 8 x 4 KiB
  EXPECT_EQ(eights.copies, 2);
  EXPECT_EQ(eights.blocks, 16);
  EXPECT_EQ(eights.bytes, static_cast<std::int64_t>(16 * kBlockBytes));
  EXPECT_GT(eights.seconds, 0);
  BatchSizes batches{};
  batches[0] = 1;  // of one block
  batches[3] = 2;  // of five to eight
  EXPECT_EQ(stats.by_batch_blocks, batches);
}

TEST_F(TransferEngineTest, RestoresPassStoresAndABatchOfStoresIsBounded) {
  Start();
  StoreAndAwait(1);
  engine_.reset();
  Hold hold;
  TransferOptions options;
  options.before_copy = hold.At(1);
  options.store_batch_bytes = 2 * kBlockBytes;
  Start(options);
  Store(1, *pool_.Take());
  hold.AwaitReached();
  for (std::uint32_t i = 2; i < 10; ++i) Store(i, *pool_.Take());
  Restore(0, *pool_.Take());
  hold.Open();
  Await(10);
  ASSERT_GE(hold.order.size(), 2U);
  EXPECT_EQ(hold.order[0], "store 1");
  EXPECT_EQ(hold.order[1], "restore 0") << "it waits for the batch under way only";
}

TEST_F(TransferEngineTest, CancelsWhatHasNotBegun) {
  Hold hold;
  TransferOptions options;
  options.before_copy = hold.At(0);
  Start(options);
  const std::uint64_t first = Store(0, *pool_.Take());
  hold.AwaitReached();
  const std::uint64_t second = Store(1, *pool_.Take());
  EXPECT_EQ(pool_.num_held(), 2U);
  EXPECT_FALSE(engine_->Cancel(first)) << "it has begun";
  EXPECT_TRUE(engine_->Cancel(second));
  EXPECT_FALSE(engine_->Cancel(second));
  EXPECT_EQ(pool_.num_held(), 1U);
  hold.Open();
  Await(1);
  EXPECT_EQ(hold.order, std::vector<std::string>{"store 0"});
  EXPECT_FALSE(host_->Contains(KeyOf(1), TokensOf(1)));
  EXPECT_EQ(host_->stats().in_flight, 0);
}

TEST_F(TransferEngineTest, AFailureIsItsOwn) {
  TransferOptions options;
  options.before_copy = [](const Transfer& transfer) {
    return transfer.tokens[0] % 3 == 1 ? absl::InternalError("injected") : absl::OkStatus();
  };
  Start(options);
  for (std::uint32_t i = 0; i < 12; ++i) Store(i, *pool_.Take());
  for (const Transfer& transfer : Await(12)) EXPECT_EQ(transfer.status.ok(), transfer.tokens[0] % 3 != 1);
  EXPECT_EQ(engine_->stats(Transfer::Kind::kStore).failures, 4);
  for (std::uint32_t i = 0; i < 12; ++i) EXPECT_EQ(host_->Contains(KeyOf(i), TokensOf(i)), i % 3 != 1) << i;
  EXPECT_EQ(host_->stats().in_flight, 0);
}

TEST_F(TransferEngineTest, WhatIsPacedOrCappedArrivesWhole) {
  TransferOptions options;
  options.pacing = {.bytes_per_second = 100e6, .latency_seconds = 1e-6};
  options.max_bytes_per_second = 50e6;
  Start(options);
  StoreAndAwait(kBlocks);
  for (std::uint32_t i = 0; i < kBlocks; ++i) Restore(i, *pool_.Take());
  for (const Transfer& transfer : Await(kBlocks)) {
    ASSERT_TRUE(transfer.status.ok());
    EXPECT_EQ(transfer.device_bytes[kBlockBytes - 1], static_cast<std::byte>(transfer.tokens[0] + 1));
  }
  // What the cap and the link allow at most takes this long; less would be too fast.
  EXPECT_GE(engine_->stats(Transfer::Kind::kRestore).seconds, kBlocks * kBlockBytes / 100e6);
}

TEST_F(TransferEngineTest, StoppingDropsWhatHasNotBegun) {
  Hold hold;
  TransferOptions options;
  options.before_copy = hold.At(0);
  Start(options);
  Store(0, *pool_.Take());
  hold.AwaitReached();
  for (std::uint32_t i = 1; i < 9; ++i) Store(i, *pool_.Take());
  std::thread opener([&] { hold.Open(); });
  engine_.reset();
  opener.join();
  EXPECT_EQ(pool_.num_held(), 0U);
  EXPECT_EQ(host_->stats().in_flight, 0);
  host_->CheckInvariants();
}

}  // namespace
}  // namespace spillway
