// What the endpoints answer: parameters, shapes, errors.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/server/http_client.h"

namespace spillway {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::StartsWith;

constexpr char kCompletions[] = "/v1/completions";
constexpr char kChat[] = "/v1/chat/completions";

std::string Repeat(const std::string& piece, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += piece;
  return text;
}

class HttpApi : public testing::Test {
 protected:
  void Serve(const std::function<void(TestServer::Options&)>& change = nullptr) {
    server_ = std::make_unique<TestServer>(change);
    client_ = std::make_unique<Client>(server_->frontend->port());
  }
  ClientResponse Post(const char* path, const json& body) { return client_->Post(path, body.dump()); }
  json Complete(const json& body) {
    const ClientResponse response = Post(kCompletions, body);
    EXPECT_EQ(response.status, 200) << response.body;
    return response.Json();
  }
  json Chat(const json& body) {
    const ClientResponse response = Post(kChat, body);
    EXPECT_EQ(response.status, 200) << response.body;
    return response.Json();
  }
  std::vector<json> Stream(const char* path, json body) {
    body["stream"] = true;
    const ClientResponse response = Post(path, body);
    EXPECT_EQ(response.status, 200) << response.body;
    auto events = Events(response.body);
    EXPECT_EQ(events.back(), "[DONE]");
    std::vector<json> parsed;
    for (std::size_t i = 0; i + 1 < events.size(); ++i) parsed.push_back(json::parse(events[i]));
    return parsed;
  }
  static json Talk(const json& content = "Hi") { return {{{"role", "user"}, {"content", content}}}; }

  std::unique_ptr<TestServer> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(HttpApi, Completion) {
  Serve([](auto& options) {
    options.engine.script = TextScript("hello \u00e9\n");
    options.engine.num_cached = 2;
  });
  const json answer = Complete({{"model", "alias"}, {"prompt", "hi"}});
  EXPECT_THAT(answer["id"].get<std::string>(), StartsWith("cmpl-"));
  EXPECT_EQ(answer["object"], "text_completion");
  EXPECT_EQ(answer["model"], "alias");
  EXPECT_TRUE(answer["created"].is_number_integer());
  const json& choice = answer["choices"][0];
  EXPECT_EQ(choice["index"], 0);
  EXPECT_EQ(choice["text"], "hello \u00e9\n");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(choice["stop_reason"].is_null());
  EXPECT_TRUE(choice["logprobs"].is_null());
  EXPECT_EQ(answer["usage"], json::parse(R"({"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13,
                                             "prompt_tokens_details": {"cached_tokens": 2}})"));
  EXPECT_EQ(Complete({{"prompt", "hi"}, {"max_tokens", 2}})["choices"][0]["finish_reason"], "length");
}

TEST_F(HttpApi, MaxTokensDefaults) {
  Serve();
  EXPECT_EQ(Complete({{"prompt", "hi"}})["usage"]["completion_tokens"], 16);
  const json chat = Chat({{"messages", Talk()}});
  EXPECT_EQ(chat["usage"]["total_tokens"], 4096);
  EXPECT_EQ(Chat({{"messages", Talk()}, {"max_tokens", 5}, {"max_completion_tokens", 4}})["usage"]["completion_tokens"],
            4);
}

TEST_F(HttpApi, StopsAndTheirReasons) {
  Serve([](auto& options) { options.engine.script = TextScript("one two!"); });
  json choice = Complete({{"prompt", "hi"}, {"stop", " t"}})["choices"][0];
  EXPECT_EQ(choice["text"], "one");
  EXPECT_EQ(choice["stop_reason"], " t");
  choice = Complete({{"prompt", "hi"}, {"stop", {"zzz", "tw"}}, {"include_stop_str_in_output", true}})["choices"][0];
  EXPECT_EQ(choice["text"], "one tw");
  choice = Complete({{"prompt", "hi"}, {"stop_token_ids", {'!'}}})["choices"][0];
  EXPECT_EQ(choice["text"], "one two");
  EXPECT_EQ(choice["stop_reason"], '!');
}

TEST_F(HttpApi, PromptShapesAndChoiceIndices) {
  Serve();
  EXPECT_EQ(Complete({{"prompt", {104, 105}}})["usage"]["prompt_tokens"], 2);
  for (const json& prompt : {json{"aa", "b"}, json{{97, 97}, {98}}}) {
    const json answer = Complete({{"prompt", prompt}, {"n", 2}, {"add_special_tokens", false}, {"max_tokens", 4}});
    ASSERT_EQ(answer["choices"].size(), 4U);
    EXPECT_EQ(answer["usage"]["prompt_tokens"], 3);
    EXPECT_EQ(answer["usage"]["completion_tokens"], 16);
    for (int i = 0; i < 4; ++i) EXPECT_EQ(answer["choices"][i]["index"], i);
    const json alone = Complete({{"prompt", "b"}, {"n", 2}, {"add_special_tokens", false}, {"max_tokens", 4}});
    EXPECT_EQ(answer["choices"][3]["text"], alone["choices"][1]["text"]);
  }
}

TEST_F(HttpApi, OneRefusedPromptRefusesAll) {
  Serve([](auto& options) { options.engine.gate_is_open = false; });
  const json body = {{"prompt", {"fine", std::string(5000, 'x')}}, {"stream", true}};
  const ClientResponse response = Post(kCompletions, body);
  EXPECT_EQ(response.status, 400);
  server_->engine->AwaitLive(0);
}

TEST_F(HttpApi, Echo) {
  Serve([](auto& options) { options.engine.script = TextScript("!"); });
  EXPECT_EQ(Complete({{"prompt", "hi"}, {"echo", true}})["choices"][0]["text"], "hi!");
  EXPECT_EQ(Complete({{"prompt", {104, 105}}, {"echo", true}})["choices"][0]["text"], "hi!");
  std::string text;
  for (const json& event : Stream(kCompletions, {{"prompt", "hi"}, {"echo", true}}))
    text += event["choices"][0]["text"];
  EXPECT_EQ(text, "hi!");
}

TEST_F(HttpApi, CompletionLogprobs) {
  Serve([](auto& options) { options.engine.script = FixedScript({'a', kFakeKanji, kFakeEmojiHead, kFakeEmojiTail}); });
  const json body = {{"prompt", "hi"}, {"logprobs", 2}};
  const json logprobs = Complete(body)["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["tokens"], json({"a", "世界", "\uFFFD", "\uFFFD\uFFFD", "</s>"}));
  EXPECT_EQ(logprobs["token_logprobs"], json({-0.25, -0.5, -0.75, -1.0, -1.25}));
  EXPECT_EQ(logprobs["text_offset"], json({0, 1, 3, 4, 6}));
  EXPECT_EQ(logprobs["top_logprobs"][0], json({{"a", -0.25}, {"b", -0.75}}));
  EXPECT_EQ(Complete({{"prompt", "hi"}, {"logprobs", 0}})["choices"][0]["logprobs"]["top_logprobs"][0],
            json({{"a", -0.25}}));
  json streamed;
  for (const json& event : Stream(kCompletions, body)) {
    if (event["choices"][0]["logprobs"].is_null()) continue;
    for (const auto& [name, list] : event["choices"][0]["logprobs"].items()) {
      for (const json& item : list) streamed[name].push_back(item);
    }
  }
  EXPECT_EQ(streamed, logprobs);
}

TEST_F(HttpApi, Chat) {
  Serve([](auto& options) { options.engine.script = TextScript("fine"); });
  const json answer = Chat(
      {{"messages",
        {{{"role", "developer"}, {"content", "short"}},
         {{"role", "user"}, {"content", {{{"type", "text"}, {"text", "a"}}, {{"type", "text"}, {"text", "b"}}}}}}}});
  EXPECT_THAT(answer["id"].get<std::string>(), StartsWith("chatcmpl-"));
  EXPECT_EQ(answer["object"], "chat.completion");
  EXPECT_EQ(answer["choices"][0]["message"], json({{"role", "assistant"}, {"content", "fine"}}));
  const auto prompt = server_->engine->submitted()[0].prompt;
  EXPECT_EQ(server_->tokenizer->Decode(prompt, SkipSpecial::kNo), "<s>system: short\nuser: a\nb\nassistant:");

  const auto events = Stream(kChat, {{"messages", Talk()}, {"n", 2}});
  std::vector<std::string> texts(2);
  std::vector<int> roles(2);
  for (const json& event : events) {
    EXPECT_EQ(event["object"], "chat.completion.chunk");
    const json& choice = event["choices"][0];
    const json& delta = choice["delta"];
    if (delta.contains("role")) ++roles[choice["index"]];
    if (delta.contains("content")) texts[choice["index"]] += delta["content"];
  }
  EXPECT_EQ(texts, (std::vector<std::string>{"fine", "fine"}));
  EXPECT_EQ(roles, (std::vector<int>{1, 1}));
  EXPECT_EQ(events[0]["choices"][0]["delta"]["role"], "assistant");
}

TEST_F(HttpApi, ChatLogprobs) {
  Serve([](auto& options) { options.engine.script = FixedScript({kFakeKanji}); });
  json logprobs = Chat({{"messages", Talk()}, {"logprobs", true}, {"top_logprobs", 2}})["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["content"][0]["token"], "世界");
  EXPECT_EQ(logprobs["content"][0]["logprob"], -0.25);
  EXPECT_EQ(logprobs["content"][0]["bytes"], json({0xE4, 0xB8, 0x96, 0xE7, 0x95, 0x8C}));
  EXPECT_EQ(logprobs["content"][0]["top_logprobs"].size(), 2U);
  logprobs = Chat({{"messages", Talk()}, {"logprobs", true}})["choices"][0]["logprobs"];
  EXPECT_EQ(logprobs["content"][0]["top_logprobs"].size(), 0U);
}

TEST_F(HttpApi, StreamedUsage) {
  Serve([](auto& options) { options.engine.script = TextScript("fine"); });
  auto events = Stream(kCompletions, {{"prompt", "hi"}, {"stream_options", {{"include_usage", true}}}});
  EXPECT_EQ(events.back()["choices"], json::array());
  EXPECT_EQ(events.back()["usage"]["completion_tokens"], 5);
  EXPECT_FALSE(events.front().contains("usage"));
  events = Stream(
      kChat, {{"messages", Talk()}, {"stream_options", {{"include_usage", true}, {"continuous_usage_stats", true}}}});
  for (const json& event : events) EXPECT_TRUE(event.contains("usage"));
  EXPECT_EQ(events.front()["usage"]["completion_tokens"], 0);
}

TEST_F(HttpApi, TokenIdsOnRequest) {
  Serve([](auto& options) { options.engine.script = TextScript("ab"); });
  json choice = Complete({{"prompt", "hi"}, {"return_token_ids", true}})["choices"][0];
  EXPECT_EQ(choice["prompt_token_ids"], json({kFakeBos, 'h', 'i'}));
  EXPECT_EQ(choice["token_ids"], json({'a', 'b', kFakeEos}));
  EXPECT_TRUE(Chat({{"messages", Talk()}, {"return_token_ids", true}}).contains("prompt_token_ids"));
  for (const char* path : {kCompletions, kChat}) {
    json tokens = json::array();
    int num_prompts = 0;
    for (const json& event : Stream(path, {{"prompt", "hi"}, {"messages", Talk()}, {"return_token_ids", true}})) {
      num_prompts += event.contains("prompt_token_ids") || event["choices"][0].contains("prompt_token_ids") ? 1 : 0;
      if (!event["choices"][0].contains("token_ids")) continue;
      for (const json& token : event["choices"][0]["token_ids"]) tokens.push_back(token);
    }
    EXPECT_EQ(tokens, json({'a', 'b', kFakeEos}));
    EXPECT_EQ(num_prompts, 1);
  }
}

TEST_F(HttpApi, RequestIds) {
  Serve([](auto& options) { options.engine.gate_is_open = false; });
  client_->SendPost(kCompletions, R"({"prompt": "hi", "request_id": "mine"})");
  server_->engine->AwaitLive(1);
  Client other = server_->Connect();
  const ClientResponse twice = other.Post(kCompletions, R"({"prompt": "hi", "request_id": "mine"})");
  EXPECT_EQ(twice.status, 400);
  EXPECT_EQ(twice.Json()["error"]["param"], "request_id");
  server_->service->Abort("cmpl-mine");
  const ClientResponse aborted = client_->Read();
  EXPECT_EQ(aborted.Json()["choices"][0]["finish_reason"], "abort");
  server_->engine->OpenGate();
  const ClientResponse named = other.Post(kCompletions, R"({"prompt": "hi"})", "X-Request-Id: abc-1\r\n");
  EXPECT_EQ(named.Header("X-Request-Id"), "abc-1");
  EXPECT_EQ(named.Json()["id"], "cmpl-abc-1");
  EXPECT_EQ(other.Post(kCompletions, "{}", "X-Request-Id: abc-2\r\n").Header("X-Request-Id"), "abc-2");
}

TEST_F(HttpApi, TokenizeAndDetokenize) {
  Serve();
  json answer = Post("/tokenize", {{"prompt", "hi"}, {"return_token_strs", true}}).Json();
  EXPECT_EQ(answer["count"], 3);
  EXPECT_EQ(answer["max_model_len"], 4096);
  EXPECT_EQ(answer["tokens"], json({kFakeBos, 'h', 'i'}));
  EXPECT_EQ(answer["token_strs"], json({"<s>", "h", "i"}));
  EXPECT_EQ(Post("/tokenize", {{"prompt", "hi"}, {"add_special_tokens", false}}).Json()["count"], 2);
  EXPECT_EQ(Post("/tokenize", {{"messages", Talk()}, {"add_generation_prompt", false}}).Json()["count"], 10);
  EXPECT_EQ(Post("/detokenize", {{"tokens", {kFakeBos, 'h', kFakeKanji}}}).Json()["prompt"], "<s>h世界");
  for (const auto& [path, body, param] :
       std::vector<std::tuple<const char*, json, const char*>>{{"/tokenize", json::object(), "prompt"},
                                                               {"/tokenize", {{"prompt", 3}}, "prompt"},
                                                               {"/tokenize", {{"messages", "x"}}, "messages"},
                                                               {"/detokenize", {{"tokens", {1, 99999}}}, "tokens"},
                                                               {"/detokenize", {{"tokens", "x"}}, "tokens"},
                                                               {"/detokenize", json::object(), "tokens"}}) {
    const ClientResponse response = Post(path, body);
    EXPECT_EQ(response.status, 400) << path << body;
    EXPECT_EQ(response.Json()["error"]["param"], param) << path << body;
  }
  EXPECT_EQ(Post("/tokenize", {{"prompt", "x"}, {"model", "none"}}).status, 404);
}

TEST_F(HttpApi, SamplingParametersReachTheEngine) {
  Serve();
  Complete({{"prompt", "hi"},
            {"temperature", 0.5},
            {"top_p", 0.9},
            {"min_p", 0.1},
            {"top_k", 5.0},
            {"seed", 42},
            {"min_tokens", 2},
            {"ignore_eos", true},
            {"cache_salt", "s"},
            {"priority", 0},
            {"logprobs", 3},
            {"truncate_prompt_tokens", 2}});
  const SequenceRequest sequence = server_->engine->submitted()[0];
  EXPECT_EQ(sequence.sampling.temperature, 0.5F);
  EXPECT_EQ(sequence.sampling.top_p, 0.9F);
  EXPECT_EQ(sequence.sampling.min_p, 0.1F);
  EXPECT_EQ(sequence.sampling.top_k, 5);
  EXPECT_EQ(sequence.sampling.seed, 42U);
  EXPECT_EQ(sequence.sampling.min_tokens, 2);
  EXPECT_TRUE(sequence.sampling.ignore_eos);
  EXPECT_EQ(sequence.sampling.num_logprobs, 3);
  EXPECT_EQ(sequence.cache_salt, "s");
  EXPECT_EQ(sequence.prompt.size(), 2U);
}

// Every parameter with values of the wrong type: 400 that names it.
TEST_F(HttpApi, WrongTypesAreRefusedByName) {
  Serve();
  const json wrong_bools = {1, "true", {1}, {{"a", 1}}};
  const json wrong_ints = {"1", 1.5, true, {1}, {{"a", 1}}, 18446744073709551615ULL, 1e300};
  const json wrong_numbers = {"1", true, {1}, {{"a", 1}}};
  const json wrong_strings = {1, true, {"a"}, {{"a", 1}}};
  const json wrong_lists = {1, "a", true, {{"a", 1}}, {"a"}, {1, nullptr}};
  const std::vector<std::pair<std::vector<const char*>, json>> both = {
      {{"stream", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "add_special_tokens",
        "return_token_ids", "echo"},
       wrong_bools},
      {{"n", "max_tokens", "min_tokens", "top_k", "seed", "truncate_prompt_tokens", "priority"}, wrong_ints},
      {{"temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "length_penalty"},
       wrong_numbers},
      {{"model", "cache_salt", "request_id"}, wrong_strings},
      {{"stop_token_ids"}, wrong_lists},
      {{"stop"}, {1, true, {1}, {"a", 1}, {{"a", 1}}, {{"a"}}}},
      {{"stream_options"}, {1, "a", true, {1}, json::object()}},
      {{"logit_bias", "allowed_token_ids", "bad_words", "prompt_logprobs", "structured_outputs", "use_beam_search",
        "tools", "guided_json", "kv_transfer_params", "response_format", "logits_processors",
        "spaces_between_special_tokens"},
       {1, "a", {1}, {{"a", 1}}}},
  };
  std::vector<std::tuple<const char*, std::string, json>> cases;
  for (const auto& [names, values] : both) {
    for (const char* name : names) {
      for (const json& value : values) {
        cases.emplace_back(kCompletions, name, value);
        cases.emplace_back(kChat, name, value);
      }
    }
  }
  for (const json& value : wrong_ints) {
    for (const char* name : {"logprobs", "best_of"}) cases.emplace_back(kCompletions, name, value);
    for (const char* name : {"max_completion_tokens", "top_logprobs"}) cases.emplace_back(kChat, name, value);
  }
  for (const json& value : wrong_bools) {
    for (const char* name : {"logprobs", "add_generation_prompt"}) cases.emplace_back(kChat, name, value);
  }
  for (const char* value : {"1", "true", "{}", "[]", "[true]", "[1, \"a\"]", "[\"a\", 1]", "[[\"a\"]]", "[[1], \"a\"]",
                            "[1.5]", "[99999999999]", "[null]", "null"}) {
    cases.emplace_back(kCompletions, "prompt", json::parse(value));
  }
  for (const char* value :
       {"1", "\"a\"", "{}", "[]", "[1]", "[{}]", "[{\"role\": 1}]", "[{\"role\": \"user\"}]", "null",
        "[{\"role\": \"user\", \"content\": 1}]", "[{\"role\": \"user\", \"content\": [1]}]",
        "[{\"role\": \"user\", \"content\": [{\"type\": \"text\"}]}]", "[{\"role\": \"robot\", \"content\": \"x\"}]",
        "[{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": {\"url\": \"x\"}}]}]",
        "[{\"role\": \"assistant\", \"content\": \"x\", \"tool_calls\": [{}]}]"}) {
    cases.emplace_back(kChat, "messages", json::parse(value));
  }
  for (const auto& [path, name, value] : cases) {
    json body = {{"prompt", "hi"}, {"messages", Talk()}, {"max_tokens", 2}};
    body[name] = value;
    const ClientResponse response = Post(path, body);
    ASSERT_EQ(response.status, 400) << path << " " << name << " = " << value << ": " << response.body;
    const json error = response.Json()["error"];
    EXPECT_EQ(error["param"], name) << value;
    EXPECT_EQ(error["type"], "BadRequestError");
    EXPECT_EQ(error["code"], 400);
    EXPECT_THAT(error["message"].get<std::string>(), testing::Not(testing::IsEmpty()));
  }
  EXPECT_TRUE(server_->engine->submitted().empty());
}

TEST_F(HttpApi, WhatIsNotBuiltIsTakenAtItsNeutralValueOnly) {
  Serve();
  json neutral =
      json::parse(R"({"frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": {},
      "allowed_token_ids": null, "bad_words": [], "prompt_logprobs": null, "structured_outputs": null, "use_beam_search": false,
      "length_penalty": 1, "suffix": null, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
      "user": "me", "spaces_between_special_tokens": true, "guided_json": null, "best_of": null, "metadata": {"a": "b"}})");
  neutral.update({{"prompt", "hi"}, {"messages", Talk()}, {"max_tokens", 1}});
  Complete(neutral);
  Chat(neutral);
  EXPECT_THAT(client_->Get("/metrics").body, HasSubstr("http_requests_total"));
  EXPECT_THAT(client_->Get("/metrics").body,
              testing::Not(HasSubstr("unknown_fields_total{engine=\"0\",model_name=\"fake\"} 3")));
  for (const auto& [name, value] :
       std::vector<std::pair<const char*, json>>{{"frequency_penalty", 0.1},
                                                 {"repetition_penalty", 1.1},
                                                 {"logit_bias", {{"1", 2}}},
                                                 {"suffix", "x"},
                                                 {"best_of", 2},
                                                 {"use_beam_search", true},
                                                 {"prompt_logprobs", 0},
                                                 {"response_format", {{"type", "json_object"}}},
                                                 {"tools", {{{"type", "function"}}}},
                                                 {"echo", true}}) {
    const char* path = std::string_view(name) == "echo" ? kChat : kCompletions;
    json body = {{"prompt", "hi"}, {"messages", Talk()}};
    body[name] = value;
    const ClientResponse response = Post(path, body);
    EXPECT_EQ(response.status, 400) << name;
    EXPECT_EQ(response.Json()["error"]["param"], name);
    EXPECT_THAT(response.body, HasSubstr("not supported"));
  }
}

TEST_F(HttpApi, RulesBetweenFields) {
  Serve();
  for (const auto& [path, body, param] : std::vector<std::tuple<const char*, json, const char*>>{
           {kCompletions, {{"stream_options", {{"include_usage", true}}}}, "stream_options"},
           {kCompletions, {{"echo", true}, {"logprobs", 1}}, "echo"},
           {kCompletions, {{"max_tokens", 0}}, "max_tokens"},
           {kCompletions, {{"max_tokens", 5000}}, "max_tokens"},
           {kCompletions, {{"priority", 3}}, "priority"},
           {kCompletions, {{"cache_salt", ""}}, "cache_salt"},
           {kCompletions, {{"logprobs", 21}}, "logprobs"},
           {kCompletions, {{"logprobs", -1}}, "logprobs"},
           {kCompletions, {{"n", 1000000000}}, "n"},
           {kChat, {{"top_logprobs", 3}}, "top_logprobs"},
           {kChat, {{"logprobs", true}, {"top_logprobs", 21}}, "top_logprobs"}}) {
    json whole = {{"prompt", "hi"}, {"messages", Talk()}};
    whole.update(body);
    const ClientResponse response = Post(path, whole);
    EXPECT_EQ(response.status, 400) << body;
    EXPECT_EQ(response.Json()["error"]["param"], param) << body;
  }
  const ClientResponse missing = Post(kCompletions, {{"prompt", "hi"}, {"model", "gpt"}});
  EXPECT_EQ(missing.status, 404);
  EXPECT_EQ(missing.Json()["error"]["type"], "NotFoundError");
  EXPECT_EQ(missing.Json()["error"]["param"], "model");
}

TEST_F(HttpApi, UnknownFieldsAreAcceptedAndCounted) {
  Serve();
  Complete({{"prompt", "hi"}, {"frobnicate", 1}, {"other", nullptr}});
  EXPECT_THAT(client_->Get("/metrics").body,
              HasSubstr("spillway_unknown_fields_total{engine=\"0\",model_name=\"fake\"} 1\n"));
}

TEST_F(HttpApi, BrokenBodies) {
  Serve();
  for (const auto& [body, says] : std::vector<std::pair<std::string, const char*>>{
           {"", "at byte 1"},
           {"{\"prompt\": }", "at byte 12"},
           {"[]", "object, got array"},
           {"3", "object, got number"},
           {"{\"prompt\": \"hi\", \"n\": 1, \"n\": 2}", "n is given twice"},
           {"{\"prompt\": \"hi\", \"stream_options\": {\"x\": 1, \"x\": 2}}", "x is given twice"},
           {"{\"prompt\": \"\xff\"}", "UTF-8"},
           {"{\"prompt\": \"\xed\xa0\x80\"}", "UTF-8"},
           {"{\"prompt\": \"\\ud800\"}", "surrogate"},
           {"{\"prompt\": \"hi\"} x", "at byte 18"},
           {"{\"prompt\": NaN}", "at byte"},
           {std::string(100000, '['), "deeper than 64"},
           {"{\"prompt\": " + std::string(100000, '[') + std::string(100000, ']') + "}", "deeper than 64"},
           {std::string(100000, '{'), "at byte 2"},
           {"{\"x\": [[]" + Repeat(",[]", 1200000) + "]}", "1048576 lists"},
           {"{\"a\": " + std::string(70, '[') + std::string(70, ']') + "}", "deeper than 64"}}) {
    const ClientResponse response = client_->Post(kCompletions, body);
    EXPECT_EQ(response.status, 400) << body.substr(0, 50);
    EXPECT_THAT(response.Json()["error"]["message"].get<std::string>(), HasSubstr(says)) << body.substr(0, 50);
    EXPECT_EQ(response.Json()["error"]["type"], "BadRequestError");
  }
  EXPECT_EQ(client_->Post(kCompletions, R"({"prompt": "hi"})", "Content-Type: text/plain\r\n").status, 200);
}

}  // namespace
}  // namespace spillway
