// The first promise on a trained model, the built-in one: a conversation's every step has the same bits under no tiers,
// a host tier and a host tier over files, whatever the device tier and the chunks. Short: tiers_test does it at length
// on a seeded model.

#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/file_tier.h"
#include "kvstore/host_tier.h"
#include "tests/support/engine_harness.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

constexpr std::int32_t kMaxModelLen = 96;  // 6 blocks

const std::string& Folder() {
  static const std::string folder = SPILLWAY_SOURCE_DIR "/deploy/demo_model";
  return folder;
}

std::vector<std::int32_t> Tokens(std::int32_t seed, std::size_t count) {
  std::vector<std::int32_t> tokens(count);
  for (std::size_t i = 0; i < count; ++i) {
    tokens[i] = 300 + (seed * 131 + static_cast<std::int32_t>(i * i)) % 3000;
  }
  return tokens;
}

// Two turns of three talks, two of which begin alike, one with two choices; one more is aborted, which is not compared.
struct Round {
  std::vector<SequenceRequest> requests;
  SequenceRequest aborted;
};

std::vector<Round> Rounds() {
  std::vector<Round> rounds(2);
  for (std::int32_t turn = 0; turn < 2; ++turn) {
    Round& round = rounds[static_cast<std::size_t>(turn)];
    for (std::int32_t talk = 0; talk < 3; ++talk) {
      std::vector<std::int32_t> prompt = talk == 2 ? Tokens(9, 34) : Tokens(1, 33);
      for (std::int32_t i = 0; i <= turn; ++i) {
        const std::vector<std::int32_t> more = Tokens(20 + 3 * i + talk, 9);
        prompt.insert(prompt.end(), more.begin(), more.end());
      }
      for (std::uint32_t choice = 0; choice < (talk == 1 ? 2U : 1U); ++choice) {
        SequenceRequest request = MakeRequest(prompt, 4);
        request.choice = choice;
        if (talk == 1) {
          request.sampling.temperature = 0.8F;
          request.sampling.seed = 5;
        }
        round.requests.push_back(std::move(request));
      }
    }
    round.aborted = MakeRequest(Tokens(50 + turn, 60), 30);
  }
  return rounds;
}

std::vector<std::vector<std::uint64_t>> RunRounds(Rig& rig) {
  std::vector<std::vector<std::uint64_t>> hashes;
  for (Round& round : Rounds()) {
    auto sink = std::make_shared<CollectingSink>();
    std::future<Collected> aborted = sink->Result();
    const std::uint64_t id = round.aborted.id;
    sink->on_token = [engine = rig.engine.get(), id](const Collected& so_far) {
      if (so_far.tokens.size() == 2) engine->Cancel(id);
    };
    round.aborted.sink = std::move(sink);
    std::vector<SequenceRequest> one;
    one.push_back(std::move(round.aborted));
    EXPECT_TRUE(rig.engine->Submit(std::move(one)).ok());
    for (const Collected& collected : rig.Run(std::move(round.requests))) hashes.push_back(collected.hashes());
    EXPECT_TRUE(aborted.get().error.ok());
  }
  return hashes;
}

EngineOptions Pool(std::int64_t blocks, std::int32_t chunk) {
  EngineOptions options;
  options.hash_logits = true;
  options.max_model_len = kMaxModelLen;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(Folder());
  options.long_prefill_token_threshold = chunk;
  return options;
}

const std::vector<std::vector<std::uint64_t>>& Expected() {
  static const std::vector<std::vector<std::uint64_t>> expected = [] {
    EngineOptions options = Pool(500, 0);
    options.enable_prefix_caching = false;
    Rig rig = Rig::Make(Folder(), options);
    return RunRounds(rig);
  }();
  return expected;
}

enum class TiersOn : std::uint8_t { kNone, kHost, kHostAndFile };

struct Case {
  TiersOn tiers;
  std::int64_t pool;
  std::int32_t chunk;
};

class DemoModelTiers : public ::testing::TestWithParam<Case> {};

TEST_P(DemoModelTiers, EveryStepIsBitIdentical) {
  const auto [tiers, pool, chunk] = GetParam();
  const TempFolder folder;
  std::unique_ptr<Tier> file;
  if (tiers == TiersOn::kHostAndFile) {
    FileTierOptions options;
    options.directory = folder.path() + "/kv";
    options.budget_bytes = 16LL << 20;
    options.block_bytes = static_cast<std::size_t>(Rig::BlockBytes(Folder()));
    options.space = "demo";
    file = *MakeFileTier(options);
  }
  const std::uint32_t host_blocks = file ? 7 : 100;
  const auto make_host = [&](Device& device, const KvLayout& layout) {
    return MakeHostTier(
        *device.Allocate(MemoryKind::kPinnedHost, host_blocks * layout.block_bytes()),
        {.block_bytes = layout.block_bytes(), .num_blocks = host_blocks, .verify = KvVerify::kOn, .lower = file.get()});
  };
  Rig rig = Rig::Make(Folder(), Pool(pool, chunk), {}, DTypeChoice::kAuto, nullptr,
                      tiers == TiersOn::kNone ? Rig::MakeHost() : make_host);
  EXPECT_EQ(RunRounds(rig), Expected());
  rig.engine.reset();  // CHECKs that every block came back
  if (!rig.host) return;
  while (file && rig.host->stats().in_flight > 0) std::this_thread::yield();  // files are still written
  rig.host->CheckInvariants();
  EXPECT_EQ(rig.host->stats().in_flight, 0) << "a host slot is still pinned";
  EXPECT_GT(rig.host->stats().written_bytes, 0);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const TiersOn tiers : {TiersOn::kNone, TiersOn::kHost, TiersOn::kHostAndFile}) {
    for (const std::int64_t pool : {6, 12, 500}) {
      for (const std::int32_t chunk : {1, 16, 64, 512}) cases.push_back({tiers, pool, chunk});
    }
  }
  return cases;
}

std::string NameOf(const Case& of) {
  constexpr const char* kNames[] = {"none", "host", "file"};
  return std::string(kNames[static_cast<std::size_t>(of.tiers)]) + "_pool" + std::to_string(of.pool) + "_chunk" +
         std::to_string(of.chunk);
}

INSTANTIATE_TEST_SUITE_P(Engine, DemoModelTiers, ::testing::ValuesIn(Cases()),
                         [](const auto& test) { return NameOf(test.param); });

}  // namespace
}  // namespace spillway
