// Keys and values of streamed sequences projected again from kept layer inputs: every step's logits are the bits of a
// device tier that holds everything, whatever share is projected, and no slot leaks.

#include "engine/activation_recompute.h"

#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvstore/host_tier.h"
#include "kvstore/transfer_engine.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/long_sequences.h"
#include "tests/support/wrapped_host_tier.h"

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

constexpr std::int32_t kAll = 1 << 20;

struct ModelCase {
  std::string name;
  RandomLlamaOptions shape;
  DTypeChoice dtype = DTypeChoice::kAuto;
  Quantization quantization = Quantization::kNone;
};

RandomLlamaOptions Shape(int hidden, int heads, int kv_heads) {
  return {.seed = 77,
          .layers = 2,
          .hidden = hidden,
          .inner = 96,
          .heads = heads,
          .kv_heads = kv_heads,
          .head_dim = 16,
          .vocab = 288,
          .max_positions = 2048,
          .dtype = DType::kBF16};
}

// In the first, the inputs of two blocks fit a slot; in the wide one, of one block; in the narrow one, of four.
const std::vector<ModelCase>& Models() {
  static const std::vector<ModelCase> models = {
      {.name = "bf16", .shape = Shape(64, 4, 4)},
      {.name = "f32", .shape = Shape(64, 4, 4), .dtype = DTypeChoice::kFloat32},
      {.name = "int8", .shape = Shape(64, 4, 4), .quantization = Quantization::kInt8},
      {.name = "wide", .shape = Shape(96, 4, 4)},
      {.name = "narrow", .shape = Shape(32, 4, 4)},
  };
  return models;
}

const std::string& FolderOf(const std::string& name, const RandomLlamaOptions& shape) {
  static std::map<std::string, std::string> folders;
  std::string& folder = folders[name];
  if (folder.empty()) {
    folder = ::testing::TempDir() + "spillway_recompute_" + name + "_" + std::to_string(::getpid());
    std::filesystem::create_directories(folder);
    const absl::Status status = WriteRandomLlama(folder, shape);
    SPILLWAY_CHECK(status.ok()) << status;
  }
  return folder;
}

Rig::MakeHost HostOf(std::uint32_t blocks) {
  return [blocks](Device& device, const KvLayout& layout) {
    return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, blocks * layout.block_bytes()),
                        {.block_bytes = layout.block_bytes(), .num_blocks = blocks, .verify = KvVerify::kOn});
  };
}

EngineOptions Pool(const ModelCase& model, std::int64_t blocks, std::int32_t chunk) {
  EngineOptions options;
  options.hash_logits = true;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(FolderOf(model.name, model.shape), model.dtype);
  options.long_prefill_token_threshold = chunk;
  options.stages_always = true;
  return options;
}

Rig MakeRig(const ModelCase& model, const EngineOptions& options, std::uint32_t host_blocks,
            const CpuDeviceOptions& device = {}) {
  return Rig::Make(FolderOf(model.name, model.shape), options, device, model.dtype, nullptr,
                   host_blocks > 0 ? HostOf(host_blocks) : nullptr, model.quantization);
}

// Solo, ample pool, no caching, no tiers.
const std::vector<Collected>& Expected(const ModelCase& model) {
  static std::map<std::string, std::vector<Collected>> expected;
  std::vector<Collected>& solo = expected[model.name];
  if (solo.empty()) {
    EngineOptions options;
    options.hash_logits = true;
    options.enable_prefix_caching = false;
    Rig rig = MakeRig(model, options, 0);
    solo = RunRoundsSolo(rig);
  }
  return solo;
}

void ExpectIdentical(const std::vector<Collected>& actual, const ModelCase& model) {
  const std::vector<Collected>& expected = Expected(model);
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(actual[i].ids(), expected[i].ids()) << "turn " << i;
    ASSERT_EQ(actual[i].hashes(), expected[i].hashes()) << "turn " << i;
  }
}

// Destroys the engine, which CHECKs that every block and every slot came back, and looks at the host tier.
void ExpectNothingHeld(Rig& rig) {
  rig.engine.reset();
  rig.host->CheckInvariants();
  EXPECT_EQ(rig.host->stats().in_flight, 0) << "a host slot is still pinned";
}

struct RecomputeCase {
  std::size_t model = 0;
  std::int64_t pool = 32;
  std::int32_t chunk = 64;
  std::int32_t staging = 16;
  std::int32_t tokens = kAll;
};

class Recompute : public ::testing::TestWithParam<RecomputeCase> {};

TEST_P(Recompute, EveryStepIsBitIdentical) {
  const RecomputeCase& param = GetParam();
  const ModelCase& model = Models()[param.model];
  EngineOptions options = Pool(model, param.pool, param.chunk);
  options.staging_blocks = param.staging;
  options.activation_recompute = param.tokens;
  Rig rig = MakeRig(model, options, 600);
  ExpectIdentical(RunRounds(rig), model);
  EXPECT_GT(rig.engine->status().projected_tokens, 0) << "nothing was projected: the test shows nothing";
  ExpectNothingHeld(rig);
}

std::vector<RecomputeCase> Cases() {
  std::vector<RecomputeCase> cases;
  for (std::size_t model = 0; model < Models().size(); ++model) {
    cases.push_back({.model = model});
    cases.push_back({.model = model, .chunk = 512, .staging = 64, .tokens = 304});
  }
  cases.push_back({.pool = 40, .chunk = 1, .staging = 32, .tokens = 160});
  for (const std::int32_t tokens : {16, 160, 500}) {
    cases.push_back({.pool = 32, .chunk = 17, .staging = 32, .tokens = tokens});
    cases.push_back({.pool = 40, .chunk = 512, .staging = 256, .tokens = tokens});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Engine, Recompute, ::testing::ValuesIn(Cases()), [](const auto& test) {
  const RecomputeCase& param = test.param;
  return Models()[param.model].name + "_pool" + std::to_string(param.pool) + "_chunk" + std::to_string(param.chunk) +
         "_staging" + std::to_string(param.staging) + "_tokens" + std::to_string(param.tokens);
});

TEST(RecomputeChoice, WhateverIsChosenOnAPacedLinkIsIdentical) {
  const ModelCase& model = Models()[0];
  EngineOptions options = Pool(model, 40, 256);
  options.stages_always = false;
  options.link_bytes_per_second = 200e6;
  options.activation_recompute = kRecomputeAuto;
  Rig rig = MakeRig(model, options, 300);
  ExpectIdentical(RunRounds(rig), model);
  EXPECT_GT(rig.engine->status().streamed_bytes, 0);
  ExpectNothingHeld(rig);
}

TEST(RecomputeChoice, InputsAreHalfTheBytesOfWhatIsProjectedFromThem) {
  const ModelCase& model = Models()[0];
  EngineOptions options = Pool(model, 33, 0);
  options.activation_recompute = kAll;
  Rig rig = MakeRig(model, options, 200);
  EXPECT_EQ(rig.RunOne(MakeRequest(Tokens(9, 1000), 20)).tokens.size(), 20U);
  const EngineStatus status = rig.engine->status();
  ASSERT_GT(status.projected_tokens, 0);
  const std::int64_t block_bytes = Rig::BlockBytes(FolderOf(model.name, model.shape), model.dtype);
  EXPECT_EQ(2 * status.streamed_bytes, status.projected_tokens / kBlockTokens * block_bytes);
}

// Home slots are too few for all at once, and moves home come late: sequences preempt each other and start over.
TEST(RecomputePressure, LateMovesAndScarceSlotsChangeNothing) {
  const ModelCase& model = Models()[0];
  EngineOptions options = Pool(model, 34, 64);
  options.activation_recompute = kAll;
  std::mutex mutex;
  std::mt19937_64 random(5);
  options.before_copy = [&](const Transfer& transfer) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (random() % 10 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // a late copy
    const bool fails = transfer.kind != Transfer::Kind::kMoveHome && random() % 10 == 0;
    return fails ? absl::InternalError("injected") : absl::OkStatus();
  };
  Rig rig = MakeRig(model, options, 100);
  ExpectIdentical(RunRounds(rig), model);
  EXPECT_GT(rig.engine->status().projected_tokens, 0);
  ExpectNothingHeld(rig);
}

TEST(RecomputePressure, WithoutPrefixCachingAllIsIdentical) {
  const ModelCase& model = Models()[0];
  EngineOptions options = Pool(model, 36, 128);
  options.enable_prefix_caching = false;
  options.activation_recompute = 200;
  Rig rig = MakeRig(model, options, 250);
  ExpectIdentical(RunRounds(rig), model);
  EXPECT_GT(rig.engine->status().projected_tokens, 0);
  ExpectNothingHeld(rig);
}

TEST(RecomputePressure, TwoEnginesShareTheHostTier) {
  const ModelCase& model = Models()[0];
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  const auto block_bytes = static_cast<std::size_t>(Rig::BlockBytes(FolderOf(model.name, model.shape)));
  std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, 220 * block_bytes),
                   {.block_bytes = block_bytes, .num_blocks = 220, .verify = KvVerify::kOn});
  EngineOptions options = Pool(model, 33, 64);
  options.host_tier = host.get();
  options.num_engines = 2;
  options.activation_recompute = kAll;
  Rig first = MakeRig(model, options, 0);
  options.staging_blocks = 32;
  options.activation_recompute = 128;
  Rig second = MakeRig(model, options, 0);
  std::vector<Collected> from_second;
  std::thread other([&] { from_second = RunRounds(second); });
  const std::vector<Collected> from_first = RunRounds(first);
  other.join();
  ExpectIdentical(from_first, model);
  ExpectIdentical(from_second, model);
  // One of them may find the slots taken.
  EXPECT_GT(first.engine->status().projected_tokens + second.engine->status().projected_tokens, 0);
  first.engine.reset();
  second.engine.reset();
  EXPECT_EQ(host->stats().in_flight, 0);
}

TEST(RecomputePlantedFault, KeptInputsAreRead) {
  const ModelCase& model = Models()[1];  // f32, where nothing is rounded away
  const auto run = [&](bool plants) {
    RecordingHostTier* recording = nullptr;
    EngineOptions options = Pool(model, 33, 64);
    options.activation_recompute = kAll;
    Rig rig = Rig::Make(FolderOf(model.name, model.shape), options, {}, model.dtype, nullptr,
                        [&](Device& device, const KvLayout& layout) {
                          auto wrapped = std::make_unique<RecordingHostTier>(HostOf(200)(device, layout));
                          recording = wrapped.get();
                          return wrapped;
                        });
    auto sink = std::make_shared<CollectingSink>();
    sink->on_token = [&](const Collected& so_far) {
      if (plants && so_far.tokens.size() == 3) std::memset(recording->homes.front(), 0, 64 * sizeof(float));
    };
    std::vector<SequenceRequest> one;
    one.push_back(MakeRequest(Tokens(9, 1100), 8));
    one.front().sink = sink;
    SPILLWAY_CHECK(rig.engine->Submit(std::move(one)).ok());
    return sink->Result().get().hashes();
  };
  const std::vector<std::uint64_t> expected = run(false);
  const std::vector<std::uint64_t> planted = run(true);
  ASSERT_EQ(planted.size(), expected.size());
  EXPECT_EQ(std::vector(planted.begin(), planted.begin() + 3), std::vector(expected.begin(), expected.begin() + 3));
  EXPECT_NE(planted, expected);
}

// Streams that do not wait for each other: inputs are taken too late, or projected too early.
TEST(RecomputePlantedFault, ARemovedWaitIsCaught) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "races by design; the deliberate_race test covers the report";
#endif
  const ModelCase& model = Models()[0];
  EngineOptions options = Pool(model, 33, 64);
  options.staging_blocks = 16;
  options.activation_recompute = kAll;
  CpuDeviceOptions device;
  device.ignored_order = IgnoredOrder::kWait;
  std::atomic<unsigned> count{0};
  device.before_item = [&] {
    if (count.fetch_add(1) % 5 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
  };
  Rig rig = MakeRig(model, options, 300, device);
  const std::vector<Collected> actual = RunRounds(rig);
  bool is_identical = true;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    is_identical = is_identical && actual[i].hashes() == Expected(model)[i].hashes();
  }
  EXPECT_FALSE(is_identical);
}

absl::Status MakeStatus(const ModelCase& model, const EngineOptions& given, std::uint32_t host_blocks) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  std::unique_ptr<Model> loaded =
      *Model::Load(FolderOf(model.name, model.shape), model.dtype, model.quantization, *device, nullptr);
  std::unique_ptr<HostTier> host;
  EngineOptions options = given;
  options.max_model_len = 2048;
  if (host_blocks > 0) {
    host = HostOf(host_blocks)(*device, loaded->kv_layout());
    options.host_tier = host.get();
  }
  return Engine::Make(*device, std::move(loaded), options, nullptr).status();
}

TEST(RecomputeRefusals, NameWhatItTakes) {
  using ::testing::HasSubstr;
  const ModelCase grouped{.name = "grouped", .shape = Shape(64, 4, 2)};
  EngineOptions options = Pool(grouped, 40, 0);
  options.activation_recompute = kRecomputeAuto;
  const absl::Status is_grouped = MakeStatus(grouped, options, 300);
  EXPECT_EQ(is_grouped.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(is_grouped.message()), HasSubstr("4 heads to 2 KV heads"));

  const ModelCase& model = Models()[0];
  options = Pool(model, 40, 0);
  options.activation_recompute = 64;
  const absl::Status has_no_host = MakeStatus(model, options, 0);
  EXPECT_EQ(has_no_host.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(has_no_host.message()), HasSubstr("no host tier"));
  options.stages_always = false;
  const absl::Status is_in_place = MakeStatus(model, options, 300);
  EXPECT_EQ(is_in_place.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(is_in_place.message()), HasSubstr("in place"));
}

}  // namespace
}  // namespace spillway
