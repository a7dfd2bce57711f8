#include "engine/engine_group.h"

#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/engine_harness.h"
#include "tests/support/fake_engine.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;

class EngineGroupTest : public ::testing::Test {
 protected:
  EngineGroupTest() {
    FakeEngineOptions options;
    options.gate_is_open = false;
    std::vector<std::unique_ptr<Engine>> engines;
    for (FakeEngine*& fake : fakes_) {
      auto engine = std::make_unique<FakeEngine>(options);
      fake = engine.get();
      engines.push_back(std::move(engine));
    }
    group_ = MakeEngineGroup(std::move(engines));
  }
  // Submits `choices` of a prompt. Their ends.
  std::vector<std::future<Collected>> Submit(std::vector<std::int32_t> prompt, std::uint32_t choices = 1,
                                             const std::string& salt = "") {
    std::vector<SequenceRequest> requests;
    std::vector<std::future<Collected>> results;
    for (std::uint32_t choice = 0; choice < choices; ++choice) {
      requests.push_back(MakeRequest(prompt, 3));
      requests.back().choice = choice;
      requests.back().cache_salt = salt;
      auto sink = std::make_shared<CollectingSink>();
      results.push_back(sink->Result());
      requests.back().sink = std::move(sink);
      last_id_ = requests.back().id;
    }
    EXPECT_TRUE(group_->Submit(std::move(requests)).ok());
    return results;
  }
  std::size_t SubmittedTo(int engine) const { return fakes_[engine]->submitted().size(); }
  static std::vector<std::int32_t> Prompt(std::int32_t of, std::size_t length = 40) {
    std::vector<std::int32_t> prompt(length);
    for (std::size_t i = 0; i < length; ++i) prompt[i] = 'a' + (of * 5 + static_cast<std::int32_t>(i * i)) % 26;
    return prompt;
  }
  void Finish(std::vector<std::vector<std::future<Collected>>>& all) {
    for (FakeEngine* const fake : fakes_) fake->OpenGate();
    for (auto& results : all) {
      for (auto& result : results) EXPECT_TRUE(result.get().error.ok());
    }
  }

  FakeEngine* fakes_[2] = {};
  std::uint64_t last_id_ = 0;
  std::unique_ptr<Engine> group_;
};

TEST_F(EngineGroupTest, SpreadsByLoadAndKeepsChoicesTogether) {
  std::vector<std::vector<std::future<Collected>>> all;
  all.push_back(Submit(Prompt(1), 3));
  all.push_back(Submit(Prompt(2)));
  all.push_back(Submit(Prompt(3)));
  EXPECT_EQ(SubmittedTo(0), 3U) << "three choices of one prompt";
  EXPECT_EQ(SubmittedTo(1), 2U) << "the others have fewer sequences before them there";
  EXPECT_EQ(group_->status().num_running + group_->status().num_waiting, 5);
  EXPECT_EQ(group_->status().kv_blocks_total, 200);
  EXPECT_EQ(fakes_[0]->submitted()[0].prompt_keys, KeyChain("0").Keys(Prompt(1), "")) << "hashed once, for both";
  Finish(all);
}

TEST_F(EngineGroupTest, GoesWhereTheLongestPrefixIs) {
  std::vector<std::vector<std::future<Collected>>> all;
  all.push_back(Submit(Prompt(1)));
  all.push_back(Submit(Prompt(2)));
  ASSERT_EQ(SubmittedTo(1), 1U);
  for (FakeEngine* const fake : fakes_) fake->AwaitLive(1);
  Finish(all);
  for (FakeEngine* const fake : fakes_) fake->AwaitLive(0);
  std::vector<std::int32_t> longer = Prompt(2);
  longer.insert(longer.end(), 30, 'z');
  Submit(longer).front().get();
  EXPECT_EQ(SubmittedTo(1), 2U) << "both are idle, and it knows two blocks";
  Submit(Prompt(2), 1, "salt").front().get();
  EXPECT_EQ(SubmittedTo(0), 2U) << "another salt is another prefix";
}

TEST_F(EngineGroupTest, CancelsOnWhicheverEngine) {
  std::vector<std::vector<std::future<Collected>>> all;
  all.push_back(Submit(Prompt(1)));
  all.push_back(Submit(Prompt(2)));
  group_->Cancel(last_id_);
  EXPECT_EQ(all[1].front().get().finish->reason, FinishReason::kAborted);
  all.pop_back();
  Finish(all);
}

TEST_F(EngineGroupTest, FailsWithOneEngine) {
  EXPECT_TRUE(group_->status().is_alive);
  fakes_[1]->Fail(absl::InternalError("kernel fault"));
  const EngineStatus status = group_->status();
  EXPECT_FALSE(status.is_alive);
  EXPECT_EQ(status.failure, "engine 1 of 2: kernel fault");
}

}  // namespace
}  // namespace spillway
