// The first promise: with tiers on, off, tiny or huge, under eviction storms, preemption, aborts and faults of cached
// copies, every step's logits are the same bits, and nothing leaks.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/file_tier.h"
#include "kvstore/host_tier.h"
#include "kvstore/transfer_engine.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/temp_folder.h"
#include "tests/support/turns.h"
#include "tests/support/wrapped_host_tier.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;
using ::spillway::testing::RunTurns;
using ::spillway::testing::Turn;
using ::spillway::testing::WrappedHostTier;

constexpr std::int32_t kMaxModelLen = 96;  // 6 blocks

const std::string& Folder() {
  static const std::string folder = [] {
    std::string path = ::testing::TempDir() + "spillway_tiers_" + std::to_string(::getpid());
    std::filesystem::create_directories(path);
    const absl::Status status = WriteRandomLlama(path, {.seed = 21,
                                                        .layers = 2,
                                                        .hidden = 48,
                                                        .inner = 96,
                                                        .heads = 4,
                                                        .kv_heads = 2,
                                                        .head_dim = 16,
                                                        .vocab = 288,
                                                        .max_positions = kMaxModelLen,
                                                        .dtype = DType::kBF16});
    SPILLWAY_CHECK(status.ok()) << status;
    return path;
  }();
  return folder;
}

// Three rounds of conversations: each turn repeats all that was said before. Some prompts are nearly as long as a
// sequence may be, some come as three choices, and some are aborted after a few tokens.
std::vector<std::vector<Turn>> Rounds() {
  std::mt19937 random(17);
  const auto tokens = [&](int count) {
    std::vector<std::int32_t> out;
    for (int i = 0; i < count; ++i) out.push_back(static_cast<std::int32_t>(3 + random() % 280));
    return out;
  };
  const std::vector<std::int32_t> shared = tokens(33);
  std::vector<std::vector<std::int32_t>> talks(10);
  for (std::size_t i = 0; i < talks.size(); ++i) {
    if (i % 2 == 0) talks[i] = shared;
    const std::vector<std::int32_t> own = tokens(3 + static_cast<int>(random() % 18));
    talks[i].insert(talks[i].end(), own.begin(), own.end());
  }
  talks[7] = tokens(60);
  std::vector<std::vector<Turn>> rounds;
  for (int round = 0; round < 3; ++round) {
    std::vector<Turn> turns;
    for (std::size_t i = 0; i < talks.size(); ++i) {
      const std::uint32_t choices = i == 4 ? 3 : 1;
      for (std::uint32_t choice = 0; choice < choices; ++choice) {
        Turn turn{.request = MakeRequest(talks[i], 3 + static_cast<std::int32_t>(i))};
        turn.request.choice = choice;
        if (i % 3 == 1) {
          turn.request.sampling.temperature = 0.8F;
          turn.request.sampling.seed = 40 + i;
        }
        if (i == 5 && round > 0) turn.abort_after = 2;
        turns.push_back(std::move(turn));
      }
      const std::vector<std::int32_t> more = tokens(7);
      talks[i].insert(talks[i].end(), more.begin(), more.end());
    }
    rounds.push_back(std::move(turns));
  }
  return rounds;
}

std::vector<Collected> RunRounds(Rig& rig) { return RunTurns(rig, Rounds()); }

// Solo, ample pool, no caching, no tiers, steps one by one.
const std::vector<Collected>& Expected() {
  static const std::vector<Collected> expected = [] {
    EngineOptions options;
    options.hash_logits = true;
    options.enable_prefix_caching = false;
    Rig rig = Rig::Make(Folder(), options);
    std::vector<Collected> solo;
    for (std::vector<Turn>& round : Rounds()) {
      for (Turn& turn : round) {
        Collected collected = rig.RunOne(std::move(turn.request));
        if (turn.abort_after > 0) collected.tokens.resize(turn.abort_after);
        solo.push_back(std::move(collected));
      }
    }
    return solo;
  }();
  return expected;
}

void ExpectIdentical(const std::vector<Collected>& actual) {
  ASSERT_EQ(actual.size(), Expected().size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i].ids(), Expected()[i].ids()) << "turn " << i;
    ASSERT_EQ(actual[i].hashes(), Expected()[i].hashes()) << "turn " << i;
  }
}

// Makes a prompt's blocks leave the device tier and come back, whatever the timing of write-through: false if that
// changed a bit.
bool ForceRestore(Rig& rig) {
  static std::int32_t next = 0;
  const auto prompt = [](std::int32_t of) {
    std::vector<std::int32_t> tokens(81);
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = 3 + (of * 37 + static_cast<std::int32_t>(i * i)) % 280;
    return tokens;
  };
  const std::vector<std::int32_t> wanted = prompt(next++);
  const Collected before = rig.RunOne(MakeRequest(wanted, 3));
  for (int i = 0; i < 3; ++i) rig.RunOne(MakeRequest(prompt(next++), 3));  // 15 blocks pass through the pool
  const Collected after = rig.RunOne(MakeRequest(wanted, 3));
  return before.hashes() == after.hashes();
}

EngineOptions Pool(std::int64_t blocks, std::int32_t chunk) {
  EngineOptions options;
  options.hash_logits = true;
  options.overlap_steps = true;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(Folder());
  options.long_prefill_token_threshold = chunk;
  return options;
}

std::unique_ptr<HostTier> MakeHost(Device& device, const KvLayout& layout, std::uint32_t blocks,
                                   HostTierOptions options = {}) {
  options.block_bytes = layout.block_bytes();
  options.num_blocks = blocks;
  return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, blocks * layout.block_bytes()), options);
}

Rig::MakeHost HostOf(std::uint32_t blocks, HostTierOptions options = {}) {
  return
      [blocks, options](Device& device, const KvLayout& layout) { return MakeHost(device, layout, blocks, options); };
}

struct TierCase {
  std::int64_t pool;
  std::int32_t chunk;
  std::uint32_t host;  // blocks; 0: no tiers
  bool has_file = false;
};

std::unique_ptr<Tier> MakeFile(const std::string& directory) {
  FileTierOptions options;
  options.directory = directory;
  options.budget_bytes = 64LL << 20;
  options.block_bytes = static_cast<std::size_t>(Rig::BlockBytes(Folder()));
  options.space = "tiers_test";
  absl::StatusOr<std::unique_ptr<Tier>> tier = MakeFileTier(options);
  SPILLWAY_CHECK(tier.ok()) << tier.status();
  return *std::move(tier);
}

class Tiers : public ::testing::TestWithParam<TierCase> {};

TEST_P(Tiers, EveryStepIsBitIdentical) {
  const auto [pool, chunk, host, has_file] = GetParam();
  const TempFolder folder;
  const std::unique_ptr<Tier> file = has_file ? MakeFile(folder.path() + "/kv") : nullptr;
  Rig rig = Rig::Make(Folder(), Pool(pool, chunk), {}, DTypeChoice::kAuto, nullptr,
                      host > 0 ? HostOf(host, {.lower = file.get()}) : nullptr);
  ExpectIdentical(RunRounds(rig));
  const bool must_restore = pool <= 12 && host >= 200;
  if (must_restore) {
    const std::int64_t before = rig.host->stats().hits;
    for (int i = 0; i < 300 && rig.host->stats().hits == before; ++i) EXPECT_TRUE(ForceRestore(rig));
    EXPECT_GT(rig.host->stats().hits, before) << "nothing was restored: the test shows nothing";
  }
  rig.engine.reset();  // CHECKs that every block came home
  if (!rig.host) return;
  while (has_file && rig.host->stats().in_flight > 0) std::this_thread::yield();  // files are still written
  rig.host->CheckInvariants();
  const TierStats stats = rig.host->stats();
  EXPECT_EQ(stats.in_flight, 0) << "a host slot is still pinned";
  EXPECT_EQ(stats.checksum_failures, 0);
  EXPECT_GT(stats.written_bytes, 0);
}

std::vector<TierCase> Cases() {
  std::vector<TierCase> cases;
  for (const std::int64_t pool : {6, 12, 500}) {
    for (const std::int32_t chunk : {1, 16, 64, 512}) {
      for (const std::uint32_t host : {0U, 5U, 400U}) cases.push_back({pool, chunk, host});
      cases.push_back({pool, chunk, 7, /*has_file=*/true});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Engine, Tiers, ::testing::ValuesIn(Cases()), [](const auto& test) {
  return "pool" + std::to_string(test.param.pool) + "_chunk" + std::to_string(test.param.chunk) + "_host" +
         std::to_string(test.param.host) + (test.param.has_file ? "_file" : "");
});

struct AdmissionCase {
  SchedulingPolicy policy;
  LoadChoice choice;
  std::int32_t chunk;
};

class Admission : public ::testing::TestWithParam<AdmissionCase> {};

TEST_P(Admission, EveryStepIsBitIdentical) {
  const auto [policy, choice, chunk] = GetParam();
  EngineOptions options = Pool(12, chunk);
  options.scheduling_policy = policy;
  options.load_choice = choice;
  Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, HostOf(400, {.verify = KvVerify::kOn}));
  ExpectIdentical(RunRounds(rig));
  const std::int64_t before = rig.host->stats().hits;
  for (int i = 0; i < 300 && rig.host->stats().hits == before; ++i) {
    EXPECT_TRUE(ForceRestore(rig));
    if (choice == LoadChoice::kRecompute || choice == LoadChoice::kAuto) break;  // auto: as the cost model finds
  }
  if (choice != LoadChoice::kAuto) {
    EXPECT_EQ(rig.host->stats().hits > before, choice != LoadChoice::kRecompute);
  }
  rig.engine.reset();
  rig.host->CheckInvariants();
  EXPECT_EQ(rig.host->stats().in_flight, 0) << "a host slot is still pinned";
}

std::vector<AdmissionCase> AdmissionCases() {
  std::vector<AdmissionCase> cases;
  for (const SchedulingPolicy policy :
       {SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority, SchedulingPolicy::kKappa}) {
    for (const LoadChoice choice : {LoadChoice::kLoad, LoadChoice::kRecompute, LoadChoice::kSplit, LoadChoice::kAuto}) {
      for (const std::int32_t chunk : {7, 512}) cases.push_back({policy, choice, chunk});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Tiers, Admission, ::testing::ValuesIn(AdmissionCases()), [](const auto& test) {
  return std::string(NameOf(test.param.policy)) + "_" +
         std::string(kLoadChoiceNames[static_cast<std::size_t>(test.param.choice)]) + "_chunk" +
         std::to_string(test.param.chunk);
});

// Cached copies that are lost or corrupted. Wraps the real tier through the interface that production uses.
class FaultyHostTier : public WrappedHostTier {
 public:
  FaultyHostTier(std::unique_ptr<HostTier> real, std::size_t block_bytes, std::uint64_t offset)
      : WrappedHostTier(std::move(real)), block_bytes_(block_bytes), offset_(offset) {}

  std::optional<HostSlot> BeginWrite(const BlockKey& key, std::span<const std::int32_t> tokens,
                                     WriteCause cause) override {
    if (num_writes_.fetch_add(1) % 10 == 9) return std::nullopt;
    return WrappedHostTier::BeginWrite(key, tokens, cause);
  }
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    const std::uint64_t count = num_finds_.fetch_add(1) + offset_;
    if (count % 7 == 6) return std::nullopt;
    std::optional<HostSlot> found = WrappedHostTier::Find(key, tokens);
    if (found && count % 3 == 0) {
      found->bytes()[count * 131 % block_bytes_] ^= std::byte{0x40};
      ++num_corrupted;
    }
    return found;
  }

  std::atomic<int> num_corrupted{0};

 private:
  const std::size_t block_bytes_;
  const std::uint64_t offset_;
  std::atomic<std::uint64_t> num_writes_{0};
  std::atomic<std::uint64_t> num_finds_{0};
};

TEST(TierFaults, LostCorruptedFailedAndLateCopiesChangeNothing) {
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    SCOPED_TRACE(seed);
    FaultyHostTier* faulty = nullptr;
    EngineOptions options = Pool(9, 64);
    std::mutex mutex;
    std::mt19937_64 random(seed);
    options.before_copy = [&](const Transfer&) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (random() % 100 < 5) std::this_thread::sleep_for(std::chrono::milliseconds(2));  // a late copy
      return random() % 100 < 10 ? absl::InternalError("injected") : absl::OkStatus();
    };
    Rig rig =
        Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, [&](Device& device, const KvLayout& layout) {
          auto wrapped = std::make_unique<FaultyHostTier>(MakeHost(device, layout, 300, {.verify = KvVerify::kOn}),
                                                          layout.block_bytes(), seed);
          faulty = wrapped.get();
          return wrapped;
        });
    ExpectIdentical(RunRounds(rig));
    for (int i = 0; i < 300 && faulty->stats().checksum_failures == 0; ++i) EXPECT_TRUE(ForceRestore(rig));
    rig.engine.reset();
    EXPECT_GT(faulty->num_corrupted.load(), 0);
    EXPECT_GT(faulty->stats().checksum_failures, 0);
    EXPECT_EQ(faulty->stats().in_flight, 0);
    faulty->CheckInvariants();
  }
}

// The same corruption without checksums must be seen by the comparison, or the comparison would prove nothing.
TEST(PlantedFault, CorruptedCopyWithoutVerifyIsCaught) {
  Rig rig =
      Rig::Make(Folder(), Pool(9, 64), {}, DTypeChoice::kAuto, nullptr, [&](Device& device, const KvLayout& layout) {
        return std::make_unique<FaultyHostTier>(MakeHost(device, layout, 300), layout.block_bytes(), 1);
      });
  bool differs = false;
  for (int i = 0; i < 300 && !differs; ++i) differs = !ForceRestore(rig);
  EXPECT_TRUE(differs);
}

TEST(HostTier, TwoEnginesShareOneTier) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  const std::int64_t block_bytes = Rig::BlockBytes(Folder());
  std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, 300 * static_cast<std::size_t>(block_bytes)),
                   {.block_bytes = static_cast<std::size_t>(block_bytes), .num_blocks = 300, .verify = KvVerify::kOn});
  EngineOptions options = Pool(10, 16);
  options.host_tier = host.get();
  Rig first = Rig::Make(Folder(), options);
  Rig second = Rig::Make(Folder(), options);
  std::vector<Collected> from_second;
  std::thread other([&] { from_second = RunRounds(second); });
  const std::vector<Collected> from_first = RunRounds(first);
  other.join();
  ExpectIdentical(from_first);
  ExpectIdentical(from_second);
  // What one has computed the other finds.
  SequenceRequest request = MakeRequest(std::vector<std::int32_t>(60, 33), 2);
  const std::int64_t before = host->stats().resident_blocks;
  first.RunOne(request);
  while (host->stats().resident_blocks < before + 3) std::this_thread::yield();  // write-through is asynchronous
  first.engine.reset();
  EXPECT_EQ(second.RunOne(request).num_cached, 48);
  second.engine.reset();
  EXPECT_EQ(host->stats().in_flight, 0);
}

// A host tier of 8 blocks over a file tier: most restores come from files, the second time those of the first process.
TEST(FileTier, IsIdenticalAndServesAfterARestart) {
  const TempFolder folder;
  const std::string directory = folder.path() + "/kv";
  for (const bool is_restart : {false, true}) {
    std::unique_ptr<Tier> file = MakeFile(directory);
    for (const std::int32_t chunk : {1, 16, 512}) {
      Rig rig = Rig::Make(Folder(), Pool(8, chunk), {}, DTypeChoice::kAuto, nullptr,
                          HostOf(8, {.verify = KvVerify::kOn, .lower = file.get()}));
      ExpectIdentical(RunRounds(rig));
      rig.engine.reset();
      while (rig.host->stats().in_flight > 0) std::this_thread::yield();  // writes to files still read host slots
    }
    const TierStats stats = file->stats();
    EXPECT_GT(stats.resident_blocks, 8);
    EXPECT_EQ(stats.checksum_failures, 0);
    if (is_restart) {
      EXPECT_GT(stats.hits, 0) << "nothing came up from files";
    }
  }
}

TEST(HostTier, StoreThresholdWaitsForTheSecondSighting) {
  Rig rig = Rig::Make(Folder(), Pool(12, 64), {}, DTypeChoice::kAuto, nullptr, HostOf(100, {.store_threshold = 2}));
  const SequenceRequest request = MakeRequest(std::vector<std::int32_t>(40, 9), 1);
  rig.RunOne(request);
  EXPECT_EQ(rig.host->stats().resident_blocks, 0);
  rig.RunOne(request);
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (rig.host->stats().resident_blocks < 2 && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
  EXPECT_EQ(rig.host->stats().resident_blocks, 2) << "the second sighting stores both full blocks";
}

}  // namespace
}  // namespace spillway
