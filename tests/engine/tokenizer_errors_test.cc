// Broken tokenizer.json and tokenizer_config.json: each is refused with a message that names what is wrong.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "engine/tokenizer.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

absl::Status LoadText(const std::string& text) {
  const TempFolder folder;
  folder.Write("tokenizer.json", text);
  return Tokenizer::Load(folder.path()).status();
}

json Valid() {
  const TempFolder folder;
  EXPECT_TRUE(WriteByteTokenizer(folder.path(), 258).ok());
  std::ifstream file(folder.File("tokenizer.json"));
  return json::parse(file);
}

absl::Status LoadPatched(const char* patch) { return LoadText(Valid().patch(json::parse(patch)).dump()); }

TEST(TokenizerErrors, FilesThatAreNoTokenizer) {
  ASSERT_TRUE(LoadText(Valid().dump()).ok());
  for (const std::string& text :
       {std::string(), std::string("[]"), std::string("null"), std::string("{}"), std::string("{\"model\":1}"),
        std::string("{\"model\":{}}"), Valid().dump().substr(0, 500), std::string(100000, '['),
        std::string(100000, '{'), std::string("{\"model\":\"\xff\"}"), std::string("\0\0\0\0", 4)}) {
    EXPECT_EQ(LoadText(text).code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 30);
  }
  const TempFolder empty;
  EXPECT_EQ(Tokenizer::Load(empty.path()).status().code(), absl::StatusCode::kNotFound);
}

TEST(TokenizerErrors, NamesTheBrokenMember) {
  const std::pair<const char*, const char*> cases[] = {
      {R"([{"op":"remove","path":"/model"}])", "model is missing"},
      {R"([{"op":"replace","path":"/model/type","value":"WordPiece"}])", "WordPiece"},
      {R"([{"op":"remove","path":"/model/vocab"}])", "vocab is missing"},
      {R"([{"op":"replace","path":"/model/vocab/a","value":98}])", "same id 98"},
      {R"([{"op":"replace","path":"/model/vocab/a","value":4194304}])", "the id of 'a' is 4194304"},
      {R"([{"op":"replace","path":"/model/merges","value":["a"]}])", "merge 0"},
      {R"([{"op":"replace","path":"/added_tokens","value":{}}])", "added_tokens: not an array"},
      {R"([{"op":"replace","path":"/added_tokens","value":[1]}])", "without id or content"},
      {R"([{"op":"remove","path":"/added_tokens/0/id"}])", "without id or content"},
      {R"([{"op":"replace","path":"/added_tokens/0/id","value":-1}])", "id is -1"},
      {R"([{"op":"replace","path":"/added_tokens/0/content","value":5}])", "content is 5"},
      {R"([{"op":"replace","path":"/added_tokens/0/lstrip","value":"no"}])", "lstrip is \"no\""},
      {R"([{"op":"replace","path":"/added_tokens/0/id","value":257}])", "was there before"},
      {R"([{"op":"replace","path":"/added_tokens/0/id","value":900}])", "contradicts the vocabulary"},
      {R"([{"op":"replace","path":"/added_tokens/0/content","value":"new"}])", "contradicts the vocabulary"},
      {R"([{"op":"replace","path":"/normalizer","value":{"type":"Precompiled"}}])", "Precompiled"},
      {R"([{"op":"replace","path":"/pre_tokenizer","value":{"type":"BertPreTokenizer"}}])", "BertPreTokenizer"},
      {R"([{"op":"replace","path":"/pre_tokenizer","value":"ByteLevel"}])", "pre_tokenizer (none)"},
      {R"([{"op":"replace","path":"/decoder","value":{"type":"CTC"}}])", "CTC"},
      {R"([{"op":"replace","path":"/post_processor","value":{"type":"BertProcessing"}}])", "BertProcessing"},
      {R"([{"op":"replace","path":"/post_processor","value":{"type":"Sequence"}}])", "list processors"},
      {R"([{"op":"remove","path":"/post_processor/single"}])", "list single"},
      {R"([{"op":"replace","path":"/post_processor/single/0","value":"<s>"}])", "no template item"},
      {R"([{"op":"replace","path":"/post_processor/single/1/Sequence/id","value":"B"}])", "no template item"},
      {R"([{"op":"remove","path":"/post_processor/single/1"}])", "names the text 0 times"},
      {R"([{"op":"remove","path":"/post_processor/special_tokens"}])", "no ids for '<s>'"},
      {R"([{"op":"replace","path":"/post_processor/special_tokens/<s>/ids","value":[-5]}])", "the id -5 of '<s>'"},
  };
  for (const auto& [patch, message] : cases) {
    const absl::Status status = LoadPatched(patch);
    EXPECT_FALSE(status.ok()) << patch;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
    EXPECT_THAT(std::string(status.message()), HasSubstr("tokenizer.json")) << patch;
  }
}

TEST(TokenizerErrors, NamesTheBrokenSetting) {
  const TempFolder folder;
  ASSERT_TRUE(WriteByteTokenizer(folder.path(), 258).ok());
  const std::pair<const char*, const char*> cases[] = {
      {"[]", "not a JSON object"},
      {R"({"bos_token":7})", "bos_token is 7"},
      {R"({"bos_token":"<nowhere>"})", "'<nowhere>' is not in the vocabulary"},
      {R"({"eos_token":{"content":1}})", "content is 1"},
      {R"({"add_bos_token":"yes"})", "add_bos_token is \"yes\""},
      {R"({"chat_template":7})", "chat_template is 7"},
      {R"({"chat_template":[{"name":"default"}]})", "without an entry named default"},
  };
  for (const auto& [settings, message] : cases) {
    folder.Write("tokenizer_config.json", settings);
    const absl::Status status = Tokenizer::Load(folder.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << settings;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

}  // namespace
}  // namespace spillway
