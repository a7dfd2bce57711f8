// Prefixes whose blocks come up inside the step that computes what follows them, layer by layer: every step's logits
// are the bits of an engine without tiers, and nothing leaks.

#include <atomic>
#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/host_tier.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/turns.h"
#include "tests/support/wrapped_host_tier.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;
using ::spillway::testing::Tokens;
using ::spillway::testing::WrappedHostTier;

constexpr std::int64_t kPool = 60;  // blocks: two sessions of four

const std::string& Folder() {
  static const std::string folder = [] {
    std::string path = ::testing::TempDir() + "spillway_layer_loads_" + std::to_string(::getpid());
    std::filesystem::create_directories(path);
    const absl::Status status = WriteRandomLlama(path, {.seed = 41,
                                                        .layers = 3,
                                                        .hidden = 48,
                                                        .inner = 96,
                                                        .heads = 4,
                                                        .kv_heads = 2,
                                                        .head_dim = 16,
                                                        .vocab = 288,
                                                        .max_positions = 1024,
                                                        .dtype = DType::kBF16});
    SPILLWAY_CHECK(status.ok()) << status;
    return path;
  }();
  return folder;
}

// Four sessions that return with more, alone and then together, to a device tier of two.
std::vector<std::vector<SequenceRequest>> Rounds() {
  std::vector<std::vector<SequenceRequest>> rounds;
  for (std::uint32_t turn = 0; turn < 3; ++turn) {
    for (std::uint32_t session = 0; session < 4; ++session) {
      if (turn < 2 || session == 0) rounds.emplace_back();
      std::vector<std::int32_t> prompt = Tokens(session, 330 + 25 * session);
      for (std::uint32_t i = 1; i <= turn; ++i) {
        const std::vector<std::int32_t> more = Tokens(100 * i + session, 1 + 20 * session);
        prompt.insert(prompt.end(), more.begin(), more.end());
      }
      rounds.back().push_back(MakeRequest(std::move(prompt), 6));
    }
  }
  return rounds;
}

std::vector<std::vector<std::uint64_t>> RunRounds(Rig& rig) {
  std::vector<std::vector<std::uint64_t>> hashes;
  for (std::vector<SequenceRequest>& round : Rounds()) {
    for (const Collected& collected : rig.Run(std::move(round))) hashes.push_back(collected.hashes());
  }
  return hashes;
}

const std::vector<std::vector<std::uint64_t>>& Expected() {
  static const std::vector<std::vector<std::uint64_t>> expected = [] {
    EngineOptions options;
    options.hash_logits = true;
    options.enable_prefix_caching = false;
    Rig rig = Rig::Make(Folder(), options);
    return RunRounds(rig);
  }();
  return expected;
}

EngineOptions Options(LayerLoads layer_loads) {
  EngineOptions options;
  options.hash_logits = true;
  options.kv_cache_bytes = kPool * Rig::BlockBytes(Folder());
  options.layer_loads = layer_loads;
  return options;
}

Rig::MakeHost HostOf(std::uint32_t blocks) {
  return [blocks](Device& device, const KvLayout& layout) {
    return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, blocks * layout.block_bytes()),
                        {.block_bytes = layout.block_bytes(), .num_blocks = blocks, .verify = KvVerify::kOn});
  };
}

// Copies of one layer of a block, 2 KiB each; whole blocks are 6 KiB and more.
std::int64_t NumLayerCopies(const Rig& rig) { return rig.engine->status().restore_copies[11].copies; }

void ExpectNothingHeld(Rig& rig) {
  rig.engine.reset();  // CHECKs that every block came back
  rig.host->CheckInvariants();
  EXPECT_EQ(rig.host->stats().in_flight, 0) << "a host slot is still pinned";
}

struct Case {
  LayerLoads layer_loads;
  std::int32_t chunk;
  double link_bytes_per_second;
};

class LayerLoadsTest : public ::testing::TestWithParam<Case> {};

TEST_P(LayerLoadsTest, EveryStepIsBitIdentical) {
  EngineOptions options = Options(GetParam().layer_loads);
  options.long_prefill_token_threshold = GetParam().chunk;
  options.link_bytes_per_second = GetParam().link_bytes_per_second;
  Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, HostOf(400));
  EXPECT_EQ(RunRounds(rig), Expected());
  EXPECT_GT(rig.engine->status().restored_blocks, 0) << "nothing came back: the test shows nothing";
  if (GetParam().layer_loads != LayerLoads::kHidden) {
    EXPECT_EQ(NumLayerCopies(rig) > 0, GetParam().layer_loads == LayerLoads::kAlways);
  }
  ExpectNothingHeld(rig);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const LayerLoads layer_loads : {LayerLoads::kNever, LayerLoads::kHidden, LayerLoads::kAlways}) {
    for (const std::int32_t chunk : {1, 16, 512}) {
      for (const double link : {0.0, 100e6}) {
        cases.push_back({.layer_loads = layer_loads, .chunk = chunk, .link_bytes_per_second = link});
      }
    }
  }
  return cases;
}

std::string NameOf(const Case& of) {
  constexpr const char* kNames[] = {"never", "hidden", "always"};
  return std::string(kNames[static_cast<std::size_t>(of.layer_loads)]) + "_chunk" + std::to_string(of.chunk) +
         (of.link_bytes_per_second > 0 ? "_paced" : "");
}

INSTANTIATE_TEST_SUITE_P(Engine, LayerLoadsTest, ::testing::ValuesIn(Cases()),
                         [](const auto& test) { return NameOf(test.param); });

// Has every third block only when it is not asked for the bytes.
class LossyTier : public WrappedHostTier {
 public:
  using WrappedHostTier::WrappedHostTier;
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    if (count_.fetch_add(1) % 3 == 2) return std::nullopt;
    return WrappedHostTier::Find(key, tokens);
  }

 private:
  std::atomic<int> count_{0};
};

TEST(LayerLoadFaults, BlocksThatAreLostAreComputed) {
  Rig rig = Rig::Make(
      Folder(), Options(LayerLoads::kAlways), {}, DTypeChoice::kAuto, nullptr,
      [](Device& device, const KvLayout& layout) { return std::make_unique<LossyTier>(HostOf(400)(device, layout)); });
  EXPECT_EQ(RunRounds(rig), Expected());
  ExpectNothingHeld(rig);
}

TEST(LayerLoadFaults, AbortsWhileBlocksComeUpLeaveNothingHeld) {
  EngineOptions options = Options(LayerLoads::kAlways);
  options.link_bytes_per_second = 20e6;
  Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, nullptr, HostOf(400));
  for (std::vector<SequenceRequest>& round : Rounds()) {
    std::vector<std::future<Collected>> results;
    std::vector<std::uint64_t> ids;
    for (SequenceRequest& request : round) {
      auto sink = std::make_shared<CollectingSink>();
      results.push_back(sink->Result());
      ids.push_back(request.id);
      request.sink = std::move(sink);
    }
    ASSERT_TRUE(rig.engine->Submit(std::move(round)).ok());
    if (ids.back() % 2 == 0) rig.engine->Cancel(ids.back());
    for (auto& result : results) EXPECT_TRUE(result.get().error.ok());
  }
  ExpectNothingHeld(rig);
}

}  // namespace
}  // namespace spillway
