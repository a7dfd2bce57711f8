// Real tokenizers against ids that other implementations made, and the trained model's text.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "engine/tokenizer.h"
#include "tests/support/shared_data.h"

namespace spillway {
namespace {

using Ids = std::vector<std::int32_t>;

std::string ReadText(const std::string& path) {
  const std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::vector<std::string> SplitBy(const std::string& text, const std::string& separator) {
  std::vector<std::string> parts;
  std::size_t begin = 0;
  for (std::size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + separator.size()) {
    parts.push_back(text.substr(begin, end - begin));
  }
  parts.push_back(text.substr(begin));
  return parts;
}

std::string Stream(const Tokenizer& tokenizer, const Ids& ids, SkipSpecial skip) {
  StreamDecoder decoder(tokenizer, skip);
  std::string text;
  for (const std::int32_t id : ids) text += decoder.Push(id);
  return text + decoder.Flush();
}

class RealTokenizer : public ::testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(RealTokenizer, PassesItsVectors) {
  SPILLWAY_SHARED_OR_SKIP(root, "tokenizers");
  const auto loaded = Tokenizer::Load(root + "/" + GetParam().first);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Tokenizer& tokenizer = **loaded;
  const std::string vectors = root + "/vectors/" + GetParam().second;
  const auto texts = SplitBy(ReadText(vectors + ".inp"), "\n__ggml_vocab_test__\n");
  const auto lines = SplitBy(ReadText(vectors + ".out"), "\n");
  ASSERT_EQ(texts.size(), 47U);
  ASSERT_EQ(lines.size(), texts.size());
  for (std::size_t i = 0; i < texts.size(); ++i) {
    std::istringstream line(lines[i]);
    Ids wanted;
    for (std::int32_t id; line >> id;) wanted.push_back(id);
    const auto ids = tokenizer.Encode(texts[i], SpecialTokens::kNone);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, wanted) << "case " << i << ": " << texts[i];
    const std::string text = tokenizer.Decode(*ids, SkipSpecial::kNo);
    EXPECT_EQ(text, texts[i]) << "case " << i;
    EXPECT_EQ(Stream(tokenizer, *ids, SkipSpecial::kNo), text) << "case " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Shared, RealTokenizer,
                         ::testing::Values(std::pair("llama3", "llama-bpe"), std::pair("qwen2", "qwen2"),
                                           std::pair("gpt2", "gpt-2"), std::pair("llama2", "llama-spm")),
                         [](const auto& test) { return std::string(test.param.first); });

TEST(RealTokenizers, AddAndKnowSpecialTokens) {
  SPILLWAY_SHARED_OR_SKIP(root, "tokenizers");
  const auto llama = Tokenizer::Load(root + "/llama3");
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_EQ(*(*llama)->Encode("Hi<|eot_id|>", SpecialTokens::kAdd), (Ids{128000, 13347, 128009}));
  EXPECT_TRUE((*llama)->IsSpecial(128009));
  EXPECT_EQ((*llama)->Decode(Ids{128000, 13347, 128009}, SkipSpecial::kYes), "Hi");
  EXPECT_EQ((*llama)->vocab_size(), 128256);

  const auto llama2 = Tokenizer::Load(root + "/llama2");
  ASSERT_TRUE(llama2.ok()) << llama2.status();
  EXPECT_EQ((*llama2)->bos_token(), 1);
  EXPECT_EQ((*llama2)->eos_token(), 2);
  EXPECT_EQ((*llama2)->Encode("", SpecialTokens::kAdd)->size(), 1U);
}

class TrainedModel : public ::testing::Test {
 protected:
  void SetUp() override {
    SPILLWAY_SHARED_OR_SKIP(root, "models/stories260K");
    auto loaded = Tokenizer::Load(root + "/hf");
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    tokenizer_ = *std::move(loaded);
    golden_ = nlohmann::json::parse(ReadText(root + "/golden.json"));
  }

  std::unique_ptr<Tokenizer> tokenizer_;
  nlohmann::json golden_;
};

TEST_F(TrainedModel, EncodesTheGoldenTexts) {
  ASSERT_EQ(golden_["encode"].size(), 18U);
  for (const nlohmann::json& item : golden_["encode"]) {
    const auto text = item["text"].get<std::string>();
    const auto ids = tokenizer_->Encode(text, SpecialTokens::kAddToPlainText);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, item["ids"].get<Ids>()) << text;
    EXPECT_EQ(tokenizer_->Decode(*ids, SkipSpecial::kYes), text);
    // Only one case has special tokens written in it.
    if (text == "<s>hi</s>") continue;
    EXPECT_EQ(*tokenizer_->Encode(text, SpecialTokens::kAdd), *ids) << text;
  }
  EXPECT_EQ(*tokenizer_->Encode("<s>hi</s>", SpecialTokens::kAdd), (Ids{1, 1, 270, 417, 2}));
}

TEST_F(TrainedModel, DecodesTheGoldenOutputs) {
  ASSERT_EQ(golden_["generate"].size(), 6U);
  for (const nlohmann::json& run : golden_["generate"]) {
    const Ids prompt = *tokenizer_->Encode(run["prompt"].get<std::string>(), SpecialTokens::kAdd);
    EXPECT_EQ(prompt, run["prompt_ids"].get<Ids>());
    const auto output = run["output_ids"].get<Ids>();
    // The text goes on from the prompt: a decoder that has seen the prompt keeps the first word's space.
    StreamDecoder decoder(*tokenizer_, SkipSpecial::kYes);
    std::string before;
    for (const std::int32_t id : prompt) before += decoder.Push(id);
    std::string text;
    for (const std::int32_t id : output) text += decoder.Push(id);
    text += decoder.Flush();
    EXPECT_EQ(before, run["prompt"].get<std::string>());
    EXPECT_EQ(text, run["text"].get<std::string>());
  }
}

TEST_F(TrainedModel, KnowsItsSettings) {
  EXPECT_EQ(tokenizer_->bos_token(), 1);
  EXPECT_EQ(tokenizer_->eos_token(), 2);
  EXPECT_EQ(tokenizer_->vocab_size(), 512);
  EXPECT_THAT(std::string(tokenizer_->chat_template()), ::testing::StartsWith("{{ bos_token }}"));
  EXPECT_EQ(tokenizer_->TokenText(13), "<0x0A>");
  EXPECT_EQ(tokenizer_->TokenBytes(13), "\n");
  EXPECT_EQ(tokenizer_->TokenText(410), "\u2581");
  EXPECT_EQ(tokenizer_->TokenBytes(410), " ");
}

}  // namespace
}  // namespace spillway
