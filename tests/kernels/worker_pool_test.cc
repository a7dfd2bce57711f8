#include "kernels/cpu/worker_pool.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace spillway::cpu {
namespace {

class WorkerPoolTest : public testing::TestWithParam<int> {};

TEST_P(WorkerPoolTest, RunsEveryItemOnceAndShowsItsWrites) {
  WorkerPool pool(GetParam());
  Scratch scratch;
  EXPECT_EQ(pool.num_workers(), GetParam());
  for (int round = 0; round < 300; ++round) {
    const std::int64_t num_items = round % 40;
    std::vector<int> runs(static_cast<std::size_t>(num_items));  // not atomic: the pool orders them
    pool.ParallelFor(num_items, scratch,
                     [&runs](std::int64_t item, Scratch&) { ++runs[static_cast<std::size_t>(item)]; });
    for (const int count : runs) ASSERT_EQ(count, 1);
  }
}

// With one worker there is nobody to take items from its end.
TEST_P(WorkerPoolTest, SharesAreNeighbouringItemsInAscendingOrder) {
  WorkerPool pool(GetParam());
  Scratch scratch;
  for (const std::int64_t num_items : {1, 2, 7, 64}) {
    std::int64_t num_shares = 0;
    for (std::int64_t item = 0; item < num_items; ++item) num_shares += pool.BeginsShare(item, num_items) ? 1 : 0;
    EXPECT_EQ(num_shares, std::min<std::int64_t>(num_items, GetParam())) << num_items;
    EXPECT_TRUE(pool.BeginsShare(0, num_items));
  }
  WorkerPool alone(1);
  std::vector<std::int64_t> items;
  items.reserve(20);
  alone.ParallelFor(20, scratch, [&items](std::int64_t item, Scratch&) { items.push_back(item); });
  for (std::size_t i = 0; i < items.size(); ++i) EXPECT_EQ(items[i], static_cast<std::int64_t>(i));
  EXPECT_EQ(items.size(), 20U);
}

TEST_P(WorkerPoolTest, RangesHoldEveryItemOnce) {
  WorkerPool pool(GetParam());
  Scratch scratch;
  for (const std::int64_t num_items : {0, 1, 5, 64, 1000}) {
    std::vector<int> runs(static_cast<std::size_t>(num_items));  // not atomic: the pool orders them
    std::atomic<std::int64_t> largest = 0;
    pool.ParallelForRanges(num_items, 8, scratch, [&](std::int64_t begin, std::int64_t end, Scratch&) {
      std::int64_t seen = largest;
      while (end - begin > seen && !largest.compare_exchange_weak(seen, end - begin)) {
      }
      for (std::int64_t item = begin; item < end; ++item) ++runs[static_cast<std::size_t>(item)];
    });
    for (const int count : runs) ASSERT_EQ(count, 1);
    if (GetParam() > 1 && num_items == 1000) {
      EXPECT_EQ(largest, 8);
    }
  }
}

// Of memory that may not be read at all: it is fetched at most.
TEST_P(WorkerPoolTest, UpcomingReadsAreNotTouched) {
  constexpr std::int64_t kItemBytes = 4096;
  constexpr std::int64_t kNumItems = 200;
  constexpr std::size_t kBytes = kItemBytes * kNumItems;
  void* const memory = mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  {
    WorkerPool pool(GetParam());
    Scratch scratch;
    for (int round = 0; round < 100; ++round) {
      std::vector<int> runs(20);
      const UpcomingReads upcoming = {static_cast<const std::byte*>(memory), kItemBytes, round % 2 * kNumItems};
      pool.ParallelFor(
          20, scratch, [&runs](std::int64_t item, Scratch&) { ++runs[static_cast<std::size_t>(item)]; }, upcoming);
      for (const int count : runs) ASSERT_EQ(count, 1);
    }
  }
  EXPECT_EQ(munmap(memory, kBytes), 0);
}

TEST_P(WorkerPoolTest, ScratchBelongsToOneThreadAtATime) {
  WorkerPool pool(GetParam());
  Scratch scratch;
  std::atomic<int> num_torn = 0;
  pool.ParallelFor(200, scratch, [&num_torn](std::int64_t item, Scratch& mine) {
    const std::size_t size = 64 + static_cast<std::size_t>(item) * 100;
    std::byte* const bytes = mine.Get(size);
    std::memset(bytes, static_cast<int>(item), size);
    for (std::size_t i = 0; i < size; ++i) num_torn += bytes[i] != static_cast<std::byte>(item);
  });
  EXPECT_EQ(num_torn, 0);
}

TEST_P(WorkerPoolTest, CallersOnSeveralThreadsDoNotDisturbEachOther) {
  WorkerPool pool(GetParam());
  std::vector<std::thread> callers;
  callers.reserve(3);
  std::atomic<std::int64_t> total = 0;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&pool, &total] {
      Scratch scratch;
      for (int round = 0; round < 200; ++round) {
        pool.ParallelFor(10, scratch, [&total](std::int64_t item, Scratch&) { total += item; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(total, 3 * 200 * 45);
}

INSTANTIATE_TEST_SUITE_P(Workers, WorkerPoolTest, testing::Values(1, 2, 3, 8));

}  // namespace
}  // namespace spillway::cpu
