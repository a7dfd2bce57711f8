#include "kvstore/file_tier_index.h"

#include <map>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"
#include "tests/kvstore/file_tier_fixture.h"

namespace spillway {
namespace {

void AddBlock(FileTierIndex& index, std::uint64_t number) {
  index.Add(KeyOf(number), TokensOf(number), number, index.TakeNew());
}

TEST(FileTierIndex, FindsByKeyAndTokens) {
  FileTierIndex index;
  AddBlock(index, 1);
  EXPECT_TRUE(index.Contains(KeyOf(1), TokensOf(1)));
  EXPECT_FALSE(index.Contains(KeyOf(1), TokensOf(2)));
  EXPECT_FALSE(index.FindAndPin(KeyOf(1), TokensOf(2)).has_value());
  EXPECT_TRUE(index.ContainsKey(KeyOf(1)));
  EXPECT_FALSE(index.ContainsKey(KeyOf(2)));
  index.CheckInvariants();
}

TEST(FileTierIndex, TheLeastRecentlyUsedThatNobodyReadsGivesWay) {
  FileTierIndex index;
  for (std::uint64_t number = 0; number < 3; ++number) AddBlock(index, number);
  const FileTierIndex::Pin used = *index.FindAndPin(KeyOf(0), TokensOf(0));
  index.Unpin(used, FileTierIndex::Verdict::kKeep);
  EXPECT_EQ(index.TakeOldest(), 1U);
  const FileTierIndex::Pin read = *index.FindAndPin(KeyOf(2), TokensOf(2));
  EXPECT_EQ(index.TakeOldest(), 0U);
  EXPECT_EQ(index.TakeOldest(), std::nullopt) << "the last one is being read";
  index.Unpin(read, FileTierIndex::Verdict::kKeep);
  EXPECT_EQ(index.TakeOldest(), 2U);
  index.CheckInvariants();
}

TEST(FileTierIndex, AForgottenSlotIsFreeAfterItsLastReader) {
  FileTierIndex index;
  AddBlock(index, 5);
  const FileTierIndex::Pin first = *index.FindAndPin(KeyOf(5), TokensOf(5));
  const FileTierIndex::Pin second = *index.FindAndPin(KeyOf(5), TokensOf(5));
  index.Unpin(first, FileTierIndex::Verdict::kForget);
  EXPECT_FALSE(index.ContainsKey(KeyOf(5)));
  EXPECT_EQ(index.TakeFree(), std::nullopt);
  index.CheckInvariants();
  AddBlock(index, 5);  // the key is free for a new copy meanwhile
  index.Unpin(second, FileTierIndex::Verdict::kForget);
  EXPECT_TRUE(index.ContainsKey(KeyOf(5))) << "the second verdict was on the old copy";
  EXPECT_EQ(index.TakeFree(), 0U);
  index.GiveBack(0);
  index.CheckInvariants();
}

TEST(FileTierIndex, TakesAHundredthOfSmallBlocks) {
  constexpr std::size_t kBlocks = 1000;
  FileTierIndex index;
  for (std::uint64_t number = 0; number < kBlocks; ++number) AddBlock(index, number);
  EXPECT_GE(index.memory_bytes(), kBlocks * 96) << "at least key and tokens";
  EXPECT_LE(index.memory_bytes(), kBlocks * (16U << 10U) / 100);
}

TEST(FileTierIndex, HoldsItsInvariantsOverRandomOperations) {
  std::mt19937_64 random(7);
  FileTierIndex index;
  std::vector<FileTierIndex::Pin> pins;
  std::vector<std::uint32_t> taken;
  for (int step = 0; step < 20'000; ++step) {
    const std::uint64_t number = random() % 40;
    const std::uint64_t kind = random() % 8;
    if (kind < 3) {
      if (const auto pin = index.FindAndPin(KeyOf(number), TokensOf(number))) {
        EXPECT_EQ((*pin)->payload_checksum, number);
        pins.push_back(*pin);
      }
    } else if (kind < 5 && !pins.empty()) {
      std::swap(pins[random() % pins.size()], pins.back());
      index.Unpin(pins.back(), random() % 3 == 0 ? FileTierIndex::Verdict::kForget : FileTierIndex::Verdict::kKeep);
      pins.pop_back();
    } else if (kind == 5) {
      std::optional<std::uint32_t> slot = index.TakeFree();
      if (!slot) slot = index.num_slots() < 16 ? index.TakeNew() : index.TakeOldest();
      if (slot) taken.push_back(*slot);
    } else if (!taken.empty()) {
      if (kind == 6 && !index.ContainsKey(KeyOf(number))) {
        index.Add(KeyOf(number), TokensOf(number), number, taken.back());
      } else {
        index.GiveBack(taken.back());
      }
      taken.pop_back();
    }
    index.CheckInvariants();
  }
}

}  // namespace
}  // namespace spillway
