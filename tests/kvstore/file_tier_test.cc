#include "kvstore/file_tier.h"

#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <latch>
#include <random>
#include <thread>

#include "gmock/gmock.h"
#include "kvstore/file_tier_directory.h"
#include "tests/kvstore/file_tier_fixture.h"

namespace spillway {
namespace {

using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;

class FileTierTest : public FileTierFixture {};

TEST_F(FileTierTest, ServesWhatWasPut) {
  const std::unique_ptr<Tier> tier = Open();
  EXPECT_EQ(tier->name(), "file");
  EXPECT_FALSE(tier->Contains(KeyOf(1), TokensOf(1)));
  EXPECT_TRUE(absl::IsNotFound(Get(*tier, 1)));
  for (std::uint64_t number = 0; number < 100; ++number) EXPECT_TRUE(Put(*tier, number).ok());
  EXPECT_TRUE(Put(*tier, 1).ok()) << "there already";
  for (std::uint64_t number = 0; number < 100; ++number) {
    EXPECT_TRUE(tier->Contains(KeyOf(number), TokensOf(number)));
    EXPECT_TRUE(Get(*tier, number).ok());
  }
  const TierStats stats = tier->stats();
  EXPECT_EQ(stats.hits, 100);
  EXPECT_EQ(stats.misses, 1);
  EXPECT_EQ(stats.read_bytes, 100 * 4096);
  EXPECT_EQ(stats.written_bytes, 100 * 4096);
  EXPECT_GT(stats.read_seconds, 0);
  EXPECT_GT(stats.write_seconds, 0);
  EXPECT_EQ(stats.resident_blocks, 100);
  EXPECT_EQ(stats.resident_bytes, 100 * 4096);
  EXPECT_GE(stats.capacity_bytes, 200 * 4096);
  EXPECT_LE(stats.capacity_bytes, options_.budget_bytes);
  EXPECT_EQ(stats.capacity_blocks, stats.capacity_bytes / 4096);
  EXPECT_GE(stats.bookkeeping_bytes, 100 * 96) << "at least key and tokens";
  EXPECT_EQ(stats.in_flight, 0);
  EXPECT_EQ(stats.declined + stats.evictions + stats.checksum_failures + stats.failures, 0);
}

TEST_F(FileTierTest, BlocksOfAnySize) {
  for (const std::size_t block_bytes : {1U, 100U, 4095U, 4097U, 131'072U, 131'073U, 400'000U}) {
    options_.block_bytes = block_bytes;
    options_.budget_bytes = 4 << 20;
    const std::unique_ptr<Tier> tier = Open();
    for (std::uint64_t number = 0; number < 3; ++number) EXPECT_TRUE(Put(*tier, number).ok());
    for (std::uint64_t number = 0; number < 3; ++number) EXPECT_TRUE(Get(*tier, number).ok()) << block_bytes;
  }
}

TEST_F(FileTierTest, AnEqualKeyWithOtherTokensIsAMiss) {
  const std::unique_ptr<Tier> tier = Open();
  ASSERT_TRUE(Put(*tier, 1).ok());
  BlockTokens other = TokensOf(1);
  other[15] ^= 1;
  EXPECT_FALSE(tier->Contains(KeyOf(1), other));
  std::vector<std::byte> bytes = Bytes(2);
  absl::Status get_status;
  absl::Status put_status;
  std::latch left(2);
  tier->Get(KeyOf(1), other, bytes, [&](absl::Status status) { get_status = status, left.count_down(); });
  const std::vector<std::byte> offered = Bytes(3);
  tier->Put(KeyOf(1), other, offered, [&](absl::Status status) { put_status = status, left.count_down(); });
  left.wait();
  EXPECT_TRUE(absl::IsNotFound(get_status)) << get_status;
  EXPECT_TRUE(absl::IsResourceExhausted(put_status)) << put_status;
  EXPECT_TRUE(Get(*tier, 1).ok()) << "the first stays";
}

TEST_F(FileTierTest, WrongSizesAreTheCallersFault) {
  const std::unique_ptr<Tier> tier = Open();
  std::vector<std::byte> bytes(4095);
  EXPECT_TRUE(absl::IsInvalidArgument(PutAndWait(*tier, 1, bytes)));
  EXPECT_TRUE(absl::IsInvalidArgument(GetAndWait(*tier, 1, bytes)));
}

TEST_F(FileTierTest, StaysUnderItsBudgetByForgettingTheLeastRecentlyUsed) {
  const std::unique_ptr<Tier> tier = Open();
  const std::int64_t capacity = tier->stats().capacity_bytes / 4096;
  const std::int64_t total = 3 * capacity;
  for (std::int64_t number = 0; number < total; ++number) {
    ASSERT_TRUE(Put(*tier, static_cast<std::uint64_t>(number)).ok());
    ASSERT_TRUE(Get(*tier, 0).ok()) << "used all the time";
    ASSERT_LE(DiskUsage(), options_.budget_bytes);
  }
  const TierStats stats = tier->stats();
  EXPECT_EQ(stats.resident_blocks, capacity);
  EXPECT_EQ(stats.evictions, total - capacity);
  EXPECT_GE(stats.resident_bytes, options_.budget_bytes * 9 / 10) << "most of the budget holds blocks";
  for (std::int64_t number = 1; number < total; ++number) {
    EXPECT_EQ(Get(*tier, static_cast<std::uint64_t>(number)).ok(), number > total - capacity) << number;
  }
}

TEST_F(FileTierTest, IsReusedAfterARestart) {
  for (int round = 0; round < 3; ++round) {
    const std::unique_ptr<Tier> tier = Open();
    EXPECT_EQ(tier->stats().resident_blocks, round * 70);
    const auto before = static_cast<std::uint64_t>(round) * 70;
    for (std::uint64_t number = 0; number < before; ++number) EXPECT_TRUE(Get(*tier, number).ok());
    for (std::uint64_t number = before; number < before + 70; ++number) EXPECT_TRUE(Put(*tier, number).ok());
  }
  EXPECT_THAT(Names(), UnorderedElementsAre("lock", BlockFileName(MakeSpaceDigest("a model", 4096))));
}

TEST_F(FileTierTest, AfterARestartTheLeastRecentlyWrittenGivesWayFirst) {
  std::int64_t capacity = 0;
  {
    const std::unique_ptr<Tier> tier = Open();
    capacity = tier->stats().capacity_bytes / 4096;
    // Written into recycled slots, so that the order of slots is not that of writing.
    for (std::int64_t number = 0; number < capacity + capacity / 2; ++number) {
      ASSERT_TRUE(Put(*tier, static_cast<std::uint64_t>(number)).ok());
    }
  }
  const std::unique_ptr<Tier> tier = Open();
  ASSERT_EQ(tier->stats().resident_blocks, capacity);
  for (std::int64_t number = 0; number < 10; ++number)
    ASSERT_TRUE(Put(*tier, static_cast<std::uint64_t>(10'000 + number)).ok());
  for (std::int64_t number = capacity / 2; number < capacity + capacity / 2; ++number) {
    EXPECT_EQ(Get(*tier, static_cast<std::uint64_t>(number)).ok(), number >= capacity / 2 + 10) << number;
  }
}

TEST_F(FileTierTest, ASmallerBudgetAfterARestartIsKept) {
  {
    const std::unique_ptr<Tier> tier = Open();
    for (std::uint64_t number = 0; number < 200; ++number) ASSERT_TRUE(Put(*tier, number).ok());
  }
  options_.budget_bytes = 512 << 10;
  const std::unique_ptr<Tier> tier = Open();
  EXPECT_LE(DiskUsage(), options_.budget_bytes);
  EXPECT_EQ(tier->stats().resident_bytes, tier->stats().capacity_bytes);
  for (std::uint64_t number = 0; number < 200; ++number) {
    const absl::Status status = Get(*tier, number);
    EXPECT_TRUE(status.ok() || absl::IsNotFound(status)) << status;
  }
}

TEST_F(FileTierTest, AnotherSpaceIsNotServedAndGivesWay) {
  {
    const std::unique_ptr<Tier> tier = Open();
    for (std::uint64_t number = 0; number < 100; ++number) ASSERT_TRUE(Put(*tier, number).ok());
  }
  options_.space = "another model";
  {
    const std::unique_ptr<Tier> tier = Open();
    EXPECT_EQ(tier->stats().resident_blocks, 0);
    for (std::uint64_t number = 0; number < 100; ++number) {
      EXPECT_TRUE(absl::IsNotFound(Get(*tier, number)));
      EXPECT_TRUE(Put(*tier, number).ok());
      ASSERT_LE(DiskUsage(), options_.budget_bytes);
    }
  }
  options_.space = "a model";
  {
    const std::unique_ptr<Tier> tier = Open();
    EXPECT_EQ(tier->stats().resident_blocks, 100) << "both fit so far";
    for (std::uint64_t number = 0; number < 100; ++number) EXPECT_TRUE(Get(*tier, number).ok());
    for (std::uint64_t number = 100; number < 300; ++number) {
      EXPECT_TRUE(Put(*tier, number).ok());
      ASSERT_LE(DiskUsage(), options_.budget_bytes);
    }
    EXPECT_EQ(tier->stats().resident_bytes, tier->stats().capacity_bytes) << "the other space gave way";
  }
  options_.block_bytes = 2048;
  EXPECT_EQ(Open()->stats().resident_blocks, 0) << "blocks of another size are another space";
}

TEST_F(FileTierTest, FilesThatAreNotOursAreCountedAndLeftAlone) {
  { Open(); }
  WriteWhole(options_.directory + "/notes", std::string(300 << 10, 'x'));
  const std::unique_ptr<Tier> tier = Open();
  for (std::uint64_t number = 0; number < 300; ++number) {
    ASSERT_TRUE(Put(*tier, number).ok());
    ASSERT_LE(DiskUsage(), options_.budget_bytes);
  }
  tier->Clear();
  EXPECT_EQ(ReadWhole(options_.directory + "/notes").size(), 300U << 10U);
}

TEST_F(FileTierTest, MakesItsDirectoryAndFilesPrivate) {
  const mode_t before = ::umask(0);
  const std::unique_ptr<Tier> tier = Open();
  ::umask(before);
  ASSERT_TRUE(Put(*tier, 1).ok());
  struct stat stat {};
  ASSERT_EQ(::stat(options_.directory.c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 07777U, 0700U);
  for (const std::string& name : Names()) {
    ASSERT_EQ(::stat((options_.directory + "/" + name).c_str(), &stat), 0);
    EXPECT_EQ(stat.st_mode & 07777U, 0600U) << name;
  }
}

TEST_F(FileTierTest, WhatOthersCouldReadOrPlantIsRefused) {
  { Open(); }
  const std::string file = BlockFilePath();
  const auto refused = [this](const std::string& why) {
    const absl::Status status = TryOpen();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(why));
  };
  for (const mode_t mode : {0755, 0770, 0701, 0500}) {
    ASSERT_EQ(::chmod(options_.directory.c_str(), mode), 0);
    refused("chmod 0700");
  }
  ASSERT_EQ(::chmod(options_.directory.c_str(), 0700), 0);
  for (const std::string& path : {file, options_.directory + "/lock"}) {
    ASSERT_EQ(::chmod(path.c_str(), 0640), 0);
    refused("0640");
    ASSERT_EQ(::chmod(path.c_str(), 0600), 0);
    ASSERT_EQ(::link(path.c_str(), (root_ + "/second").c_str()), 0);
    refused("hard link");
    std::filesystem::remove(root_ + "/second");
    if (::geteuid() == 0) {
      ASSERT_EQ(::chown(path.c_str(), 12345, 12345), 0);
      refused("another user");
      ASSERT_EQ(::chown(path.c_str(), 0, 0), 0);
    }
    std::filesystem::rename(path, root_ + "/moved");
    std::filesystem::create_symlink(root_ + "/moved", path);
    refused(path == file ? "not a regular file" : "symbolic link");
    std::filesystem::remove(path);
    std::filesystem::create_directory(path);
    EXPECT_TRUE(absl::IsFailedPrecondition(TryOpen()));
    std::filesystem::remove(path);
    ASSERT_EQ(::mkfifo(path.c_str(), 0600), 0);
    refused("not a regular file");
    std::filesystem::remove(path);
    std::filesystem::rename(root_ + "/moved", path);
  }
  if (::geteuid() == 0) {
    ASSERT_EQ(::chown(options_.directory.c_str(), 12345, 12345), 0);
    refused("another user");
    ASSERT_EQ(::chown(options_.directory.c_str(), 0, 0), 0);
  }
  EXPECT_TRUE(TryOpen().ok()) << "all is as it was";

  std::filesystem::create_directory_symlink(options_.directory, root_ + "/alias");
  for (const char* name : {"/alias", "/alias/", "/alias//"}) {
    options_.directory = root_ + name;
    refused("symbolic link");
  }
  WriteWhole(root_ + "/plain", "");
  options_.directory = root_ + "/plain";
  refused("not a directory");
  options_.directory = root_ + "/absent/deeper";
  refused("make directory");
}

TEST_F(FileTierTest, HasOneOwnerAtATime) {
  std::unique_ptr<Tier> tier = Open();
  const absl::Status status = TryOpen();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("another process"));
  tier.reset();
  EXPECT_TRUE(TryOpen().ok());
}

TEST_F(FileTierTest, BadOptionsAreNamed) {
  const FileTierOptions good = options_;
  const auto refused = [this](const std::string& name) {
    const absl::Status status = TryOpen();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(name));
  };
  options_.directory = "", refused("directory"), options_ = good;
  options_.space = "", refused("space"), options_ = good;
  options_.block_bytes = 0, refused("block_bytes"), options_ = good;
  options_.block_bytes = ~std::size_t{0}, refused("block_bytes"), options_ = good;
  options_.budget_bytes = 0, refused("budget_bytes"), options_ = good;
  options_.budget_bytes = -1, refused("budget_bytes"), options_ = good;
  options_.budget_bytes = 1 << 15, refused("budget_bytes"), options_ = good;
  options_.num_threads = 0, refused("num_threads"), options_ = good;
  options_.max_pending_bytes = 4095, refused("max_pending_bytes"), options_ = good;
  options_.budget_bytes = std::int64_t{1} << 58;
  const absl::Status status = TryOpen();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
}

TEST_F(FileTierTest, ClearForgetsEverythingForGood) {
  options_.space = "another model";
  { EXPECT_TRUE(Put(*Open(), 7).ok()); }
  options_.space = "a model";
  {
    const std::unique_ptr<Tier> tier = Open();
    for (std::uint64_t number = 0; number < 50; ++number) ASSERT_TRUE(Put(*tier, number).ok());
    tier->Clear();
    EXPECT_EQ(tier->stats().resident_blocks, 0);
    for (std::uint64_t number = 0; number < 50; ++number) {
      EXPECT_FALSE(tier->Contains(KeyOf(number), TokensOf(number)));
      EXPECT_TRUE(absl::IsNotFound(Get(*tier, number)));
    }
    EXPECT_LE(DiskUsage(), 64 << 10);
    ASSERT_TRUE(Put(*tier, 99).ok());
    EXPECT_TRUE(Get(*tier, 99).ok()) << "it goes on";
  }
  const std::unique_ptr<Tier> tier = Open();
  EXPECT_EQ(tier->stats().resident_blocks, 1);
  EXPECT_EQ(Names().size(), 2U) << "the other space's file is gone too";
}

// A full disk, as far as a process can make one for itself: no file may grow beyond half of the budget.
TEST_F(FileTierTest, AFullDiskDeclines) {
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const std::unique_ptr<Tier> tier = Open();
  const rlimit half{.rlim_cur = 300'000, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &half), 0);
  int stored = 0;
  int declined = 0;
  for (std::uint64_t number = 0; number < 200; ++number) {
    const absl::Status status = Put(*tier, number);
    EXPECT_TRUE(status.ok() || absl::IsResourceExhausted(status)) << status;
    ++(status.ok() ? stored : declined);
  }
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_GT(stored, 50);
  EXPECT_GT(declined, 50);
  EXPECT_EQ(tier->stats().declined, declined);
  EXPECT_EQ(tier->stats().resident_blocks, stored);
  for (std::uint64_t number = 0; number < 200; ++number) {
    EXPECT_EQ(Get(*tier, number).ok(), tier->Contains(KeyOf(number), TokensOf(number)));
  }
  EXPECT_TRUE(Put(*tier, 1000).ok()) << "there is room again";
}

TEST_F(FileTierTest, PendingWritesAreBoundedAndDuplicatesShareOne) {
  options_.num_threads = 1;
  options_.max_pending_bytes = 4 * 4096;
  const std::unique_ptr<Tier> tier = Open();
  // The tier's only thread is held in a callback, so that everything after waits.
  std::latch held(1);
  std::latch release(1);
  const std::vector<std::byte> first = Bytes(0);
  tier->Put(KeyOf(0), TokensOf(0), first, [&](const absl::Status&) {
    held.count_down();
    release.wait();
  });
  held.wait();
  std::vector<std::vector<std::byte>> bytes;
  for (std::uint64_t number = 1; number <= 6; ++number) bytes.push_back(Bytes(number));
  std::latch left(13);
  std::atomic<int> stored{0};
  std::atomic<int> declined{0};
  std::vector<int> order;
  for (std::uint64_t number = 1; number <= 6; ++number) {
    for (int copy = 0; copy < 2; ++copy) {
      tier->Put(KeyOf(number), TokensOf(number), bytes[number - 1], [&, number](const absl::Status& status) {
        ++(status.ok() ? stored : declined);
        if (status.ok()) order.push_back(static_cast<int>(number));
        left.count_down();
      });
    }
  }
  std::vector<std::byte> into(4096);
  tier->Get(KeyOf(0), TokensOf(0), into, [&](const absl::Status& status) {
    EXPECT_TRUE(status.ok());
    order.push_back(0);
    left.count_down();
  });
  EXPECT_EQ(tier->stats().in_flight, 9);
  release.count_down();
  left.wait();
  EXPECT_EQ(stored, 8);
  EXPECT_EQ(declined, 4);
  EXPECT_EQ(tier->stats().declined, 4);
  EXPECT_EQ(tier->stats().written_bytes, 5 * 4096) << "each once";
  EXPECT_THAT(order, ::testing::ElementsAre(0, 1, 1, 2, 2, 3, 3, 4, 4)) << "the read came last and was served first";
}

TEST_F(FileTierTest, ClearDeclinesWhatWaits) {
  options_.num_threads = 1;
  const std::unique_ptr<Tier> tier = Open();
  std::latch held(1);
  std::latch release(1);
  std::vector<std::byte> into(4096);
  tier->Get(KeyOf(0), TokensOf(0), into, [&](const absl::Status&) {
    held.count_down();
    release.wait();
  });
  held.wait();
  const std::vector<std::byte> bytes = Bytes(1);
  std::latch done(1);
  absl::Status result;
  tier->Put(KeyOf(1), TokensOf(1), bytes, [&](absl::Status status) {
    result = std::move(status);
    done.count_down();
  });
  tier->Clear();
  release.count_down();
  done.wait();
  EXPECT_TRUE(absl::IsResourceExhausted(result)) << result;
  EXPECT_FALSE(tier->Contains(KeyOf(1), TokensOf(1)));
  EXPECT_EQ(tier->stats().in_flight, 0);
}

TEST_F(FileTierTest, TheDestructorWaitsForWhatIsInFlight) {
  constexpr std::uint64_t kBlocks = 100;
  std::vector<std::vector<std::byte>> bytes;
  for (std::uint64_t number = 0; number < kBlocks; ++number) bytes.push_back(Bytes(number));
  std::vector<std::vector<std::byte>> into(kBlocks, std::vector<std::byte>(4096));
  std::atomic<std::uint64_t> calls{0};
  const int descriptors = OpenDescriptors();
  {
    const std::unique_ptr<Tier> tier = Open();
    for (std::uint64_t number = 0; number < kBlocks; ++number) {
      tier->Put(KeyOf(number), TokensOf(number), bytes[number], [&](const absl::Status&) { ++calls; });
      tier->Get(KeyOf(number), TokensOf(number), into[number], [&](const absl::Status&) { ++calls; });
    }
  }
  EXPECT_EQ(calls, 2 * kBlocks);
  EXPECT_EQ(OpenDescriptors(), descriptors);
  EXPECT_EQ(Open()->stats().resident_blocks, static_cast<std::int64_t>(kBlocks));
}

TEST_F(FileTierTest, ServesManyThreads) {
  options_.budget_bytes = 512 << 10;
  options_.num_threads = 4;
  options_.max_pending_bytes = 8 * 4096;
  constexpr int kCallers = 4;
  constexpr int kCallsEach = 3'000;
  constexpr std::uint64_t kNumbers = 300;
  std::vector<std::vector<std::byte>> bytes;
  for (std::uint64_t number = 0; number < kNumbers; ++number) bytes.push_back(Bytes(number));
  std::atomic<int> answers{0};
  std::atomic<int> wrong{0};
  std::atomic<int> hits{0};
  const std::unique_ptr<Tier> tier = Open();  // gone before what its callbacks use
  {
    std::vector<std::thread> callers;
    for (int caller = 0; caller < kCallers; ++caller) {
      callers.emplace_back([&, caller] {
        std::mt19937_64 random(static_cast<std::uint64_t>(caller));
        std::vector<std::byte> into(4096);
        for (int call = 0; call < kCallsEach; ++call) {
          const std::uint64_t number = random() % kNumbers;
          if (caller == 0 && call % 500 == 499) tier->Clear();
          if (random() % 2 == 0) {
            tier->Put(KeyOf(number), TokensOf(number), bytes[number], [&](const absl::Status&) { ++answers; });
          } else {
            const absl::Status status = GetAndWait(*tier, number, into);
            ++answers;
            if (status.ok()) ++hits;
            if (status.ok() ? into != bytes[number] : !absl::IsNotFound(status)) ++wrong;
          }
          if (call % 64 == 0) tier->stats();
          tier->Contains(KeyOf(number), TokensOf(number));
        }
      });
    }
    for (std::thread& caller : callers) caller.join();
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(hits, 0);
  EXPECT_LE(DiskUsage(), options_.budget_bytes);
  const TierStats stats = tier->stats();
  EXPECT_EQ(stats.checksum_failures, 0);
  EXPECT_EQ(stats.failures, 0);
  EXPECT_GT(stats.evictions, 0);
  EXPECT_EQ(stats.hits, hits);
}

}  // namespace
}  // namespace spillway
