#include "server/service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "absl/time/clock.h"
#include "tests/server/collector.h"
#include "tests/support/fake_engine.h"

namespace spillway {
namespace {

using testing::HasSubstr;

class ServiceTest : public testing::Test {
 protected:
  void Make() {
    options_.model_names = {"fake", "alias"};
    engine_ = std::make_unique<FakeEngine>(engine_options_);
    service_ = Service::Make(*engine_, tokenizer_, options_);
  }
  static GenerationRequest Text(const std::string& prompt, std::int64_t max_tokens = 8) {
    GenerationRequest request;
    request.prompt = prompt;
    request.max_tokens = max_tokens;
    return request;
  }
  std::shared_ptr<Collector> Start(GenerationRequest request) {
    auto collector = std::make_shared<Collector>();
    generation_ = service_->Start(std::move(request), collector);
    return collector;
  }
  std::shared_ptr<Collector> Generate(GenerationRequest request) {
    auto collector = Start(std::move(request));
    collector->Await();
    return collector;
  }

  FakeTokenizer tokenizer_;
  FakeEngineOptions engine_options_;
  ServiceOptions options_;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Service> service_;
  std::shared_ptr<Generation> generation_;
};

TEST_F(ServiceTest, GeneratesText) {
  engine_options_.script = TextScript("hello");
  engine_options_.num_cached = 2;
  Make();
  const auto heard = Generate(Text("hi", 20));
  ASSERT_TRUE(heard->Await().ok());
  EXPECT_EQ(heard->prompt().tokens, (std::vector<std::int32_t>{kFakeBos, 'h', 'i'}));
  EXPECT_EQ(heard->choice().text, "hello");
  EXPECT_EQ(heard->choice().tokens.size(), 6U);
  const OutputFinish& finish = *heard->choice().finish;
  EXPECT_EQ(finish.reason, FinishReason::kStop);
  EXPECT_TRUE(finish.is_eos);
  EXPECT_EQ(finish.num_output_tokens, 6);
  EXPECT_EQ(finish.num_cached_tokens, 2);
}

TEST_F(ServiceTest, RefusesWhatIsOutOfRangeByName) {
  Make();
  struct Case {
    const char* field;
    std::function<void(GenerationRequest&)> change;
    const char* says;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const std::vector<Case> cases = {
      {"temperature", [](auto& r) { r.temperature = -0.1; }, "-0.1"},
      {"temperature", [&](auto& r) { r.temperature = nan; }, "nan"},
      {"temperature", [&](auto& r) { r.temperature = inf; }, "inf"},
      {"temperature", [](auto& r) { r.temperature = 1e300; }, "1e+300"},
      {"top_p", [](auto& r) { r.top_p = 0; }, "(0, 1]"},
      {"top_p", [](auto& r) { r.top_p = 1.01; }, "1.01"},
      {"top_p", [&](auto& r) { r.top_p = nan; }, "nan"},
      {"min_p", [](auto& r) { r.min_p = -1; }, "-1"},
      {"min_p", [](auto& r) { r.min_p = 1.5; }, "[0, 1]"},
      {"top_k", [](auto& r) { r.top_k = -2; }, "-2"},
      {"top_k", [](auto& r) { r.top_k = 1LL << 40; }, "1099511627776"},
      {"n", [](auto& r) { r.n = 0; }, "[1, 128]"},
      {"n", [](auto& r) { r.n = 129; }, "129"},
      {"max_tokens", [](auto& r) { r.max_tokens = 0; }, "at least 1"},
      {"max_tokens", [](auto& r) { r.max_tokens = 5000; }, "5000"},
      {"max_tokens", [](auto& r) { r.max_tokens = INT64_MAX; }, "9223372036854775807"},
      {"min_tokens", [](auto& r) { r.min_tokens = -1; }, "-1"},
      {"min_tokens", [](auto& r) { r.min_tokens = 9; }, "max_tokens (8)"},
      {"min_tokens", [](auto& r) { r.max_tokens.reset(), r.min_tokens = 5000; }, "5000"},
      {"stop",
       [](auto& r) {
         r.stop = {"a", ""};
       },
       "empty"},
      {"stop", [](auto& r) { r.stop.assign(65, "x"); }, "65"},
      {"stop", [](auto& r) { r.stop = {std::string(1025, 'x')}; }, "1025"},
      {"stop_token_ids", [](auto& r) { r.stop_token_ids = {-1}; }, "-1"},
      {"stop_token_ids", [](auto& r) { r.stop_token_ids = {kFakeVocab}; }, "280"},
      {"stop_token_ids", [](auto& r) { r.stop_token_ids.assign(1025, 1); }, "1025"},
      {"logprobs", [](auto& r) { r.logprobs = 21; }, "[0, 20]"},
      {"logprobs", [](auto& r) { r.logprobs = -1; }, "-1"},
      {"priority", [](auto& r) { r.priority = 1; }, "--scheduling-policy priority"},
      {"truncate_prompt_tokens", [](auto& r) { r.truncate_prompt_tokens = 0; }, "0"},
      {"truncate_prompt_tokens", [](auto& r) { r.truncate_prompt_tokens = 4097; }, "4097"},
      {"truncate_prompt_tokens", [](auto& r) { r.truncate_prompt_tokens = -2; }, "-2"},
      {"request_id", [](auto& r) { r.request_id = std::string(257, 'x'); }, "257"},
      {"prompt", [](auto& r) { r.prompt = std::vector<std::int32_t>{}; }, "empty"},
      {"prompt", [](auto& r) { r.prompt = std::vector<std::int32_t>{kFakeVocab}; }, "280"},
      {"prompt", [](auto& r) { r.prompt = std::vector<std::int32_t>{-5}; }, "-5"},
      {"prompt", [](auto& r) { r.prompt = std::string("ab\xff"); }, "byte 2"},
      {"prompt", [](auto& r) { r.prompt = std::string(17U << 20U, 'x'); }, "16777216"},
  };
  for (const Case& each : cases) {
    GenerationRequest request = Text("hi");
    each.change(request);
    const auto heard = Generate(std::move(request));
    EXPECT_TRUE(absl::IsInvalidArgument(heard->Await()) || absl::IsOutOfRange(heard->Await())) << heard->Await();
    EXPECT_EQ(heard->field(), each.field) << heard->Await();
    EXPECT_THAT(std::string(heard->Await().message()), HasSubstr(each.says));
    EXPECT_FALSE(heard->has_prompt());
  }
  EXPECT_TRUE(engine_->submitted().empty());
}

TEST_F(ServiceTest, PriorityReachesTheEngineUnderItsPolicyAndMustFit) {
  engine_options_.engine.scheduling_policy = SchedulingPolicy::kPriority;
  Make();
  GenerationRequest request = Text("hi", 1);
  request.priority = -7;
  EXPECT_TRUE(Generate(request)->Await().ok());
  ASSERT_EQ(engine_->submitted().size(), 1U);
  EXPECT_EQ(engine_->submitted().front().priority, -7);
  request.priority = std::int64_t{1} << 31;
  EXPECT_THAT(std::string(Generate(request)->Await().message()), HasSubstr("2147483648"));
}

TEST_F(ServiceTest, TenantsSharePrefixesUnlessTheyAreSalted) {
  for (const bool is_salted : {false, true}) {
    options_.cache_salt_by_tenant = is_salted;
    service_.reset();
    Make();
    GenerationRequest request = Text("hi", 1);
    request.cache_salt = "s";
    for (const char* tenant : {"a", "b"}) {
      request.tenant = tenant;
      EXPECT_TRUE(Generate(request)->Await().ok());
    }
    const std::vector<SequenceRequest> submitted = engine_->submitted();
    EXPECT_EQ(submitted[0].tenant, "a");
    EXPECT_EQ(submitted[1].tenant, "b");
    EXPECT_EQ(submitted[0].cache_salt == submitted[1].cache_salt, !is_salted);
    EXPECT_EQ(submitted[0].cache_salt == "s", !is_salted);
  }
  GenerationRequest request = Text("hi", 1);
  request.tenant = std::string(257, 't');
  EXPECT_THAT(std::string(Generate(request)->Await().message()), HasSubstr("257"));
}

TEST_F(ServiceTest, OverLongPromptsNameBothLengthsAndTheLimit) {
  Make();
  auto heard = Generate(Text(std::string(4000, 'x'), 200));
  EXPECT_TRUE(absl::IsOutOfRange(heard->Await()));
  for (const char* number : {"4096", "4001", "200"})
    EXPECT_THAT(std::string(heard->Await().message()), HasSubstr(number));
  heard = Generate(Text(std::string(5000, 'x'), 1));
  EXPECT_TRUE(absl::IsOutOfRange(heard->Await()));
  EXPECT_EQ(heard->field(), "prompt");
  GenerationRequest request = Text(std::string(4000, 'x'));
  request.max_tokens.reset();
  EXPECT_EQ(Generate(request)->choice().finish->num_output_tokens, 95);
  request = Text(std::string(5000, 'x') + "yz", 6);
  request.truncate_prompt_tokens = 3;
  EXPECT_EQ(Generate(request)->prompt().tokens, (std::vector<std::int32_t>{'x', 'y', 'z'}));
  request.truncate_prompt_tokens = -1;
  EXPECT_EQ(Generate(request)->prompt().tokens.size(), 4090U);
}

TEST_F(ServiceTest, UnsetFieldsTakeTheModelsDefaults) {
  engine_options_.defaults.temperature = 0.5F;
  engine_options_.defaults.top_p = 0.25F;
  engine_options_.defaults.top_k = 7;
  engine_options_.defaults.max_new_tokens = 3;
  Make();
  GenerationRequest request = Text("hi");
  request.max_tokens.reset();
  ASSERT_TRUE(Generate(request)->Await().ok());
  request.temperature = 0;
  request.top_k = -1;
  request.seed = -4;
  ASSERT_TRUE(Generate(request)->Await().ok());
  const auto submitted = engine_->submitted();
  EXPECT_EQ(submitted[0].sampling.temperature, 0.5F);
  EXPECT_EQ(submitted[0].sampling.top_p, 0.25F);
  EXPECT_EQ(submitted[0].sampling.top_k, 7);
  EXPECT_EQ(submitted[0].sampling.max_tokens, 3);
  EXPECT_EQ(submitted[1].sampling.temperature, 0);
  EXPECT_EQ(submitted[1].sampling.top_k, 0);
  EXPECT_EQ(submitted[1].sampling.seed, static_cast<std::uint64_t>(-4));
  EXPECT_NE(submitted[0].sampling.seed, submitted[1].sampling.seed);
}

TEST_F(ServiceTest, OrTheProtocolsAlone) {
  engine_options_.defaults.temperature = 0.5F;
  engine_options_.defaults.max_new_tokens = 3;
  options_.takes_generation_defaults = false;
  Make();
  GenerationRequest request = Text("hi");
  request.max_tokens.reset();
  ASSERT_TRUE(Generate(request)->Await().ok());
  EXPECT_EQ(engine_->submitted().at(0).sampling.temperature, 1);
  EXPECT_GT(engine_->submitted().at(0).sampling.max_tokens, 3);
}

TEST_F(ServiceTest, ChoicesAreSubmittedTogether) {
  engine_options_.engine.max_num_seqs = 2;
  engine_options_.engine.max_queued_requests = 1;
  Make();
  GenerationRequest request = Text("hi");
  request.n = 4;
  EXPECT_TRUE(absl::IsResourceExhausted(Generate(request)->Await()));
  EXPECT_TRUE(engine_->submitted().empty());
  request.n = 3;
  const auto heard = Generate(request);
  ASSERT_TRUE(heard->Await().ok());
  ASSERT_EQ(heard->num_choices(), 3U);
  EXPECT_NE(heard->choice(0).text, heard->choice(1).text);
  const auto submitted = engine_->submitted();
  for (std::uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(submitted[i].choice, i);
    EXPECT_EQ(submitted[i].sampling.seed, submitted[0].sampling.seed);
  }
}

TEST_F(ServiceTest, StopStringEndsAChoiceAtOnce) {
  engine_options_.script = [](const SequenceRequest&, int index) { return "say END "[index % 8]; };
  engine_options_.gate_is_open = false;
  Make();
  GenerationRequest request = Text("hi", 4000);
  request.stop = {"never", "END"};
  const auto heard = Start(request);
  engine_->AllowSteps(7);
  ASSERT_TRUE(heard->Await().ok());
  EXPECT_EQ(heard->choice().text, "say ");
  EXPECT_EQ(heard->choice().tokens.size(), 7U);
  EXPECT_EQ(heard->choice().finish->num_output_tokens, 7);
  EXPECT_EQ(heard->choice().finish->reason, FinishReason::kStop);
  EXPECT_EQ(std::get<std::string>(heard->choice().finish->stop), "END");
  engine_->AwaitLive(0);
  EXPECT_EQ(engine_->num_tokens(), 7);
}

TEST_F(ServiceTest, StopTokensAreNoTextUnlessAskedFor) {
  engine_options_.script = TextScript("ab!");
  Make();
  GenerationRequest request = Text("hi", 10);
  request.stop_token_ids = {'!'};
  auto heard = Generate(request);
  EXPECT_EQ(heard->choice().text, "ab");
  EXPECT_EQ(heard->choice().finish->num_output_tokens, 3);
  EXPECT_EQ(std::get<std::int32_t>(heard->choice().finish->stop), '!');
  EXPECT_FALSE(heard->choice().finish->is_eos);
  request.include_stop_in_output = true;
  EXPECT_EQ(Generate(request)->choice().text, "ab!");
  request.min_tokens = 4;  // the engine bans it before: another token takes its place
  EXPECT_EQ(Generate(request)->choice().text, "ab..");
  request = Text("hi", 10);
  request.skip_special_tokens = false;
  EXPECT_EQ(Generate(request)->choice().text, "ab!");
  request.include_stop_in_output = true;
  EXPECT_EQ(Generate(request)->choice().text, "ab!</s>");
  request = Text("hi", 5);
  request.ignore_eos = true;
  request.skip_special_tokens = false;
  EXPECT_EQ(Generate(request)->choice().text, "ab!</s></s>");
}

// However tokens arrive (one by one or in heaps), the text is the same, and it is the decoded tokens up to the stop.
TEST_F(ServiceTest, StreamedTextEqualsWholeText) {
  const std::vector<std::int32_t> alphabet = {
      'a', 'b', 'c', kFakeWord, kFakeKanji, kFakeEmojiHead, kFakeEmojiTail, kFakeMixed, 0xA9, kFakeBos};
  engine_options_.script = [&](const SequenceRequest& request, int index) {
    std::mt19937 random(static_cast<std::uint32_t>(request.sampling.seed + static_cast<std::uint64_t>(index)) *
                        2654435761U);
    if (random() % 20 == 0) return kFakeEos;
    return alphabet[random() % alphabet.size()];
  };
  engine_options_.gate_is_open = false;
  Make();
  const std::vector<std::string> stops = {"ab", "ca", " world", "世", "\U0001F600", "\u00e9a", "bbb"};
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    GenerationRequest request = Text("p", 1 + random() % 30);
    request.seed = round;
    for (std::size_t i = random() % 3; i > 0; --i) request.stop.push_back(stops[random() % stops.size()]);
    if (random() % 3 == 0) request.stop_token_ids = {'c'};
    request.include_stop_in_output = random() % 2 == 0;
    request.skip_special_tokens = random() % 2 == 0;
    request.ignore_eos = random() % 3 == 0;
    request.min_tokens = random() % (*request.max_tokens + 1);
    if (random() % 2 == 0) request.logprobs = 2;

    engine_->CloseGate();
    const auto stepped = Start(request);
    stepped->AwaitPrompt();
    for (std::size_t count = 1; !stepped->is_done(); ++count) {
      engine_->AllowSteps(1);
      stepped->AwaitTokens(0, count);
    }
    engine_->OpenGate();
    stepped->Await();
    const auto whole = Generate(request);
    ASSERT_EQ(stepped->choice().text, whole->choice().text) << round;
    ASSERT_EQ(stepped->choice().tokens.size(), whole->choice().tokens.size()) << round;
    const OutputFinish& finish = *whole->choice().finish;
    ASSERT_EQ(stepped->choice().finish->stop, finish.stop) << round;
    if (std::holds_alternative<std::string>(finish.stop)) continue;  // TextOutput's own test defines these
    std::vector<std::int32_t> tokens;
    for (const SampledToken& token : whole->choice().tokens) tokens.push_back(token.token);
    if (finish.reason == FinishReason::kStop && !request.include_stop_in_output) tokens.pop_back();
    const SkipSpecial skip = request.skip_special_tokens ? SkipSpecial::kYes : SkipSpecial::kNo;
    ASSERT_EQ(whole->choice().text, tokenizer_.Decode(tokens, skip)) << round;
  }
}

TEST_F(ServiceTest, CancelEndsEveryChoiceAndTheEngineForgetsThem) {
  engine_options_.gate_is_open = false;
  Make();
  GenerationRequest request = Text("hi", 100);
  request.n = 3;
  const auto heard = Start(request);
  engine_->AllowSteps(2);
  heard->AwaitTokens(0, 2);
  generation_->Cancel();
  generation_->Cancel();
  ASSERT_TRUE(heard->Await().ok());
  for (int i = 0; i < 3; ++i) EXPECT_EQ(heard->choice(i).finish->reason, FinishReason::kAborted);
  EXPECT_EQ(heard->choice(0).finish->num_output_tokens, 2);
  engine_->AwaitLive(0);
  generation_->Cancel();
}

TEST_F(ServiceTest, CancelAtAnyMomentEndsWithOk) {
  Make();
  for (int round = 0; round < 500; ++round) {
    const auto heard = Start(Text("hi", 50));
    if (round % 3 == 1) heard->AwaitPrompt();
    if (round % 3 == 2) heard->AwaitTokens(0, 1);
    generation_->Cancel();
    ASSERT_TRUE(heard->Await().ok());
    ASSERT_TRUE(heard->choice().finish);
  }
  engine_->AwaitLive(0);
}

TEST_F(ServiceTest, RequestIdsAreUniqueWhileLive) {
  engine_options_.gate_is_open = false;
  Make();
  GenerationRequest request = Text("hi");
  request.request_id = "mine";
  const auto first = Start(request);
  EXPECT_TRUE(absl::IsAlreadyExists(Generate(request)->Await()));
  service_->Abort("nobody");
  service_->Abort("mine");
  ASSERT_TRUE(first->Await().ok());
  EXPECT_EQ(first->choice().finish->reason, FinishReason::kAborted);
  engine_->OpenGate();
  const auto again = Generate(request);
  EXPECT_TRUE(again->Await().ok());
  EXPECT_EQ(again->prompt().request_id, "mine");
}

TEST_F(ServiceTest, UnknownModelsAreNotFound) {
  Make();
  GenerationRequest request = Text("hi");
  request.model = "alias";
  EXPECT_TRUE(Generate(request)->Await().ok());
  request.model = "other";
  const auto heard = Generate(request);
  EXPECT_TRUE(absl::IsNotFound(heard->Await()));
  EXPECT_THAT(std::string(heard->Await().message()), HasSubstr("fake, alias"));
}

TEST_F(ServiceTest, EngineFailureEndsGenerationsWithItsStatus) {
  engine_options_.gate_is_open = false;
  Make();
  const auto heard = Start(Text("hi"));
  engine_->AllowSteps(1);
  heard->AwaitTokens(0, 1);
  engine_->Fail(absl::InternalError("broken"));
  EXPECT_EQ(heard->Await().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(service_->is_alive());
  EXPECT_TRUE(absl::IsUnavailable(Generate(Text("hi"))->Await()));
}

TEST_F(ServiceTest, FailAllNeedsNoEngine) {
  Make();
  engine_->Stall();
  const auto heard = Start(Text("hi"));
  service_->FailAll(absl::UnavailableError("stalled"));
  EXPECT_TRUE(absl::IsUnavailable(heard->Await()));
  EXPECT_FALSE(service_->is_alive());
  service_ = nullptr;
  engine_->Resume();
}

TEST_F(ServiceTest, DrainLetsGenerationsEndAndRefusesNewOnes) {
  engine_options_.gate_is_open = false;
  Make();
  const auto heard = Start(Text("hi", 3));
  heard->AwaitPrompt();
  std::thread drain([&] { service_->Drain(absl::InfiniteFuture()); });
  while (service_->is_ready()) std::this_thread::yield();
  EXPECT_TRUE(service_->is_alive());
  EXPECT_TRUE(absl::IsUnavailable(Generate(Text("hi"))->Await()));
  engine_->OpenGate();
  drain.join();
  EXPECT_TRUE(heard->is_done());
  EXPECT_EQ(heard->choice().finish->reason, FinishReason::kLength);
  EXPECT_EQ(service_->num_live(), 0);
}

TEST_F(ServiceTest, DrainAbortsTheRestAtItsDeadline) {
  engine_options_.gate_is_open = false;
  Make();
  const auto heard = Start(Text("hi"));
  service_->Drain(absl::Now());
  EXPECT_TRUE(heard->is_done());
  EXPECT_EQ(heard->choice().finish->reason, FinishReason::kAborted);
  engine_->AwaitLive(0);
}

TEST_F(ServiceTest, LiveGenerationsEndWithTheService) {
  engine_options_.gate_is_open = false;
  Make();
  std::vector<std::shared_ptr<Collector>> heard;
  for (int i = 0; i < 50; ++i) heard.push_back(Start(Text("hi")));
  service_ = nullptr;
  for (const auto& each : heard) EXPECT_TRUE(absl::IsUnavailable(each->Await()));
  generation_->Cancel();  // a late handle is harmless
}

TEST_F(ServiceTest, TenThousandRequestsAgainstASmallQueue) {
  engine_options_.engine.max_num_seqs = 8;
  engine_options_.engine.max_queued_requests = 32;
  Make();
  std::vector<std::shared_ptr<Collector>> heard;
  for (int i = 0; i < 10000; ++i) heard.push_back(Start(Text("hi", 4)));
  int num_done = 0;
  for (const auto& each : heard) {
    const absl::Status& status = each->Await();
    ASSERT_TRUE(status.ok() || absl::IsResourceExhausted(status)) << status;
    if (status.ok()) {
      ++num_done;
      ASSERT_EQ(each->choice().text.size(), 4U);
    }
  }
  EXPECT_GE(num_done, 40);
  engine_->AwaitLive(0);
}

TEST_F(ServiceTest, ThreadsThatStartCancelAbortAndDrainTogether) {
  engine_options_.engine.max_queued_requests = 100;
  Make();
  std::vector<std::thread> threads;
  std::atomic<int> num_done = 0;
  for (std::uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      std::vector<std::shared_ptr<Collector>> heard;
      for (int i = 0; i < 200; ++i) {
        GenerationRequest request = Text("hi", 1 + random() % 20);
        request.n = 1 + random() % 3;
        request.stop = {"a"};
        request.request_id = absl::StrCat("r", random() % 50);
        const std::string id = request.request_id;
        heard.push_back(std::make_shared<Collector>());
        const auto generation = service_->Start(std::move(request), heard.back());
        if (random() % 3 == 0) generation->Cancel();
        if (random() % 3 == 0) service_->Abort(id);
      }
      if (t == 0) service_->Drain(absl::Now() + absl::Milliseconds(1));
      for (const auto& each : heard) each->Await();
      num_done += static_cast<int>(heard.size());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_done, 800);
}

}  // namespace
}  // namespace spillway
