// Sequences whose KV exceeds the device tier: their older blocks are at home in the host tier, and attention reads them
// from there. Every step's logits are the bits of a device tier that holds everything, and nothing leaks.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvstore/block_key.h"
#include "kvstore/host_tier.h"
#include "kvstore/transfer_engine.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/long_sequences.h"
#include "tests/support/wrapped_host_tier.h"

// Another file may run these tests on another device.
#ifndef SPILLWAY_BEYOND_HEAD_DIM
#define SPILLWAY_BEYOND_HEAD_DIM 16
#endif

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::RecordingHostTier;
using ::spillway::testing::Rig;
using ::spillway::testing::RunRounds;
using ::spillway::testing::RunRoundsSolo;
using ::spillway::testing::Tokens;

std::string MakeModel(const std::string& name, int max_positions) {
  const std::string path = ::testing::TempDir() + "spillway_" + name + "_" + std::to_string(::getpid());
  std::filesystem::create_directories(path);
  const absl::Status status = WriteRandomLlama(path, {.seed = 31,
                                                      .layers = 2,
                                                      .hidden = 48,
                                                      .inner = 96,
                                                      .heads = 4,
                                                      .kv_heads = 2,
                                                      .head_dim = SPILLWAY_BEYOND_HEAD_DIM,
                                                      .vocab = 288,
                                                      .max_positions = max_positions,
                                                      .dtype = DType::kBF16});
  SPILLWAY_CHECK(status.ok()) << status;
  return path;
}

const std::string& Folder() {
  static const std::string folder = MakeModel("beyond", 2048);
  return folder;
}

// Solo, ample pool, no caching, no tiers.
const std::vector<Collected>& Expected() {
  static const std::vector<Collected> expected = [] {
    EngineOptions options;
    options.hash_logits = true;
    options.enable_prefix_caching = false;
    Rig rig = Rig::Make(Folder(), options);
    return RunRoundsSolo(rig);
  }();
  return expected;
}

bool IsIdentical(const std::vector<Collected>& actual) {
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (actual[i].ids() != Expected()[i].ids() || actual[i].hashes() != Expected()[i].hashes()) return false;
  }
  return actual.size() == Expected().size();
}

void ExpectIdentical(const std::vector<Collected>& actual) {
  ASSERT_EQ(actual.size(), Expected().size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i].ids(), Expected()[i].ids()) << "turn " << i;
    ASSERT_EQ(actual[i].hashes(), Expected()[i].hashes()) << "turn " << i;
  }
}

EngineOptions Pool(std::int64_t blocks, std::int32_t chunk) {
  EngineOptions options;
  options.hash_logits = true;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(Folder());
  options.long_prefill_token_threshold = chunk;
  return options;
}

Rig::MakeHost HostOf(std::uint32_t blocks, HostTierOptions options = {}) {
  return [blocks, options](Device& device, const KvLayout& layout) mutable {
    options.block_bytes = layout.block_bytes();
    options.num_blocks = blocks;
    return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, blocks * layout.block_bytes()), options);
  };
}

// Destroys the engine, which CHECKs that every device block came back, and looks at the host tier.
void ExpectNothingHeld(Rig& rig) {
  rig.engine.reset();
  rig.host->CheckInvariants();
  EXPECT_EQ(rig.host->stats().in_flight, 0) << "a host slot is still pinned";
}

struct BeyondCase {
  std::int64_t pool;
  std::int32_t chunk;
  std::uint32_t host;
  std::int32_t staging;  // blocks; 0: in place
};

class Beyond : public ::testing::TestWithParam<BeyondCase> {};

TEST_P(Beyond, EveryStepIsBitIdentical) {
  const auto [pool, chunk, host, staging] = GetParam();
  EngineOptions options = Pool(pool, chunk);
  options.stages_always = staging > 0;
  if (staging > 0) options.staging_blocks = staging;
  Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, HostOf(host, {.verify = KvVerify::kOn}));
  ExpectIdentical(RunRounds(rig));
  EXPECT_GT(rig.engine->status().streamed_bytes, 0) << "nothing was read at home: the test shows nothing";
  ExpectNothingHeld(rig);
}

std::vector<BeyondCase> Cases() {
  std::vector<BeyondCase> cases;
  for (const std::int64_t pool : {32, 40, 70}) {
    for (const std::int32_t chunk : {1, 16, 64, 512}) {
      for (const std::int32_t staging : {0, 16, 64}) {
        cases.push_back({.pool = pool, .chunk = chunk, .host = chunk == 64 ? 100U : 600U, .staging = staging});
      }
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Engine, Beyond, ::testing::ValuesIn(Cases()), [](const auto& test) {
  return "pool" + std::to_string(test.param.pool) + "_chunk" + std::to_string(test.param.chunk) + "_host" +
         std::to_string(test.param.host) + "_staging" + std::to_string(test.param.staging);
});

// Short, for devices that are emulated: its prompt exceeds the device tier, and so does every step after it.
TEST(BeyondOne, DecodesWithTheBitsOfAnAmpleDeviceTier) {
  const auto run = [](std::int64_t blocks) {
    Rig rig = Rig::Make(Folder(), Pool(blocks, 0), {}, DTypeChoice::kAuto, nullptr, HostOf(64));
    const Collected collected = rig.RunOne(MakeRequest(Tokens(13, 560), 4));
    EXPECT_EQ(rig.engine->status().streamed_bytes > 0, blocks == 32);
    ExpectNothingHeld(rig);
    return collected.hashes();
  };
  EXPECT_EQ(run(32), run(64));
}

TEST(BeyondLimits, SubmitNamesBothTiers) {
  Rig rig = Rig::Make(Folder(), Pool(32, 0), {}, DTypeChoice::kAuto, nullptr, HostOf(50));
  std::vector<SequenceRequest> fits;  // 32 + 48 blocks
  fits.push_back(MakeRequest(Tokens(1, 1270), 11));
  auto sink = std::make_shared<CollectingSink>();
  fits.front().sink = sink;
  EXPECT_TRUE(rig.engine->Submit(std::move(fits)).ok());
  EXPECT_EQ(sink->Result().get().tokens.size(), 11U);
  std::vector<SequenceRequest> exceeds;
  exceeds.push_back(MakeRequest(Tokens(1, 1270), 12));
  const absl::Status status = rig.engine->Submit(std::move(exceeds));
  EXPECT_EQ(status.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("512 tokens and the 768 tokens that the host tier"));
  ExpectNothingHeld(rig);
}

// The host tier is too small for both at once, and copies home come late: sequences preempt each other and start over.
TEST(BeyondPressure, LateMovesAndScarceHomeSlotsChangeNothing) {
  EngineOptions options = Pool(34, 64);
  std::mutex mutex;
  std::mt19937_64 random(5);
  options.before_copy = [&](const Transfer& transfer) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (random() % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // a late copy
    const bool fails = transfer.kind != Transfer::Kind::kMoveHome && random() % 10 == 0;
    return fails ? absl::InternalError("injected") : absl::OkStatus();
  };
  Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, HostOf(64, {.verify = KvVerify::kOn}));
  ExpectIdentical(RunRounds(rig));
  EXPECT_GT(rig.engine->status().streamed_bytes, 0);
  ExpectNothingHeld(rig);
}

TEST(BeyondPressure, WithoutPrefixCachingNothingIsFindableAndAllIsIdentical) {
  EngineOptions options = Pool(36, 128);
  options.enable_prefix_caching = false;
  Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, HostOf(150));
  ExpectIdentical(RunRounds(rig));
  EXPECT_GT(rig.engine->status().streamed_bytes, 0);
  EXPECT_EQ(rig.host->stats().resident_blocks, 0);
  ExpectNothingHeld(rig);
}

TEST(BeyondPressure, TwoEnginesShareTheHostTier) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  const auto block_bytes = static_cast<std::size_t>(Rig::BlockBytes(Folder()));
  std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, 130 * block_bytes),
                   {.block_bytes = block_bytes, .num_blocks = 130, .verify = KvVerify::kOn});
  EngineOptions options = Pool(33, 64);
  options.host_tier = host.get();
  options.num_engines = 2;
  Rig first = Rig::Make(Folder(), options);
  options.stages_always = true;
  options.staging_blocks = 32;
  Rig second = Rig::Make(Folder(), options);
  std::vector<Collected> from_second;
  std::thread other([&] { from_second = RunRounds(second); });
  const std::vector<Collected> from_first = RunRounds(first);
  other.join();
  ExpectIdentical(from_first);
  ExpectIdentical(from_second);
  EXPECT_GT(first.engine->status().streamed_bytes, 0);
  EXPECT_GT(second.engine->status().streamed_bytes, 0);
  first.engine.reset();
  second.engine.reset();
  EXPECT_EQ(host->stats().in_flight, 0);
}

// One long sequence; `plant` runs on the engine thread after its third token. The hashes of its logits.
std::vector<std::uint64_t> RunWithPlant(const std::function<void(RecordingHostTier&, std::size_t block_bytes)>& plant) {
  RecordingHostTier* recording = nullptr;
  std::size_t block_bytes = 0;
  EngineOptions options = Pool(33, 64);
  options.kv_cache_bytes = 33 * Rig::BlockBytes(Folder(), DTypeChoice::kFloat32);  // where nothing is rounded away
  Rig rig =
      Rig::Make(Folder(), options, {}, DTypeChoice::kFloat32, nullptr, [&](Device& device, const KvLayout& layout) {
        block_bytes = layout.block_bytes();
        auto wrapped = std::make_unique<RecordingHostTier>(HostOf(100)(device, layout));
        recording = wrapped.get();
        return wrapped;
      });
  auto sink = std::make_shared<CollectingSink>();
  sink->on_token = [&](const Collected& so_far) {
    if (so_far.tokens.size() == 3) plant(*recording, block_bytes);
  };
  std::vector<SequenceRequest> one;
  one.push_back(MakeRequest(Tokens(9, 1100), 8));
  one.front().sink = sink;
  SPILLWAY_CHECK(rig.engine->Submit(std::move(one)).ok());
  return sink->Result().get().hashes();
}

TEST(PlantedFault, WhatIsAtHomeIsRead) {
  const std::vector<std::uint64_t> expected = RunWithPlant([](RecordingHostTier&, std::size_t) {});
  // A slot that was dropped too early and written by another.
  EXPECT_NE(RunWithPlant([](RecordingHostTier& tier, std::size_t block_bytes) {
              std::memset(tier.homes.at(20) + block_bytes / 2, 0, 64);
            }),
            expected);
  // Two segments in the wrong order: equal but for the order of the merge.
  EXPECT_NE(RunWithPlant([](RecordingHostTier& tier, std::size_t block_bytes) {
              for (std::size_t i = 0; i < 16; ++i) {
                std::swap_ranges(tier.homes.at(i), tier.homes.at(i) + block_bytes, tier.homes.at(i + 32));
              }
            }),
            expected);
}

// Streams that do not wait for each other: a staging buffer is overwritten before it was read, or read too early.
TEST(PlantedFault, ARemovedWaitOnAStagingBufferIsCaught) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "races by design; the deliberate_race test covers the report";
#endif
  EngineOptions options = Pool(33, 64);
  options.stages_always = true;
  options.staging_blocks = 16;
  CpuDeviceOptions device;
  device.ignored_order = IgnoredOrder::kWait;
  std::atomic<unsigned> count{0};
  device.before_item = [&] {
    if (count.fetch_add(1) % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  };
  Rig rig = Rig::Make(Folder(), options, device, DTypeChoice::kAuto, nullptr, HostOf(300));
  EXPECT_FALSE(IsIdentical(RunRounds(rig)));
}

// 100,000 tokens whose KV is laid into the host tier, decoded with a device tier of 8,192 tokens.
TEST(BeyondLength, AHundredThousandTokensAreIdenticalToAnAmpleDeviceTier) {
  constexpr std::size_t kPrompt = 100'000;
  const std::string folder = MakeModel("beyond_100k", kPrompt + 64);
  const std::vector<std::int32_t> prompt = Tokens(11, kPrompt);
  const auto run = [&](std::int64_t device_blocks, bool stages) {
    EngineOptions options;
    options.hash_logits = true;
    options.kv_cache_bytes = device_blocks * Rig::BlockBytes(folder);
    options.stages_always = stages;
    options.load_choice = LoadChoice::kLoad;  // what was laid in is not what computing would give
    Rig rig = Rig::Make(folder, options, {}, DTypeChoice::kAuto, nullptr, HostOf(6400));
    const KeyChain chain(options.prefix_hash_seed);
    const auto values_per_block = static_cast<std::size_t>(Rig::BlockBytes(folder)) / sizeof(std::uint16_t);
    SeededNormal normal(3);
    BlockKey key = chain.root();
    for (std::size_t at = 0; at + kBlockTokens <= kPrompt; at += kBlockTokens) {
      const auto tokens = std::span(prompt).subspan(at, kBlockTokens);
      key = chain.Next(key, tokens, "");
      std::optional<HostSlot> slot = rig.host->BeginWrite(key, tokens, WriteCause::kPublished);
      auto* const values = reinterpret_cast<std::uint16_t*>(slot->bytes());
      for (std::size_t i = 0; i < values_per_block; ++i) values[i] = BF16FromFloat(normal.Next());
      rig.host->Commit(*std::move(slot), key, tokens);
    }
    const Collected collected = rig.RunOne(MakeRequest(prompt, 20));
    EXPECT_GE(collected.num_cached, static_cast<std::int32_t>(kPrompt) - 2 * kBlockTokens);
    const std::int64_t streamed = rig.engine->status().streamed_bytes;
    if (device_blocks * kBlockTokens == 8192) {
      EXPECT_GT(streamed, 20 * 5'400 * Rig::BlockBytes(folder));
    } else {
      EXPECT_EQ(streamed, 0);
    }
    ExpectNothingHeld(rig);
    return collected.hashes();
  };
  const std::vector<std::uint64_t> expected = run(6400, false);
  ASSERT_EQ(expected.size(), 20U);
  EXPECT_EQ(run(512, false), expected);
  EXPECT_EQ(run(512, true), expected);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace spillway
