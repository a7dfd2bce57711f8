// The gRPC front end over real sockets, a real Service and a scripted engine.

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <thread>

#include "absl/time/clock.h"
#include "proto/health.grpc.pb.h"
#include "proto/vllm_control.grpc.pb.h"
#include "proto/vllm_inference.grpc.pb.h"
#include "server/frontend.h"
#include "tests/support/fake_engine.h"

namespace spillway {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class GrpcTest : public ::testing::Test {
 protected:
  void Start(FakeEngineOptions engine = {}, FrontendOptions frontend = {}, std::size_t max_pending_bytes = 4U << 20U) {
    engine_ = std::make_unique<FakeEngine>(std::move(engine));
    service_ = spillway::Service::Make(*engine_, tokenizer_,
                                       {.model_names = {"first", "second"}, .max_pending_bytes = max_pending_bytes});
    auto made = MakeGrpcFrontend(*service_, frontend);
    ASSERT_TRUE(made.ok()) << made.status();
    frontend_ = *std::move(made);
    channel_ =
        grpc::CreateChannel("127.0.0.1:" + std::to_string(frontend_->port()), grpc::InsecureChannelCredentials());
    inference_ = vllm::Inference::NewStub(channel_);
    control_ = vllm::Control::NewStub(channel_);
    health_ = Health::NewStub(channel_);
  }

  grpc::Status Generate(const vllm::GenerateRequest& request, vllm::GenerateResponse* response) {
    grpc::ClientContext context;
    return inference_->Generate(&context, request, response);
  }
  grpc::Status GenerateStatus(const vllm::GenerateRequest& request) {
    vllm::GenerateResponse response;
    return Generate(request, &response);
  }
  HealthCheckResponse::ServingStatus Check(const std::string& name) {
    grpc::ClientContext context;
    HealthCheckRequest request;
    request.set_service(name);
    HealthCheckResponse response;
    const grpc::Status status = health_->Check(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  FakeTokenizer tokenizer_;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<spillway::Service> service_;
  std::unique_ptr<Frontend> frontend_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<vllm::Inference::Stub> inference_;
  std::unique_ptr<vllm::Control::Stub> control_;
  std::unique_ptr<Health::Stub> health_;
};

EngineOptions EngineLimits(std::int32_t max_model_len) {
  EngineOptions options;
  options.max_model_len = max_model_len;
  return options;
}

vllm::GenerateRequest TextRequest(const std::string& text = "hello") {
  vllm::GenerateRequest request;
  request.set_text(text);
  return request;
}

TEST_F(GrpcTest, UnaryAnswersTextAndDefaults) {
  Start({.script = TextScript("abc")});
  vllm::GenerateResponse response;
  const grpc::Status status = Generate(TextRequest(), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.prompt_info().num_prompt_tokens(), 6U);  // bos and five bytes
  EXPECT_EQ(response.prompt_info().token_ids_size(), 0);
  EXPECT_EQ(response.outputs().text(), "abc");
  EXPECT_EQ(response.outputs().num_tokens(), 4U);
  EXPECT_EQ(response.outputs().token_ids_size(), 0);
  EXPECT_EQ(response.outputs().logprobs_size(), 0);
  EXPECT_EQ(response.outputs().finish_info().finish_reason(), vllm::FinishInfo::STOP);
  EXPECT_EQ(response.outputs().finish_info().eos_token_id(), static_cast<std::uint32_t>(kFakeEos));
  EXPECT_EQ(response.outputs().finish_info().num_output_tokens(), 4U);
  const SequenceRequest submitted = engine_->submitted().at(0);
  EXPECT_EQ(submitted.sampling.max_tokens, 20);
  EXPECT_EQ(submitted.sampling.temperature, 0);
  EXPECT_EQ(submitted.sampling.num_logprobs, -1);
}

TEST_F(GrpcTest, UnsetTemperatureIsTheModels) {
  GenerationDefaults defaults;
  defaults.temperature = 0.5F;
  Start({.script = TextScript("a"), .defaults = defaults});
  ASSERT_TRUE(GenerateStatus(TextRequest()).ok());
  EXPECT_EQ(engine_->submitted().at(0).sampling.temperature, 0.5F);
}

TEST_F(GrpcTest, EveryParameterReachesTheEngine) {
  Start();
  vllm::GenerateRequest request;
  for (const std::uint32_t id : {5U, 6U, 7U, 8U}) request.mutable_token_ids()->add_ids(id);
  request.set_temperature(0.75);
  request.mutable_sampling()->set_top_k(7);
  request.mutable_sampling()->set_top_p(0.5);
  request.mutable_sampling()->set_min_p(0.25);
  request.mutable_sampling()->set_seed(11);
  request.mutable_stopping()->set_max_new_tokens(3);
  request.mutable_stopping()->set_min_new_tokens(2);
  request.mutable_stopping()->add_stop_token_ids(99);
  request.mutable_stopping()->set_ignore_eos(true);
  request.mutable_response()->mutable_output_candidates()->set_top_n(2);
  request.mutable_kv()->set_bypass_prefix_cache(true);
  request.mutable_kv()->set_cache_salt("salt");
  request.set_truncate_prompt_tokens(2);
  vllm::GenerateResponse response;
  const grpc::Status status = Generate(request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.outputs().finish_info().finish_reason(), vllm::FinishInfo::LENGTH);
  const SequenceRequest submitted = engine_->submitted().at(0);
  EXPECT_THAT(submitted.prompt, ElementsAre(7, 8));
  EXPECT_EQ(submitted.sampling.temperature, 0.75F);
  EXPECT_EQ(submitted.sampling.top_k, 7);
  EXPECT_EQ(submitted.sampling.top_p, 0.5F);
  EXPECT_EQ(submitted.sampling.min_p, 0.25F);
  EXPECT_EQ(submitted.sampling.seed, 11U);
  EXPECT_EQ(submitted.sampling.max_tokens, 3);
  EXPECT_EQ(submitted.sampling.min_tokens, 2);
  EXPECT_THAT(submitted.sampling.stop_token_ids, ElementsAre(99));
  EXPECT_TRUE(submitted.sampling.ignore_eos);
  EXPECT_EQ(submitted.sampling.num_logprobs, 2);
  EXPECT_TRUE(submitted.bypass_prefix_cache);
  EXPECT_EQ(submitted.cache_salt, "salt");
}

TEST_F(GrpcTest, SelectionDecidesWhatIsAnswered) {
  Start({.script = TextScript("ab")});
  vllm::GenerateRequest request = TextRequest("hi");
  request.mutable_stopping()->set_max_new_tokens(2);
  request.mutable_response()->set_output_text(false);
  request.mutable_response()->set_output_token_ids(true);
  request.mutable_response()->set_output_logprobs(true);
  request.mutable_response()->set_prompt_token_ids(true);
  request.mutable_response()->mutable_output_candidates()->set_top_n(3);
  vllm::GenerateResponse response;
  ASSERT_TRUE(Generate(request, &response).ok());
  const vllm::SequenceOutput& output = response.outputs();
  EXPECT_EQ(output.text(), "");
  EXPECT_THAT(output.token_ids(), ElementsAre('a', 'b'));
  EXPECT_THAT(output.logprobs(), ElementsAre(-0.25F, -0.5F));
  EXPECT_THAT(output.ranks(), ElementsAre(1, 1));
  ASSERT_EQ(output.candidate_tokens_size(), 2);
  ASSERT_EQ(output.candidate_tokens(0).tokens_size(), 3);
  EXPECT_EQ(output.candidate_tokens(0).tokens(1).id(), static_cast<std::uint32_t>('b'));
  EXPECT_EQ(output.candidate_tokens(0).tokens(1).rank(), 2U);
  EXPECT_THAT(response.prompt_info().token_ids(), ElementsAre(kFakeBos, 'h', 'i'));
}

TEST_F(GrpcTest, StopStringsAndTokensAreTold) {
  Start({.script = TextScript("one stop two")});
  vllm::GenerateRequest request = TextRequest();
  request.mutable_stopping()->add_stop_strings("stop");
  vllm::GenerateResponse response;
  ASSERT_TRUE(Generate(request, &response).ok());
  EXPECT_EQ(response.outputs().text(), "one ");
  EXPECT_EQ(response.outputs().finish_info().stop_string(), "stop");
  request.mutable_stopping()->set_include_stop_strings(true);
  response.Clear();
  ASSERT_TRUE(Generate(request, &response).ok());
  EXPECT_EQ(response.outputs().text(), "one stop");
  request = TextRequest();
  request.mutable_stopping()->add_stop_token_ids('e');
  response.Clear();
  ASSERT_TRUE(Generate(request, &response).ok());
  EXPECT_EQ(response.outputs().finish_info().stop_token_id(), static_cast<std::uint32_t>('e'));
}

TEST_F(GrpcTest, StreamedChunksAddUpToTheUnaryAnswer) {
  Start({.script = TextScript("streamed text")});
  vllm::GenerateRequest request = TextRequest();
  request.mutable_sampling()->set_num_sequences(3);
  grpc::ClientContext context;
  const auto reader = inference_->GenerateStream(&context, request);
  std::vector<std::string> texts(3);
  std::vector<int> finished(3);
  int num_prompts = 0;
  bool is_first = true;
  for (vllm::GenerateResponse response; reader->Read(&response); is_first = false) {
    if (response.has_prompt_info()) ++num_prompts;
    EXPECT_EQ(response.has_prompt_info(), is_first);
    const std::uint32_t index = response.outputs().index();
    ASSERT_LT(index, 3U);
    EXPECT_EQ(finished[index], 0) << "nothing follows finish_info";
    texts[index] += response.outputs().text();
    if (response.outputs().has_finish_info()) ++finished[index];
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(num_prompts, 1);
  EXPECT_THAT(texts, ::testing::Each("streamed text"));
  EXPECT_THAT(finished, ::testing::Each(1));
  const grpc::Status unary = GenerateStatus(request);
  EXPECT_EQ(unary.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(unary.error_message(), HasSubstr("sampling.num_sequences"));
}

TEST_F(GrpcTest, CancelEndsTheGeneration) {
  Start({.gate_is_open = false});
  grpc::ClientContext context;
  vllm::GenerateRequest request = TextRequest();
  request.mutable_stopping()->set_max_new_tokens(1000);
  const auto reader = inference_->GenerateStream(&context, request);
  engine_->AwaitLive(1);
  engine_->AllowSteps(2);
  vllm::GenerateResponse response;
  ASSERT_TRUE(reader->Read(&response));
  context.TryCancel();
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  engine_->AwaitLive(0);
  EXPECT_LE(engine_->num_tokens(), 2);
}

TEST_F(GrpcTest, DeadlineEndsUnaryAndStream) {
  Start({.gate_is_open = false});
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  vllm::GenerateResponse response;
  EXPECT_EQ(inference_->Generate(&context, TextRequest(), &response).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  grpc::ClientContext stream_context;
  stream_context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  const auto reader = inference_->GenerateStream(&stream_context, TextRequest());
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  engine_->AwaitLive(0);
  EXPECT_EQ(engine_->num_tokens(), 0);
}

TEST_F(GrpcTest, PeerThatDoesNotReadIsCancelled) {
  // Tokens of text without end, a peer that reads nothing, and room for little: the flow-control window fills first.
  Start({.engine = EngineLimits(1 << 22)}, {}, 1024);
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  const auto channel = grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(frontend_->port()),
                                                 grpc::InsecureChannelCredentials(), arguments);
  const auto stub = vllm::Inference::NewStub(channel);
  grpc::ClientContext context;
  vllm::GenerateRequest request = TextRequest();
  request.mutable_stopping()->set_max_new_tokens(1 << 21);
  request.mutable_response()->mutable_output_candidates()->set_top_n(20);
  const auto reader = stub->GenerateStream(&context, request);
  engine_->AwaitSubmitted(1);
  engine_->AwaitLive(0);
  EXPECT_LT(engine_->num_tokens(), 1 << 21);
  EXPECT_EQ(service_->is_ready(), true);
}

struct BadRequest {
  std::string field;
  std::function<void(vllm::GenerateRequest&)> spoil;
  grpc::StatusCode code = grpc::StatusCode::UNIMPLEMENTED;
};

TEST_F(GrpcTest, WhatIsNotSupportedIsNamed) {
  Start();
  using R = vllm::GenerateRequest;
  constexpr auto kInvalid = grpc::StatusCode::INVALID_ARGUMENT;
  const std::vector<BadRequest> bad = {
      {"prompt", [](R& r) { r.clear_prompt(); }, kInvalid},
      {"session_id", [](R& r) { r.set_session_id("s"); }},
      {"lora_name", [](R& r) { r.set_lora_name("l"); }},
      {"media", [](R& r) { r.add_media()->set_url("http://x"); }, kInvalid},
      {"decoding.presence_penalty", [](R& r) { r.mutable_decoding()->set_presence_penalty(1); }},
      {"decoding.frequency_penalty", [](R& r) { r.mutable_decoding()->set_frequency_penalty(1); }},
      {"decoding.repetition_penalty", [](R& r) { r.mutable_decoding()->set_repetition_penalty(1.5); }},
      {"decoding.logit_bias", [](R& r) { (*r.mutable_decoding()->mutable_logit_bias())[1] = 1; }},
      {"decoding.allowed_token_ids", [](R& r) { r.mutable_decoding()->add_allowed_token_ids(1); }},
      {"decoding.json", [](R& r) { r.mutable_decoding()->set_json("{}"); }},
      {"decoding.regex", [](R& r) { r.mutable_decoding()->set_regex("a"); }},
      {"decoding.choice", [](R& r) { r.mutable_decoding()->mutable_choice()->add_choices("a"); }},
      {"decoding.grammar", [](R& r) { r.mutable_decoding()->set_grammar("g"); }},
      {"decoding.json_object", [](R& r) { r.mutable_decoding()->set_json_object(true); }},
      {"decoding.structural_tag", [](R& r) { r.mutable_decoding()->set_structural_tag("t"); }},
      {"kv.kv_transfer_params", [](R& r) { r.mutable_kv()->mutable_kv_transfer_params(); }},
      {"kv.ec_transfer_params", [](R& r) { r.mutable_kv()->mutable_ec_transfer_params(); }},
      {"response.prompt_logprobs", [](R& r) { r.mutable_response()->set_prompt_logprobs(true); }},
      {"response.prompt_candidates", [](R& r) { r.mutable_response()->mutable_prompt_candidates(); }},
      {"response.output_candidates.all",
       [](R& r) { r.mutable_response()->mutable_output_candidates()->set_all(true); }},
      {"response.output_candidates.token_ids",
       [](R& r) { r.mutable_response()->mutable_output_candidates()->mutable_token_ids(); }},
      {"token_ids", [](R& r) { r.mutable_token_ids()->add_ids(4'000'000'000U); }, kInvalid},
      {"temperature", [](R& r) { r.set_temperature(-1); }, kInvalid},
      {"sampling.top_p", [](R& r) { r.mutable_sampling()->set_top_p(1.5); }, kInvalid},
      {"sampling.min_p", [](R& r) { r.mutable_sampling()->set_min_p(-1); }, kInvalid},
      {"sampling.num_sequences", [](R& r) { r.mutable_sampling()->set_num_sequences(1000); }, kInvalid},
      {"stopping.stop_strings", [](R& r) { r.mutable_stopping()->add_stop_strings(""); }, kInvalid},
      {"stopping.min_new_tokens", [](R& r) { r.mutable_stopping()->set_min_new_tokens(21); }, kInvalid},
      {"response.output_candidates.top_n",
       [](R& r) { r.mutable_response()->mutable_output_candidates()->set_top_n(21); }, kInvalid},
  };
  for (const BadRequest& each : bad) {
    vllm::GenerateRequest request = TextRequest();
    each.spoil(request);
    grpc::ClientContext context;
    const auto reader = inference_->GenerateStream(&context, request);
    vllm::GenerateResponse response;
    EXPECT_FALSE(reader->Read(&response)) << each.field;
    const grpc::Status status = reader->Finish();
    EXPECT_EQ(status.error_code(), each.code) << each.field << ": " << status.error_message();
    EXPECT_THAT(status.error_message(), ::testing::StartsWith(each.field + ":"));
    EXPECT_EQ(GenerateStatus(request).error_code(), each.code) << each.field;
  }
  EXPECT_TRUE(engine_->submitted().empty());
}

TEST_F(GrpcTest, CodesOfTheInterface) {
  EngineOptions limits = EngineLimits(64);
  limits.max_num_seqs = 1;
  limits.max_queued_requests = 0;
  Start({.engine = limits, .gate_is_open = false});
  vllm::GenerateRequest request = TextRequest();
  request.set_model("third");
  EXPECT_EQ(GenerateStatus(request).error_code(), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(GenerateStatus(TextRequest(std::string(100, 'x'))).error_code(), grpc::StatusCode::OUT_OF_RANGE);

  request = TextRequest();
  request.set_model("second");
  request.set_request_id("mine");
  grpc::ClientContext context;
  const auto reader = inference_->GenerateStream(&context, request);
  engine_->AwaitLive(1);
  EXPECT_EQ(GenerateStatus(request).error_code(), grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(GenerateStatus(TextRequest()).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);

  engine_->Fail(absl::InternalError("a broken kernel"));
  vllm::GenerateResponse response;
  while (reader->Read(&response)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(GenerateStatus(TextRequest()).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
}

TEST_F(GrpcTest, RequestIdComesFromTheMetadata) {
  Start({.gate_is_open = false});
  grpc::ClientContext context;
  context.AddMetadata("x-request-id", "from-metadata");
  const auto reader = inference_->GenerateStream(&context, TextRequest());
  engine_->AwaitLive(1);
  service_->Abort("from-metadata");
  vllm::GenerateResponse last;
  for (vllm::GenerateResponse response; reader->Read(&response);) last = response;
  EXPECT_EQ(last.outputs().finish_info().finish_reason(), vllm::FinishInfo::ABORTED);
  EXPECT_TRUE(reader->Finish().ok());
}

TEST_F(GrpcTest, TenantIsTheFairnessMetadataElseTheKey) {
  Start({.script = TextScript("a")}, {.api_keys = {"first", "second"}});
  for (const bool has_header : {false, true}) {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer second");
    if (has_header) context.AddMetadata("x-llm-d-inference-fairness-id", "d");
    vllm::GenerateResponse response;
    EXPECT_TRUE(inference_->Generate(&context, TextRequest(), &response).ok());
    EXPECT_EQ(engine_->submitted().back().tenant, has_header ? "d" : "key-2");
  }
}

TEST_F(GrpcTest, KeysGuardInferenceButNotHealth) {
  Start({.script = TextScript("a")}, {.api_keys = {"key-1", "key-2"}});
  const auto with_header = [&](const std::string& header) {
    grpc::ClientContext context;
    if (!header.empty()) context.AddMetadata("authorization", header);
    vllm::GenerateResponse response;
    return inference_->Generate(&context, TextRequest(), &response).error_code();
  };
  EXPECT_EQ(with_header("Bearer key-1"), grpc::StatusCode::OK);
  EXPECT_EQ(with_header("Bearer key-2"), grpc::StatusCode::OK);
  for (const char* wrong : {"", "Bearer ", "Bearer key", "Bearer key-3", "Bearer key-11", "key-1", "Basic key-1"}) {
    EXPECT_EQ(with_header(wrong), grpc::StatusCode::UNAUTHENTICATED) << wrong;
  }
  EXPECT_EQ(Check("vllm.Inference"), HealthCheckResponse::SERVING);
}

TEST_F(GrpcTest, ControlAsksForTheAdminKey) {
  Start({}, {.api_keys = {"user"}, .admin_api_key = "admin"});
  const auto call = [&](const std::string& key, vllm::ServerInfo* info) {
    grpc::ClientContext context;
    if (!key.empty()) context.AddMetadata("authorization", "Bearer " + key);
    return control_->GetServerInfo(&context, {}, info).error_code();
  };
  vllm::ServerInfo info;
  EXPECT_EQ(call("", &info), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(call("user", &info), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(call("admin", &info), grpc::StatusCode::OK);
  EXPECT_EQ(info.max_model_len(), 4096U);
  EXPECT_EQ(info.kv_block_size(), 16U);
  EXPECT_EQ(info.total_kv_blocks(), 100U);
  EXPECT_EQ(info.parallelism().world_size(), 1U);
  EXPECT_FALSE(info.instance_id().empty());
  grpc::ClientContext context;
  context.AddMetadata("authorization", "Bearer admin");
  vllm::ModelInfo model;
  ASSERT_TRUE(control_->GetModelInfo(&context, {}, &model).ok());
  EXPECT_EQ(model.served_model_name(), "first");
  EXPECT_THAT(model.served_model_aliases(), ElementsAre("second"));
  EXPECT_TRUE(model.supports_token_ids_input());
}

TEST_F(GrpcTest, ControlWithoutAnAdminKeyNamesTheFlag) {
  Start();
  grpc::ClientContext context;
  vllm::ServerInfo info;
  const grpc::Status status = control_->GetServerInfo(&context, {}, &info);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNIMPLEMENTED);
  EXPECT_THAT(status.error_message(), HasSubstr("--admin-api-key"));
}

TEST_F(GrpcTest, HealthFollowsDraining) {
  Start({.gate_is_open = false});
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("vllm.Inference"), HealthCheckResponse::SERVING);
  grpc::ClientContext unknown_context;
  HealthCheckRequest request;
  HealthCheckResponse response;
  request.set_service("unknown");
  EXPECT_EQ(health_->Check(&unknown_context, request, &response).error_code(), grpc::StatusCode::NOT_FOUND);

  grpc::ClientContext watch_context;
  request.set_service("vllm.Inference");
  const auto watch = health_->Watch(&watch_context, request);
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);

  grpc::ClientContext context;
  const auto running = inference_->GenerateStream(&context, TextRequest());
  engine_->AwaitLive(1);
  std::thread drain([this] { service_->Drain(absl::InfiniteFuture()); });
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check("vllm.Inference"), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);
  EXPECT_EQ(GenerateStatus(TextRequest()).error_code(), grpc::StatusCode::UNAVAILABLE);

  engine_->OpenGate();
  vllm::GenerateResponse last;
  for (vllm::GenerateResponse piece; running->Read(&piece);) last = piece;
  EXPECT_EQ(last.outputs().finish_info().finish_reason(), vllm::FinishInfo::LENGTH);
  EXPECT_TRUE(running->Finish().ok());
  drain.join();
  frontend_->Stop(absl::Now() + absl::Hours(1));  // ends the watch
  EXPECT_FALSE(watch->Read(&response));
  EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(GrpcTest, WatchOfAnUnknownServiceStaysOpen) {
  Start();
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service("unknown");
  const auto watch = health_->Watch(&context, request);
  HealthCheckResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  context.TryCancel();
  EXPECT_FALSE(watch->Read(&response));
}

TEST_F(GrpcTest, FailAllEndsStreamsOfAStalledEngine) {
  Start({.gate_is_open = false});
  grpc::ClientContext context;
  const auto reader = inference_->GenerateStream(&context, TextRequest());
  engine_->AwaitLive(1);
  engine_->Stall();
  service_->FailAll(absl::InternalError("the engine has failed"));
  vllm::GenerateResponse response;
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::INTERNAL);
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
  engine_->Resume();
}

TEST_F(GrpcTest, StopCancelsWhatIsLeftAtTheDeadline) {
  Start({.gate_is_open = false});
  grpc::ClientContext context;
  const auto reader = inference_->GenerateStream(&context, TextRequest());
  engine_->AwaitLive(1);
  frontend_->Stop(absl::Now());
  vllm::GenerateResponse response;
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_FALSE(reader->Finish().ok());
  engine_->AwaitLive(0);
}

TEST_F(GrpcTest, TwoServersCannotShareAPort) {
  Start();
  FrontendOptions options;
  options.port = frontend_->port();
  const auto second = MakeGrpcFrontend(*service_, options);
  EXPECT_TRUE(absl::IsUnavailable(second.status()));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(std::to_string(options.port)));
}

// What a reflection client is told about `list_services`, as bytes: the messages have no installed header.
std::string ListedServices(const std::shared_ptr<grpc::Channel>& channel) {
  grpc::GenericStub stub(channel);
  grpc::CompletionQueue queue;
  const auto await = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  grpc::ClientContext context;
  const auto call =
      stub.PrepareCall(&context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
  call->StartCall(nullptr);
  EXPECT_TRUE(await());
  const grpc::Slice list_services(std::string("\x3a\x00", 2));  // field 7, an empty string
  call->Write(grpc::ByteBuffer(&list_services, 1), nullptr);
  EXPECT_TRUE(await());
  grpc::ByteBuffer answer;
  call->Read(&answer, nullptr);
  EXPECT_TRUE(await());
  call->WritesDone(nullptr);
  EXPECT_TRUE(await());
  grpc::Status status;
  call->Finish(&status, nullptr);
  EXPECT_TRUE(await());
  EXPECT_TRUE(status.ok()) << status.error_message();
  grpc::Slice bytes;
  EXPECT_TRUE(answer.DumpToSingleSlice(&bytes).ok());
  return {reinterpret_cast<const char*>(bytes.begin()), bytes.size()};
}

TEST_F(GrpcTest, ReflectionListsTheServices) {
  Start();
  const std::string listed = ListedServices(channel_);
  EXPECT_THAT(listed, HasSubstr("vllm.Inference"));
  EXPECT_THAT(listed, HasSubstr("vllm.Control"));
  EXPECT_THAT(listed, HasSubstr("grpc.health.v1.Health"));
}

TEST_F(GrpcTest, OverLargeMessagesAreRefused) {
  Start({}, {.max_body_bytes = 4096});
  EXPECT_EQ(GenerateStatus(TextRequest(std::string(8192, 'x'))).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(GenerateStatus(TextRequest()).ok());
}

}  // namespace
}  // namespace spillway
