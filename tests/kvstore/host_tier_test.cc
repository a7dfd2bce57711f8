#include "kvstore/host_tier.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/prefix_index.h"
#include "kvstore/tier_check.h"
#include "tests/support/wrapped_host_tier.h"

namespace spillway {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{256} << 10;

BlockKey KeyOf(std::uint32_t number) {
  BlockKey key;
  std::memcpy(key.bytes.data(), &number, sizeof(number));
  return key;
}

std::size_t ResidentBytes(const Buffer& slab) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages(slab.size_bytes / page);
  EXPECT_EQ(::mincore(slab.get(), slab.size_bytes, pages.data()), 0);
  std::size_t resident = 0;
  for (const unsigned char each : pages) resident += (each & 1U) * page;
  return resident;
}

TEST(HostTierMemory, IsPopulatedAsItIsUsed) {
  constexpr std::uint32_t kBlocks = 1024;  // 256 MiB
  constexpr std::uint32_t kUsed = 64;      // 16 MiB
  constexpr std::size_t kHugePage = std::size_t{2} << 20;
  const std::unique_ptr<Device> device = *MakeCpuDevice({});
  const Buffer slab = *device->Allocate(MemoryKind::kPinnedHost, kBlocks * kBlockBytes);
  const std::unique_ptr<HostTier> host = MakeHostTier(slab, {.block_bytes = kBlockBytes, .num_blocks = kBlocks});
  EXPECT_EQ(ResidentBytes(slab), 0U);
  PrefixIndex::Tokens tokens{};
  for (std::uint32_t i = 0; i < kUsed; ++i) {
    HostSlot slot = *host->BeginWrite(KeyOf(i), tokens, WriteCause::kPublished);
    std::memset(slot.bytes(), 1, kBlockBytes);
    host->Commit(std::move(slot), KeyOf(i), tokens);
  }
  EXPECT_GE(ResidentBytes(slab), kUsed * kBlockBytes);
  EXPECT_LE(ResidentBytes(slab), kUsed * kBlockBytes + kHugePage);
}

TEST(HostTierMemory, BookkeepingIsCountedAndSmall) {
  constexpr std::uint32_t kBlocks = 1025;  // one more than a power of two: the worst for a table
  constexpr std::size_t kSmallBlockBytes = std::size_t{16} << 10;
  const std::unique_ptr<Device> device = *MakeCpuDevice({});
  const std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, kBlocks * kSmallBlockBytes),
                   {.block_bytes = kSmallBlockBytes, .num_blocks = kBlocks});
  const std::int64_t empty = host->stats().bookkeeping_bytes;
  PrefixIndex::Tokens tokens{};
  for (std::uint32_t i = 0; i < kBlocks; ++i) {
    host->Commit(*host->BeginWrite(KeyOf(i), tokens, WriteCause::kPublished), KeyOf(i), tokens);
  }
  const TierStats stats = host->stats();
  EXPECT_EQ(stats.resident_blocks, kBlocks);
  EXPECT_GE(stats.bookkeeping_bytes - empty, std::int64_t{kBlocks} * 96) << "at least key and tokens";
  EXPECT_LT(stats.bookkeeping_bytes, stats.resident_bytes / 100);
}

// A tier whose slots change while they are at rest.
class RottingTier : public testing::WrappedHostTier {
 public:
  using WrappedHostTier::WrappedHostTier;
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    std::optional<HostSlot> found = WrappedHostTier::Find(key, tokens);
    if (found) found->bytes()[100] ^= std::byte{1};
    return found;
  }
};

// What a removed event wait looks like: a copy counts as done when it is queued. It never is.
class HastyStream : public Stream {
 public:
  void Copy(std::byte*, const std::byte*, std::size_t) override {}
  void Gather(std::byte*, std::span<const std::byte* const>, std::size_t, std::size_t) override {}
  std::shared_ptr<Event> Record() override {
    class Reached : public Event {
      bool Ready() const override { return true; }
      absl::Status Await() override { return absl::OkStatus(); }
      double SecondsSince(const Event&) const override { return 0; }
    };
    return std::make_shared<Reached>();
  }
  std::shared_ptr<Event> RecordTime() override { return Record(); }
  void Wait(const std::shared_ptr<Event>&) override {}
  void Notify(std::function<void()> reached) override { reached(); }
  absl::Status status() const override { return absl::OkStatus(); }
};

// Its streams after the first one are hasty.
class HastyDevice : public Device {
 public:
  explicit HastyDevice(Device& real) : real_(real) {}
  absl::StatusOr<Buffer> Allocate(MemoryKind kind, std::size_t size_bytes) override {
    return real_.Allocate(kind, size_bytes);
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    if (std::exchange(is_first_, false)) return real_.NewStream();
    return std::make_unique<HastyStream>();
  }
  const Kernels& kernels() const override { return real_.kernels(); }
  std::size_t free_bytes() const override { return real_.free_bytes(); }
  HostKv host_kv() const override { return real_.host_kv(); }
  std::string description() const override { return real_.description(); }

 private:
  Device& real_;
  bool is_first_ = true;
};

TEST(TierCheck, PassesSoundTiersAndNamesWhatDiffers) {
  const KvLayout layout{.num_layers = 2, .num_kv_heads = 2, .head_dim = 8, .dtype = DType::kBF16};
  const std::unique_ptr<Device> device = *MakeCpuDevice({});
  const auto make = [&](int threshold) {
    return MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, 8 * layout.block_bytes()),
                        {.block_bytes = layout.block_bytes(), .num_blocks = 8, .store_threshold = threshold});
  };
  for (const int threshold : {1, 3}) {
    const std::unique_ptr<HostTier> host = make(threshold);
    const auto check = CheckTiers(*device, *host, layout, 5);
    ASSERT_TRUE(check.ok()) << check.status();
    EXPECT_EQ(check->host_blocks, 5);
    EXPECT_EQ(check->lower_blocks, 0);
    EXPECT_EQ(host->stats().resident_blocks, 0);
  }
  RottingTier rotting(make(1));
  const auto check = CheckTiers(*device, rotting, layout, 5);
  EXPECT_EQ(check.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_NE(check.status().message().find("host tier: block 0 of 5 differs at byte 100"), std::string::npos)
      << check.status();
}

TEST(TierCheck, ARemovedEventWaitIsCaught) {
  const KvLayout layout{.num_layers = 2, .num_kv_heads = 2, .head_dim = 8, .dtype = DType::kBF16};
  const std::unique_ptr<Device> device = *MakeCpuDevice({});
  HastyDevice hasty(*device);
  const std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, 4 * layout.block_bytes()),
                   {.block_bytes = layout.block_bytes(), .num_blocks = 4});
  EXPECT_EQ(CheckTiers(hasty, *host, layout, 2).status().code(), absl::StatusCode::kDataLoss);
}

}  // namespace
}  // namespace spillway
