// Files of a tier whose bytes are no longer what it wrote: whatever they are, nothing wrong is served.

#include <algorithm>
#include <functional>
#include <random>

#include "kvstore/file_tier_format.h"
#include "tests/kvstore/file_tier_fixture.h"

namespace spillway {
namespace {

class FileTierForeignBytesTest : public FileTierFixture {
 protected:
  // The block file after `count` blocks were put into slots 0, 1 and so on.
  std::string Written(std::uint64_t count) {
    {
      const std::unique_ptr<Tier> tier = Open();
      for (std::uint64_t number = 0; number < count; ++number) EXPECT_TRUE(Put(*tier, number).ok());
    }
    std::string content = ReadWhole(BlockFilePath());
    content.resize(
        static_cast<std::size_t>(BlockFileLayout(options_.block_bytes).SizeOf(static_cast<std::uint32_t>(count))));
    return content;
  }
  // How many of the first `count` blocks are served from this content, each with the right bytes; bad ones are gone
  // after.
  std::uint64_t Served(const std::string& content, std::uint64_t count) {
    WriteWhole(BlockFilePath(), content);
    const std::unique_ptr<Tier> tier = Open();
    if (tier == nullptr) return 0;
    std::uint64_t served = 0;
    for (std::uint64_t number = 0; number < count; ++number) {
      const absl::Status status = Get(*tier, number);
      EXPECT_TRUE(status.ok() || absl::IsNotFound(status) || absl::IsDataLoss(status)) << status;
      EXPECT_EQ(tier->Contains(KeyOf(number), TokensOf(number)), status.ok());
      if (status.ok()) ++served;
    }
    const TierStats stats = tier->stats();
    EXPECT_EQ(stats.hits, static_cast<std::int64_t>(served));
    EXPECT_EQ(stats.misses, static_cast<std::int64_t>(count - served));
    EXPECT_EQ(stats.failures, 0);
    EXPECT_LE(DiskUsage(), options_.budget_bytes);
    return served;
  }
};

TEST_F(FileTierForeignBytesTest, AnyOneWrongByteCostsAtMostItsBlock) {
  options_.block_bytes = 200;
  const std::string good = Written(2);
  ASSERT_EQ(Served(good, 2), 2U);
  const BlockFileLayout layout(options_.block_bytes);
  std::vector<std::size_t> positions;
  for (std::uint32_t slot = 0; slot < 2; ++slot) {
    for (std::size_t i = 0; i < kRecordBytes; ++i)
      positions.push_back(static_cast<std::size_t>(layout.RecordOffset(slot)) + i);
    for (std::size_t i = 0; i < 200; ++i) positions.push_back(static_cast<std::size_t>(layout.PayloadOffset(slot)) + i);
  }
  for (const std::size_t position : positions) {
    std::string bad = good;
    bad[position] = static_cast<char>(bad[position] ^ (1 << (position % 8)));
    EXPECT_EQ(Served(bad, 2), 1U) << position;
  }
  for (std::size_t position = 0; position < good.size(); position += 97) {  // padding too, which nobody reads
    std::string bad = good;
    bad[position] = static_cast<char>(~bad[position]);
    EXPECT_GE(Served(bad, 2), 1U) << position;
  }
}

TEST_F(FileTierForeignBytesTest, ABadBlockIsCountedForgottenAndWrittenAgain) {
  std::string content = Written(3);
  content[static_cast<std::size_t>(BlockFileLayout(4096).PayloadOffset(1)) + 4095] ^= 1;
  WriteWhole(BlockFilePath(), content);
  {
    const std::unique_ptr<Tier> tier = Open();
    EXPECT_EQ(tier->stats().resident_blocks, 3) << "payloads are not read at the start";
    EXPECT_TRUE(absl::IsDataLoss(Get(*tier, 1)));
    EXPECT_TRUE(absl::IsNotFound(Get(*tier, 1)));
    EXPECT_EQ(tier->stats().checksum_failures, 1);
    EXPECT_EQ(tier->stats().misses, 2);
    EXPECT_EQ(tier->stats().resident_blocks, 2);
  }
  const std::unique_ptr<Tier> tier = Open();
  EXPECT_EQ(tier->stats().resident_blocks, 2) << "forgotten on disk too";
  EXPECT_TRUE(Put(*tier, 1).ok());
  for (std::uint64_t number = 0; number < 3; ++number) EXPECT_TRUE(Get(*tier, number).ok());
}

TEST_F(FileTierForeignBytesTest, AFileThatChangesUnderneathIsNoticed) {
  const std::unique_ptr<Tier> tier = Open();
  for (std::uint64_t number = 0; number < 4; ++number) ASSERT_TRUE(Put(*tier, number).ok());
  const BlockFileLayout layout(4096);
  std::filesystem::resize_file(BlockFilePath(), static_cast<std::uintmax_t>(layout.PayloadOffset(3)) + 100);
  EXPECT_TRUE(absl::IsDataLoss(Get(*tier, 3)));
  std::filesystem::resize_file(BlockFilePath(), 0);
  EXPECT_TRUE(absl::IsDataLoss(Get(*tier, 0)));
  EXPECT_EQ(tier->stats().checksum_failures, 2);
}

TEST_F(FileTierForeignBytesTest, TruncatedFilesServeWhatIsWhole) {
  const std::string good = Written(6);
  const BlockFileLayout layout(4096);
  for (std::size_t size = 0; size < good.size(); size += 331) {
    const std::uint64_t served = Served(good.substr(0, size), 6);
    EXPECT_EQ(served, size < static_cast<std::size_t>(layout.PayloadOffset(0))
                          ? 0U
                          : (size - static_cast<std::size_t>(layout.PayloadOffset(0))) / 4096);
  }
}

TEST_F(FileTierForeignBytesTest, AnEndlessFileIsCutToTheBudget) {
  const std::string good = Written(4);
  WriteWhole(BlockFilePath(), good);
  std::filesystem::resize_file(BlockFilePath(), std::uintmax_t{1} << 42U);
  const std::unique_ptr<Tier> tier = Open();
  for (std::uint64_t number = 0; number < 4; ++number) EXPECT_TRUE(Get(*tier, number).ok());
  EXPECT_EQ(std::filesystem::file_size(BlockFilePath()), good.size());
}

// Records that are sound by their checksum and still say what is not so.
TEST_F(FileTierForeignBytesTest, ForgedRecordsAreNotBelieved) {
  const std::string good = Written(3);
  const BlockFileLayout layout(4096);
  const auto record_at = [&](std::uint32_t slot) {
    return *DecodeRecord(std::span<const std::byte, kRecordBytes>(
        reinterpret_cast<const std::byte*>(good.data()) + layout.RecordOffset(slot), kRecordBytes));
  };
  const auto with_record = [&](std::uint32_t slot, const BlockRecord& record) {
    std::string content = good;
    EncodeRecord(record, std::span<std::byte, kRecordBytes>(
                             reinterpret_cast<std::byte*>(content.data()) + layout.RecordOffset(slot), kRecordBytes));
    return content;
  };
  const std::vector<std::function<void(BlockRecord&)>> forgeries = {
      [](BlockRecord& record) { record.key = KeyOf(77); },
      [](BlockRecord& record) { record.key = KeyOf(0); },
      [](BlockRecord& record) { record.key = KeyOf(0), record.tokens = TokensOf(0); },
      [](BlockRecord& record) { record.tokens[3] ^= 1; },
      [](BlockRecord& record) { record.space[31] ^= 1; },
      [](BlockRecord& record) { record.length = 0; },
      [](BlockRecord& record) { record.length = 4095; },
      [](BlockRecord& record) { record.length = ~std::uint64_t{0}; },
      [](BlockRecord& record) { record.length += std::uint64_t{1} << 32U; },
      [](BlockRecord& record) { record.payload_checksum ^= 1; },
  };
  for (std::size_t i = 0; i < forgeries.size(); ++i) {
    BlockRecord record = record_at(1);
    forgeries[i](record);
    // Those that claim to be a newer copy of block 0 cost that one too.
    EXPECT_EQ(Served(with_record(1, record), 3), record.key == KeyOf(0) ? 1U : 2U) << i;
  }
  BlockRecord moved = record_at(2);
  moved.stamp = ~std::uint64_t{0};  // above another block's payload
  EXPECT_EQ(Served(with_record(1, moved), 3), 1U);
  EXPECT_EQ(Served(with_record(63, record_at(0)), 3), 3U) << "its payload is not in the file";
}

TEST_F(FileTierForeignBytesTest, ThousandsOfMutationsServeNothingWrong) {
  constexpr std::uint64_t kBlocks = 6;
  options_.block_bytes = 600;
  const std::string good = Written(kBlocks);
  std::mt19937_64 random(20'260'101);
  std::uint64_t served = 0;
  for (int round = 0; round < 3'000; ++round) {
    std::string content = good;
    const std::uint64_t mutations = 1 + random() % 4;
    for (std::uint64_t i = 0; i < mutations && !content.empty(); ++i) {
      // Mostly where there is something: the records in use and the payloads.
      const std::size_t at = random() % 2 == 0
                                 ? random() % std::min<std::size_t>(content.size(), kBlocks * kRecordBytes)
                                 : random() % content.size();
      const std::size_t length =
          std::min<std::size_t>(1 + random() % (random() % 2 == 0 ? 16 : 5000), content.size() - at);
      switch (random() % 7) {
        case 0:
          content[at] = static_cast<char>(content[at] ^ (1 << random() % 8));
          break;
        case 1:
          for (std::size_t j = 0; j < length; ++j) content[at + j] = static_cast<char>(random());
          break;
        case 2:
          std::fill_n(content.begin() + static_cast<std::ptrdiff_t>(at), length, random() % 2 == 0 ? '\0' : '\xff');
          break;
        case 3:
          content.resize(at);
          break;
        case 4:
          content.replace(at, length, good, random() % good.size(), length);
          break;
        case 5:
          content.erase(at, length);
          break;
        default: {  // a whole record over another
          const std::size_t from = random() % kBlocks * kRecordBytes;
          const std::size_t to = random() % kExtentSlots * kRecordBytes;
          if (to + kRecordBytes <= content.size()) content.replace(to, kRecordBytes, good, from, kRecordBytes);
        }
      }
    }
    served += Served(content, kBlocks);
    if (HasFailure()) FAIL() << "round " << round;
  }
  EXPECT_GT(served, 3'000U) << "most mutations leave most blocks";
}

}  // namespace
}  // namespace spillway
