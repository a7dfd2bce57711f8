// Steps that are launched while the one before them runs give the same tokens, logprobs and logits as steps one by one,
// whatever ends a sequence meanwhile.

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "gtest/gtest.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

const std::string& Folder() {
  static const std::string folder = [] {
    std::string path = ::testing::TempDir() + "spillway_overlap_" + std::to_string(::getpid());
    std::filesystem::create_directories(path);
    const absl::Status status = WriteRandomLlama(path, {.seed = 13, .max_positions = 256});
    SPILLWAY_CHECK(status.ok()) << status;
    return path;
  }();
  return folder;
}

class StepCounter : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    ++num_steps;
    num_overlapped += report.is_overlapped ? 1 : 0;
    num_generated += report.num_generated;
    num_preempted += report.num_preempted;
    has_idled |= report.idle_seconds > 0;
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

  int num_steps = 0;
  int num_overlapped = 0;
  int num_generated = 0;
  int num_preempted = 0;
  bool has_idled = false;
};

EngineOptions Options(bool overlaps, std::int64_t blocks) {
  EngineOptions options;
  options.hash_logits = true;
  options.overlap_steps = overlaps;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(Folder());
  return options;
}

std::vector<std::int32_t> Prompt(std::mt19937& random, std::size_t length) {
  std::vector<std::int32_t> tokens(length);
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(3 + random() % 80);
  return tokens;
}

// Everything that sampling can be asked for; stop ids that are met, early and late.
std::vector<SequenceRequest> Workload() {
  std::mt19937 random(29);
  std::vector<SequenceRequest> requests;
  for (int i = 0; i < 24; ++i) {
    SequenceRequest request =
        MakeRequest(Prompt(random, 1 + random() % 60), 1 + static_cast<std::int32_t>(random() % 40));
    SamplingParams& sampling = request.sampling;
    if (i % 2 == 0) {
      sampling.temperature = 0.9F;
      sampling.seed = 7U + static_cast<unsigned>(i);
      sampling.top_p = i % 4 == 0 ? 0.9F : 1;
      sampling.top_k = i % 6 == 0 ? 20 : 0;
    }
    if (i % 3 == 0) sampling.num_logprobs = i % 5;
    if (i % 4 == 1) {
      for (int k = 0; k < 12; ++k) sampling.stop_token_ids.push_back(static_cast<std::int32_t>(random() % 96));
      sampling.min_tokens = i % 8 == 1 ? std::min(sampling.max_tokens, 6) : 0;
    }
    sampling.ignore_eos = i % 5 != 0;
    requests.push_back(std::move(request));
  }
  return requests;
}

void ExpectSame(const std::vector<Collected>& expected, const std::vector<Collected>& actual) {
  ASSERT_EQ(expected.size(), actual.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE(i);
    ASSERT_EQ(expected[i].ids(), actual[i].ids());
    ASSERT_EQ(expected[i].hashes(), actual[i].hashes());
    ASSERT_EQ(expected[i].finish->reason, actual[i].finish->reason);
    ASSERT_EQ(expected[i].finish->stop_token, actual[i].finish->stop_token);
    for (std::size_t k = 0; k < expected[i].tokens.size(); ++k) {
      const SampledToken& a = expected[i].tokens[k];
      const SampledToken& b = actual[i].tokens[k];
      ASSERT_EQ(a.logprob, b.logprob);
      ASSERT_EQ(a.rank, b.rank);
      ASSERT_EQ(a.top.size(), b.top.size());
      for (std::size_t n = 0; n < a.top.size(); ++n) ASSERT_EQ(a.top[n].token, b.top[n].token);
    }
  }
}

TEST(Overlap, EveryStepOfOneSequenceAfterItsPromptIsOverlapped) {
  for (const bool overlaps : {false, true}) {
    StepCounter counter;
    Rig rig = Rig::Make(Folder(), Options(overlaps, 32), {}, DTypeChoice::kAuto, &counter);
    EXPECT_EQ(rig.RunOne(MakeRequest({5, 6, 7}, 40)).tokens.size(), 40U);
    rig.engine.reset();
    EXPECT_EQ(counter.num_steps, 40);
    EXPECT_EQ(counter.num_overlapped, overlaps ? 39 : 0);
    EXPECT_TRUE(counter.has_idled) << "the device takes some time from step to step, if only to fetch the next one";
  }
}

TEST(Overlap, TokensLogprobsAndLogitsAreThoseOfStepsOneByOne) {
  const std::vector<Collected> expected = Rig::Make(Folder(), Options(false, 400)).Run(Workload());
  for (const std::int64_t blocks : {400, 12}) {
    SCOPED_TRACE(blocks);
    StepCounter counter;
    EngineOptions options = Options(true, blocks);
    if (blocks < 400) options.max_model_len = 12 * kBlockTokens;
    Rig rig = Rig::Make(Folder(), options, {}, DTypeChoice::kAuto, &counter);
    const std::vector<Collected> actual = rig.Run(Workload());
    rig.engine.reset();  // CHECKs that every block came home
    ExpectSame(expected, actual);
    EXPECT_GT(counter.num_overlapped, 10);
    EXPECT_TRUE(blocks == 400 || counter.num_preempted > 0);
    int num_told = 0;
    for (const Collected& each : actual) num_told += static_cast<int>(each.tokens.size());
    EXPECT_EQ(counter.num_generated, num_told) << "a step counts what is told, not what is discarded";
  }
}

TEST(Overlap, AStopFoundALaterStepDiscardsOneTokenAndPublishesNothingOfIt) {
  Rig rig = Rig::Make(Folder(), Options(true, 32));
  const std::vector<std::int32_t> prompt = {9, 8, 7, 6, 5};
  SequenceRequest request = MakeRequest(prompt, 60);
  request.sampling.temperature = 1;
  request.sampling.seed = 5;
  const Collected whole = rig.RunOne(request);
  // The first token that was not there before it, so that it ends the run where it stands; as late as a block is full.
  std::size_t end = 20;
  const std::vector<std::int32_t> ids = whole.ids();
  while (end + 1 < ids.size() && std::count(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(end), ids[end]) > 0)
    ++end;
  request.id = ::spillway::testing::NextId();
  request.sampling.stop_token_ids = {ids[end]};
  const Collected stopped = rig.RunOne(request);
  EXPECT_EQ(stopped.finish->reason, FinishReason::kStop);
  EXPECT_EQ(stopped.tokens.size(), end + 1);
  EXPECT_TRUE(std::equal(stopped.tokens.begin(), stopped.tokens.end(), whole.tokens.begin(),
                         [](const auto& a, const auto& b) { return a.logits_hash == b.logits_hash; }));
  // What it left behind is the prefix of the same text, and its bits.
  std::vector<std::int32_t> longer = prompt;
  longer.insert(longer.end(), ids.begin(), ids.begin() + 40);
  const Collected again = rig.RunOne(MakeRequest(longer, 3));
  EXPECT_GT(again.num_cached, 0);
  EXPECT_EQ(again.tokens[0].logits_hash, whole.tokens[40].logits_hash);
}

// The order comes while a step runs that was launched for a sequence that has ended.
TEST(Overlap, ResetOfThePrefixCacheWaitsForTheStepThatRuns) {
  Rig rig = Rig::Make(Folder(), Options(true, 32));
  const std::vector<std::int32_t> prompt(40, 17);
  const std::int32_t third = rig.RunOne(MakeRequest(prompt, 3)).tokens[2].token;
  for (int i = 0; i < 20; ++i) {
    SequenceRequest request = MakeRequest(prompt, 30);
    request.sampling.stop_token_ids = {third};
    EXPECT_EQ(rig.RunOne(request).finish->reason, FinishReason::kStop);
    rig.engine->ResetPrefixCache();
    EXPECT_EQ(rig.RunOne(MakeRequest(prompt, 1)).num_cached, 0);
  }
}

TEST(Overlap, CancelledSequencesAreTokenIdenticalUpToTheirEnd) {
  const std::vector<Collected> expected = Rig::Make(Folder(), Options(false, 400)).Run(Workload());
  Rig rig = Rig::Make(Folder(), Options(true, 400));
  std::vector<SequenceRequest> requests = Workload();
  std::vector<std::future<Collected>> results;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    auto sink = std::make_shared<CollectingSink>();
    if (i % 2 == 0) {
      sink->on_token = [engine = rig.engine.get(), id = requests[i].id, after = 1 + i / 2](const Collected& so_far) {
        if (so_far.tokens.size() == after) engine->Cancel(id);
      };
    }
    results.push_back(sink->Result());
    requests[i].sink = std::move(sink);
  }
  ASSERT_TRUE(rig.engine->Submit(std::move(requests)).ok());
  for (std::size_t i = 0; i < results.size(); ++i) {
    const Collected actual = results[i].get();
    const std::vector<std::int32_t> ids = expected[i].ids();
    const std::size_t length = i % 2 == 0 ? std::min(ids.size(), 1 + i / 2) : ids.size();
    EXPECT_EQ(actual.ids(), std::vector<std::int32_t>(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(length)));
  }
}

}  // namespace
}  // namespace spillway
