// Seeded damage to valid tokenizer.json, tokenizer_config.json, config.json and generation_config.json: an error, or
// something that works.

#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/model_config.h"
#include "engine/tokenizer.h"
#include "engine/utf8.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/mutate.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using nlohmann::json;

// Small, and every component is in it.
json EverythingTokenizer() {
  return json::parse(R"json({
    "added_tokens":[{"id":20,"content":"<s>","special":true,"normalized":false},
                    {"id":21,"content":"B","single_word":true,"lstrip":true,"rstrip":true,"normalized":true}],
    "normalizer":{"type":"Sequence","normalizers":[{"type":"NFKC"},{"type":"Strip","strip_left":true,"strip_right":false},
      {"type":"Prepend","prepend":"▁"},{"type":"Replace","pattern":{"Regex":" +"},"content":"▁"},{"type":"Lowercase"}]},
    "pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Digits","individual_digits":true},
      {"type":"Split","pattern":{"Regex":"[^\\s\\p{L}]+|\\s+(?!\\S)"},"behavior":"MergedWithNext","invert":false},
      {"type":"Punctuation","behavior":"Contiguous"},
      {"type":"Metaspace","replacement":"▁","prepend_scheme":"first","split":true},
      {"type":"ByteLevel","add_prefix_space":true,"use_regex":true}]},
    "post_processor":{"type":"Sequence","processors":[{"type":"ByteLevel"},{"type":"TemplateProcessing",
      "single":[{"SpecialToken":{"id":"<s>"}},{"Sequence":{"id":"A"}}],"special_tokens":{"<s>":{"ids":[20]}}}]},
    "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
      {"type":"Strip","content":"a","start":1,"stop":0},{"type":"ByteFallback"},{"type":"Fuse"},
      {"type":"Strip","content":" ","start":1,"stop":1}]},
    "model":{"type":"BPE","dropout":null,"unk_token":"u","fuse_unk":true,"byte_fallback":true,"ignore_merges":true,
      "vocab":{"a":0,"b":1,"ab":2,"u":3,"<0xC3>":4,"<0xA9>":5,"Ġ":6,"Ġa":7,"▁":8,"1":9,"!":10,"é":11,"aba":12},
      "merges":["a b",["Ġ","a"],"ab a"]}})json");
}

json ByteLevelTokenizer() {
  const TempFolder folder;
  EXPECT_TRUE(WriteByteTokenizer(folder.path(), 258).ok());
  std::ifstream file(folder.File("tokenizer.json"));
  return json::parse(file);
}

void UseIt(const Tokenizer& tokenizer) {
  const std::string texts[] = {"", "ab aba  <s> B é1!?\n\t x", "\u3000é\u0301\U0001f600''s"};
  for (const std::string& text : texts) {
    for (const SpecialTokens special : {SpecialTokens::kAdd, SpecialTokens::kAddToPlainText}) {
      const auto ids = tokenizer.Encode(text, special);
      if (!ids.ok()) continue;
      for (const SkipSpecial skip : {SkipSpecial::kYes, SkipSpecial::kNo}) {
        const std::string whole = tokenizer.Decode(*ids, skip);
        ASSERT_FALSE(FindInvalidUtf8(whole).has_value());
        StreamDecoder decoder(tokenizer, skip);
        std::string streamed;
        for (const std::int32_t id : *ids) streamed += decoder.Push(id);
        ASSERT_EQ(streamed + decoder.Flush(), whole);
      }
    }
  }
  for (std::int32_t id = -1; id < 30; ++id) {
    // Bytes come only from a spelling.
    ASSERT_TRUE(!tokenizer.TokenText(id).empty() || tokenizer.TokenBytes(id).empty());
  }
}

int CountAccepted(const json& valid, std::uint32_t seed, int rounds) {
  const TempFolder folder;
  Mutator mutator(seed);
  const std::string text = valid.dump();
  int num_accepted = 0;
  for (int round = 0; round < rounds; ++round) {
    folder.Write("tokenizer.json", round % 3 == 0 ? mutator.Bytes(text) : mutator.Document(valid).dump());
    const auto tokenizer = Tokenizer::Load(folder.path());
    if (!tokenizer.ok()) continue;
    ++num_accepted;
    UseIt(**tokenizer);
  }
  return num_accepted;
}

TEST(FuzzTokenizer, DamagedFiles) {
  EXPECT_GT(CountAccepted(EverythingTokenizer(), 1, 3000), 300);
  EXPECT_GT(CountAccepted(ByteLevelTokenizer(), 2, 600), 60);
}

TEST(FuzzTokenizer, DamagedSettings) {
  const TempFolder folder;
  ASSERT_TRUE(WriteByteTokenizer(folder.path(), 258).ok());
  std::ifstream file(folder.File("tokenizer_config.json"));
  const json valid = json::parse(file);
  Mutator mutator(3);
  for (int round = 0; round < 500; ++round) {
    folder.Write("tokenizer_config.json",
                 round % 2 == 0 ? mutator.Bytes(valid.dump()) : mutator.Document(valid).dump());
    const auto tokenizer = Tokenizer::Load(folder.path());
    if (tokenizer.ok()) UseIt(**tokenizer);
  }
}

TEST(FuzzTokenizer, TextThatIsNotUtf8IsRefusedOrEncoded) {
  const TempFolder folder;
  folder.Write("tokenizer.json", EverythingTokenizer().dump());
  const auto tokenizer = Tokenizer::Load(folder.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  Mutator mutator(4);
  for (int round = 0; round < 5000; ++round) {
    const std::string text = mutator.Bytes("ab \u00e9\u4e2d<s>\U0001f600 B  1!");
    EXPECT_EQ((*tokenizer)->Encode(text, SpecialTokens::kAdd).ok(), !FindInvalidUtf8(text).has_value());
  }
}

TEST(FuzzModelConfig, DamagedConfigs) {
  const TempFolder folder;
  const json valid = json::parse(RandomLlamaConfig(RandomLlamaOptions()));
  Mutator mutator(5);
  for (int round = 0; round < 4000; ++round) {
    folder.Write("config.json", round % 2 == 0 ? mutator.Bytes(valid.dump()) : mutator.Document(valid).dump());
    const auto config = ReadModelConfig(folder.path());
    if (!config.ok()) continue;
    EXPECT_GT(config->num_layers, 0);
    EXPECT_EQ(config->num_heads % config->num_kv_heads, 0);
    EXPECT_EQ(config->head_dim % 2, 0);
    EXPECT_LT(config->bos_token, config->vocab);
    for (const std::int32_t token : config->eos_tokens) EXPECT_TRUE(token >= 0 && token < config->vocab);
  }
}

TEST(FuzzModelConfig, DamagedGenerationConfigs) {
  const TempFolder folder;
  const json valid = {
      {"temperature", 0.6}, {"top_p", 0.9}, {"top_k", 20}, {"max_new_tokens", 9}, {"eos_token_id", {1, 2}}};
  Mutator mutator(6);
  for (int round = 0; round < 2000; ++round) {
    folder.Write("generation_config.json",
                 round % 2 == 0 ? mutator.Bytes(valid.dump()) : mutator.Document(valid).dump());
    const auto defaults = ReadGenerationDefaults(folder.path());
    if (!defaults.ok()) continue;
    EXPECT_GE(defaults->temperature.value_or(0.0F), 0.0F);
  }
}

}  // namespace
}  // namespace spillway
