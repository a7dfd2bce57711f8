// The constructed recall model (bench/demo_model: weights written down, not learned) through the engine: it answers
// from a long document exactly, and only from the document. Retrieval, KV blocks, prefix hits and restores are all on
// the way of an answer.

#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/tokenizer.h"
#include "gtest/gtest.h"
#include "tests/support/engine_harness.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::CollectingSink;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kLengths[] = {1000};
#else
constexpr int kLengths[] = {1000, 4000, 16000};
#endif

void RunScript(const std::string& script_and_arguments) {
  const std::string command = "python3 " SPILLWAY_SOURCE_DIR "/bench/demo_model/" + script_and_arguments;
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
}

class ConstructedRecall : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = folder_holder_.path() + "/model";
    RunScript("constructed.py --seed 7 --out " + folder_);
    absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Load(folder_);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }

  nlohmann::json Document(int tokens, const std::string& more = "") {
    const std::string path = folder_holder_.path() + "/document.jsonl";
    RunScript("documents.py --style plain --questions 20 --seed 11 --tokens " + std::to_string(tokens) + " " + more +
              " --out " + path);
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return nlohmann::json::parse(line);
  }

  SequenceRequest Ask(const nlohmann::json& document, const nlohmann::json& question) const {
    const std::string prompt = document["before"].get<std::string>() + question["question"].get<std::string>() +
                               document["after"].get<std::string>();
    SequenceRequest request = MakeRequest(*tokenizer_->Encode(prompt, SpecialTokens::kNone), 12);
    request.sampling.ignore_eos = false;
    return request;
  }

  // How many of the questions are answered exactly. The first is asked alone, so that the others find its document
  // cached.
  int NumRight(Rig& rig, const nlohmann::json& document) const {
    const auto& questions = document["questions"];
    int right = 0;
    const auto count = [&](const Collected& collected, const nlohmann::json& question) {
      EXPECT_TRUE(collected.error.ok()) << collected.error;
      const std::string answer = tokenizer_->Decode(collected.ids(), SkipSpecial::kYes);
      const std::string expected = question["answer"];
      right += answer.substr(answer.find_first_not_of(' ') == std::string::npos ? 0 : answer.find_first_not_of(' ')) ==
                       expected
                   ? 1
                   : 0;
    };
    count(rig.RunOne(Ask(document, questions[0])), questions[0]);
    std::vector<SequenceRequest> rest;
    for (std::size_t i = 1; i < questions.size(); ++i) rest.push_back(Ask(document, questions[i]));
    const std::vector<Collected> answers = rig.Run(std::move(rest));
    for (std::size_t i = 0; i < answers.size(); ++i) count(answers[i], questions[i + 1]);
    return right;
  }

  TempFolder folder_holder_;
  std::string folder_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(ConstructedRecall, AnswersEveryQuestionAndNoneWithoutItsNeedle) {
  EngineOptions options;
  options.max_model_len = 32768;
  options.max_num_batched_tokens = 1024;
  options.kv_cache_bytes = 2500 * Rig::BlockBytes(folder_);
  for (const int tokens : kLengths) {
    SCOPED_TRACE(tokens);
    Rig rig = Rig::Make(folder_, options);
    EXPECT_EQ(NumRight(rig, Document(tokens)), 20);
    EXPECT_EQ(NumRight(rig, Document(tokens, "--remove-needles")), 0);
  }
}

// Two documents that do not fit the device tier together take turns: each question brings its document up from the host
// tier.
TEST_F(ConstructedRecall, AnswersSurviveTheHostTier) {
  const int tokens = kLengths[0];
  EngineOptions options;
  options.max_model_len = 2048;
  options.max_num_batched_tokens = 256;
  options.kv_cache_bytes = 90 * Rig::BlockBytes(folder_);  // one document is about 64 blocks
  Rig rig = Rig::Make(folder_, options, {}, DTypeChoice::kAuto, nullptr, [](Device& device, const KvLayout& layout) {
    constexpr std::uint32_t kBlocks = 1000;
    return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, kBlocks * layout.block_bytes()),
                        {.block_bytes = layout.block_bytes(), .num_blocks = kBlocks, .verify = KvVerify::kOn});
  });
  const nlohmann::json first = Document(tokens);
  const nlohmann::json second = Document(tokens, "--remove-needles");
  for (int round = 0; round < 3; ++round) {
    EXPECT_EQ(NumRight(rig, first), 20);
    EXPECT_EQ(NumRight(rig, second), 0);
  }
  rig.engine.reset();
  EXPECT_GT(rig.host->stats().hits, 50) << "nothing came up from the host tier";
}

}  // namespace
}  // namespace spillway
