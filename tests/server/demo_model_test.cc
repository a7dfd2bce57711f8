// The built-in demo model through the engine: it answers from a long document, and only from it.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "server/await_generation.h"
#include "server/engine_host.h"

namespace spillway {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

class DemoModel : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    Options options;  // no model is named
    options.cache.kv_cache_memory_bytes = 64 << 20;
    auto made = MakeEngineHost(options, {});
    ASSERT_TRUE(made.ok()) << made.status();
    host_ = new EngineHost(*std::move(made));
  }
  static void TearDownTestSuite() {
    delete host_;
    host_ = nullptr;
  }

  // Two documents of about 2,000 tokens that were never trained on, with 20 questions each. By
  //   bench/demo_model/documents.py --style varied --tokenizer deploy/demo_model --tokens 1936 --documents 2 --seed 5
  static std::vector<json> Documents() {
    std::ifstream file(SPILLWAY_SOURCE_DIR "/tests/server/demo_model_documents.jsonl");
    std::vector<json> documents;
    for (std::string line; std::getline(file, line);) documents.push_back(json::parse(line));
    return documents;
  }

  static std::string Say(const std::string& message) {
    GenerationRequest request;
    request.prompt = host_->chat_template->Render({{"user", message}}, /*add_generation_prompt=*/true).value();
    request.special_tokens = SpecialTokens::kNone;
    request.temperature = 0;
    request.max_tokens = 32;
    const auto result = AwaitGeneration(*host_->service, std::move(request));
    return result.ok() ? result->choices.front().text : result.status().ToString();
  }

  static int CountRight(const std::string& text, const json& questions) {
    int right = 0;
    for (const json& question : questions) {
      const std::string answer = Say(absl::StrCat(text, "\n", question["question"].get<std::string>()));
      right += absl::StripAsciiWhitespace(answer) == question["answer"].get<std::string>() ? 1 : 0;
    }
    return right;
  }

  static EngineHost* host_;
};

EngineHost* DemoModel::host_ = nullptr;

TEST_F(DemoModel, AnswersFromALongDocument) {
  const std::vector<json> documents = Documents();
  ASSERT_EQ(documents.size(), 2);
  for (const json& document : documents) {
    ASSERT_EQ(document["questions"].size(), 20);
    EXPECT_GE(CountRight(document["text"], document["questions"]), 18);
  }
}

TEST_F(DemoModel, CannotAnswerWhatIsCutOut) {
  for (const json& document : Documents()) {
    std::string text = document["text"];
    for (const json& question : document["questions"]) {
      text = absl::StrReplaceAll(text, {{question["sentence"].get<std::string>(), ""}});
    }
    EXPECT_LE(CountRight(text, document["questions"]), 3);
  }
}

TEST_F(DemoModel, GreetsAndSaysWhatItIs) {
  EXPECT_THAT(Say("Hello!"), HasSubstr("Hello!"));
  EXPECT_THAT(Say("Who are you?"), HasSubstr("I am the small demo model of Spillway."));
}

}  // namespace
}  // namespace spillway
