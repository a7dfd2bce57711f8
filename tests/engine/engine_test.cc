#include "engine/engine.h"

#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::NextId;
using ::spillway::testing::Rig;

const std::string& Folder() {
  static const std::string folder = [] {
    std::string path = ::testing::TempDir() + "spillway_engine_" + std::to_string(::getpid());
    std::filesystem::create_directories(path);
    const absl::Status status = WriteRandomLlama(path, {.seed = 3, .max_positions = 256});
    SPILLWAY_CHECK(status.ok()) << status;
    return path;
  }();
  return folder;
}

EngineOptions WithBlocks(std::int64_t blocks) {
  EngineOptions options;
  options.overlap_steps = true;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(Folder());
  return options;
}

struct Submitted {
  std::shared_ptr<CollectingSink> sink = std::make_shared<CollectingSink>();
  std::future<Collected> result = sink->Result();
  std::uint64_t id = 0;
};

absl::Status SubmitOne(Engine& engine, SequenceRequest request, Submitted& submitted) {
  submitted.id = request.id;
  request.sink = submitted.sink;
  std::vector<SequenceRequest> one;
  one.push_back(std::move(request));
  return engine.Submit(std::move(one));
}

TEST(Engine, RefusesWhatCanNeverFit) {
  Rig rig = Rig::Make(Folder(), WithBlocks(4));
  Submitted submitted;
  EXPECT_EQ(SubmitOne(*rig.engine, MakeRequest(std::vector<std::int32_t>(60, 5), 6), submitted).code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(SubmitOne(*rig.engine, MakeRequest(std::vector<std::int32_t>(250, 5), 7), submitted).code(),
            absl::StatusCode::kOutOfRange);
  // 60 + 5 - 1 rows fill the pool exactly: the last token needs none.
  EXPECT_EQ(rig.RunOne(MakeRequest(std::vector<std::int32_t>(60, 5), 5)).tokens.size(), 5U);
}

TEST(Engine, CancelEndsWithinOneStep) {
  Rig rig = Rig::Make(Folder(), WithBlocks(16));
  Submitted submitted;
  SequenceRequest request = MakeRequest({1, 2, 3}, 200);
  Engine* const engine = rig.engine.get();
  const std::uint64_t id = request.id;
  submitted.sink->on_token = [engine, id](const Collected& so_far) {
    if (so_far.tokens.size() == 3) engine->Cancel(id);
  };
  ASSERT_TRUE(SubmitOne(*engine, std::move(request), submitted).ok());
  const Collected collected = submitted.result.get();
  EXPECT_EQ(collected.tokens.size(), 3U);
  ASSERT_TRUE(collected.finish.has_value());
  EXPECT_EQ(collected.finish->reason, FinishReason::kAborted);
  engine->Cancel(id);  // finished: ignored
  EXPECT_EQ(rig.RunOne(MakeRequest({1, 2, 3}, 4)).tokens.size(), 4U);
}

TEST(Engine, QueueIsBoundedAllOrNone) {
  std::promise<void> gate;
  std::shared_future<void> open = gate.get_future().share();
  std::atomic<bool> is_armed{false};
  CpuDeviceOptions device;
  device.before_item = [&] {
    if (is_armed.load()) open.wait();
  };
  EngineOptions options = WithBlocks(16);
  options.max_queued_requests = 3;
  options.max_num_seqs = 1;
  Rig rig = Rig::Make(Folder(), options, device);
  is_armed.store(true);
  std::vector<SequenceRequest> four;
  for (int i = 0; i < 4; ++i) four.push_back(MakeRequest({1}, 2));
  EXPECT_EQ(rig.engine->Submit(std::move(four)).code(), absl::StatusCode::kResourceExhausted);
  std::vector<Submitted> accepted(3);
  for (Submitted& each : accepted) ASSERT_TRUE(SubmitOne(*rig.engine, MakeRequest({1}, 2), each).ok());
  int refused = 0;
  std::vector<std::unique_ptr<Submitted>> more;
  for (int i = 0; i < 10; ++i) {
    more.push_back(std::make_unique<Submitted>());
    refused += SubmitOne(*rig.engine, MakeRequest({1}, 2), *more.back()).code() == absl::StatusCode::kResourceExhausted
                   ? 1
                   : 0;
  }
  EXPECT_GE(refused, 9) << "one may have moved on to run";
  is_armed.store(false);
  gate.set_value();
  for (Submitted& each : accepted) EXPECT_EQ(each.result.get().tokens.size(), 2U);
}

TEST(Engine, StallFailsEverySinkAndTheEngine) {
  std::promise<void> gate;
  std::shared_future<void> open = gate.get_future().share();
  std::atomic<bool> is_armed{false};
  CpuDeviceOptions device;
  device.before_item = [&] {
    if (is_armed.load()) open.wait();
  };
  EngineOptions options = WithBlocks(16);
  options.stall_timeout = absl::Milliseconds(50);
  Rig rig = Rig::Make(Folder(), options, device);
  is_armed.store(true);
  Submitted first;
  Submitted second;
  ASSERT_TRUE(SubmitOne(*rig.engine, MakeRequest({1, 2}, 5), first).ok());
  const absl::Status submitted = SubmitOne(*rig.engine, MakeRequest({1, 2}, 5), second);
  EXPECT_EQ(first.result.get().error.code(), absl::StatusCode::kUnavailable);
  if (submitted.ok()) {
    EXPECT_EQ(second.result.get().error.code(), absl::StatusCode::kUnavailable);
  }
  Submitted third;
  EXPECT_EQ(SubmitOne(*rig.engine, MakeRequest({1}, 1), third).code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(rig.engine->status().is_alive);
  EXPECT_NE(rig.engine->status().failure, "");
  is_armed.store(false);
  gate.set_value();
}

TEST(Engine, StopTokensEosAndMinTokens) {
  Rig rig = Rig::Make(Folder(), WithBlocks(16));
  const Collected free_run = rig.RunOne(MakeRequest({9, 8, 7}, 12));
  ASSERT_EQ(free_run.tokens.size(), 12U);
  EXPECT_EQ(free_run.finish->reason, FinishReason::kLength);
  const std::int32_t third = free_run.tokens[2].token;

  SequenceRequest stopped = MakeRequest({9, 8, 7}, 12);
  stopped.sampling.stop_token_ids = {third};
  const Collected at_stop = rig.RunOne(stopped);
  EXPECT_EQ(at_stop.finish->reason, FinishReason::kStop);
  EXPECT_EQ(at_stop.finish->stop_token, third);
  EXPECT_FALSE(at_stop.finish->is_eos);
  EXPECT_EQ(at_stop.tokens.back().token, third);
  EXPECT_LE(at_stop.tokens.size(), 3U);

  SequenceRequest later = MakeRequest({9, 8, 7}, 12);
  later.sampling.stop_token_ids = {third};
  later.sampling.min_tokens = 6;
  const Collected beyond = rig.RunOne(later);
  EXPECT_GE(beyond.tokens.size(), 6U);
  for (std::size_t i = 0; i < 6; ++i) EXPECT_NE(beyond.tokens[i].token, third) << "banned before min_tokens";
}

TEST(Engine, EosOfTheGenerationConfigEndsASequence) {
  const std::int32_t third = Rig::Make(Folder(), WithBlocks(16)).RunOne(MakeRequest({9, 8, 7}, 12)).tokens[2].token;
  const TempFolder folder;
  ASSERT_TRUE(WriteRandomLlama(folder.path(), {.seed = 3, .max_positions = 256}).ok());
  folder.Write("generation_config.json", "{\"eos_token_id\": [" + std::to_string(third) + ", 1000000]}");
  SequenceRequest request = MakeRequest({9, 8, 7}, 12);
  request.sampling.ignore_eos = false;
  const Collected ended = Rig::Make(folder.path(), WithBlocks(16)).RunOne(request);
  EXPECT_EQ(ended.finish->reason, FinishReason::kStop);
  EXPECT_TRUE(ended.finish->is_eos);
  EXPECT_EQ(ended.tokens.back().token, third);
}

TEST(Engine, ChoicesShareThePromptAndDiffer) {
  Rig rig = Rig::Make(Folder(), WithBlocks(32));
  std::vector<SequenceRequest> choices;
  for (std::uint32_t i = 0; i < 3; ++i) {
    SequenceRequest request = MakeRequest(std::vector<std::int32_t>(40, 17), 16);
    request.choice = i;
    request.sampling.temperature = 1;
    request.sampling.seed = 99;
    choices.push_back(std::move(request));
  }
  const std::vector<Collected> first = rig.Run(choices);
  EXPECT_NE(first[0].ids(), first[1].ids());
  EXPECT_NE(first[1].ids(), first[2].ids());
  EXPECT_EQ(first[0].num_cached, 0);
  EXPECT_EQ(first[1].num_cached, 32);
  for (SequenceRequest& request : choices) request.id = NextId();
  const std::vector<Collected> again = rig.Run(choices);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(first[i].ids(), again[i].ids());
}

TEST(Engine, SaltAndBypassSeparatePrefixes) {
  Rig rig = Rig::Make(Folder(), WithBlocks(32));
  const auto run = [&](const std::string& salt, bool bypass) {
    SequenceRequest request = MakeRequest(std::vector<std::int32_t>(40, 21), 2);
    request.cache_salt = salt;
    request.bypass_prefix_cache = bypass;
    return rig.RunOne(request).num_cached;
  };
  EXPECT_EQ(run("", false), 0);
  EXPECT_EQ(run("", false), 32);
  EXPECT_EQ(run("a", false), 0);
  EXPECT_EQ(run("b", false), 0);
  EXPECT_EQ(run("a", false), 32);
  EXPECT_EQ(run("", true), 0);
  rig.engine->ResetPrefixCache();
  EXPECT_EQ(run("a", false), 0);
}

TEST(Engine, DestructionEndsWhatRuns) {
  Submitted submitted;
  {
    Rig rig = Rig::Make(Folder(), WithBlocks(16));
    ASSERT_TRUE(SubmitOne(*rig.engine, MakeRequest({1, 2, 3}, 200), submitted).ok());
  }
  const Collected collected = submitted.result.get();
  EXPECT_TRUE(collected.finish.has_value() || collected.error.code() == absl::StatusCode::kUnavailable);
}

TEST(Engine, RefusesAPoolSmallerThanABlock) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  absl::StatusOr<std::unique_ptr<Model>> model =
      Model::Load(Folder(), DTypeChoice::kAuto, Quantization::kNone, *device, nullptr);
  ASSERT_TRUE(model.ok()) << model.status();
  EngineOptions options;
  options.kv_cache_bytes = 100;
  options.max_model_len = 128;
  EXPECT_EQ(Engine::Make(*device, *std::move(model), options, nullptr).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace spillway
