#include "engine/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_format.h"
#include "tests/support/byte_tokenizer.h"
#include "tests/support/fake_tokenizer.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Ids = std::vector<std::int32_t>;

absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const json& tokenizer, const json& settings = nullptr) {
  const TempFolder folder;
  folder.Write("tokenizer.json", tokenizer.dump());
  if (!settings.is_null()) folder.Write("tokenizer_config.json", settings.dump());
  return Tokenizer::Load(folder.path());
}

std::unique_ptr<Tokenizer> MustLoad(const json& tokenizer, const json& settings = nullptr) {
  auto loaded = Load(tokenizer, settings);
  EXPECT_TRUE(loaded.ok()) << loaded.status();
  return *std::move(loaded);
}

// Byte fallback with a few words, as SentencePiece models have it.
json SentencePieceLike() {
  json tokenizer = json::parse(R"({
    "added_tokens":[{"id":0,"content":"<unk>","special":true,"normalized":false},
                    {"id":1,"content":"<s>","special":true,"normalized":false},
                    {"id":2,"content":"</s>","special":true,"normalized":false}],
    "normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"▁"},
                  {"type":"Replace","pattern":{"String":" "},"content":"▁"}]},
    "post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
                      {"Sequence":{"id":"A","type_id":0}}],"special_tokens":{"<s>":{"id":"<s>","ids":[1],"tokens":["<s>"]}}},
    "decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"▁"},"content":" "},
               {"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},
    "model":{"type":"BPE","unk_token":"<unk>","fuse_unk":true,"byte_fallback":true,
             "vocab":{"<unk>":0,"<s>":1,"</s>":2,"▁":259,"a":260,"b":261,"c":262,"d":263,"▁a":264,"ab":265,"▁ab":266,
                      "é":267,"▁▁":268},
             "merges":["a b","▁ ab","▁ a","▁ ▁"]}})");
  for (int byte = 0; byte < 256; ++byte) tokenizer["model"]["vocab"][absl::StrFormat("<0x%02X>", byte)] = 3 + byte;
  return tokenizer;
}

json ByteLevelLike() {
  const TempFolder folder;
  EXPECT_TRUE(WriteByteTokenizer(folder.path(), 300).ok());
  std::ifstream file(folder.File("tokenizer.json"));
  return json::parse(file);
}

std::string Stream(const Tokenizer& tokenizer, const Ids& ids, SkipSpecial skip) {
  StreamDecoder decoder(tokenizer, skip);
  std::string text;
  for (const std::int32_t id : ids) text += decoder.Push(id);
  return text + decoder.Flush();
}

TEST(Tokenizer, EncodesWithByteFallback) {
  const auto tokenizer = MustLoad(SentencePieceLike());
  EXPECT_THAT(*tokenizer->Encode("ab a", SpecialTokens::kAdd), ElementsAre(1, 266, 264));
  EXPECT_THAT(*tokenizer->Encode("ab a", SpecialTokens::kNone), ElementsAre(266, 264));
  EXPECT_THAT(*tokenizer->Encode("", SpecialTokens::kAdd), ElementsAre(1));
  EXPECT_THAT(*tokenizer->Encode("", SpecialTokens::kNone), IsEmpty());
  EXPECT_THAT(*tokenizer->Encode("\u00e8", SpecialTokens::kNone), ElementsAre(259, 3 + 0xc3, 3 + 0xa8));
  EXPECT_EQ(tokenizer->Decode(Ids{1, 266, 264, 259, 3 + 0xc3, 3 + 0xa8, 2}, SkipSpecial::kYes), "ab a \u00e8");
  EXPECT_EQ(tokenizer->Decode(Ids{1, 266}, SkipSpecial::kNo), "<s> ab");
}

TEST(Tokenizer, RecognisesSpecialTokensUnlessTold) {
  const auto tokenizer = MustLoad(SentencePieceLike());
  EXPECT_THAT(*tokenizer->Encode("a</s>b", SpecialTokens::kNone), ElementsAre(264, 2, 259, 261));
  EXPECT_THAT(*tokenizer->Encode("a</s>", SpecialTokens::kAddToPlainText),
              ElementsAre(1, 264, 3 + '<', 3 + '/', 3 + 's', 3 + '>'));
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8) {
  const auto tokenizer = MustLoad(SentencePieceLike());
  const absl::Status status = tokenizer->Encode("abc\xe2\x82 d", SpecialTokens::kAdd).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("byte 3"));
}

TEST(Tokenizer, AnyTextRoundTripsThroughBytes) {
  const auto tokenizer = MustLoad(ByteLevelLike());
  std::string text = "Tabs\t, nul \0, \u00e9 \u4e2d\u6587 \U0001f600 \r\n end";
  for (char c = 1; c < 0x7f; ++c) text += c;
  const auto ids = tokenizer->Encode(text, SpecialTokens::kAdd);
  ASSERT_TRUE(ids.ok()) << ids.status();
  ASSERT_EQ(ids->size(), text.size() + 1);
  EXPECT_EQ(ids->front(), kByteTokenizerBos);
  for (std::size_t i = 0; i < text.size(); ++i) EXPECT_EQ((*ids)[i + 1], static_cast<unsigned char>(text[i]));
  EXPECT_EQ(tokenizer->Decode(*ids, SkipSpecial::kYes), text);
  EXPECT_EQ(tokenizer->Decode(Ids{299}, SkipSpecial::kYes), " w299");
}

TEST(Tokenizer, UnknownIdsDecodeToNothing) {
  for (const json& description : {SentencePieceLike(), ByteLevelLike()}) {
    const auto tokenizer = MustLoad(description);
    const Ids unknown = {-1, tokenizer->vocab_size(), 1 << 30, INT32_MIN, INT32_MAX};
    EXPECT_EQ(tokenizer->Decode(unknown, SkipSpecial::kNo), "");
    EXPECT_EQ(Stream(*tokenizer, unknown, SkipSpecial::kNo), "");
    for (const std::int32_t id : unknown) {
      EXPECT_EQ(tokenizer->TokenText(id), "");
      EXPECT_EQ(tokenizer->TokenBytes(id), "");
      EXPECT_FALSE(tokenizer->IsSpecial(id));
    }
  }
}

TEST(Tokenizer, TokenBytesMayBeHalfACodePoint) {
  const auto bytes = MustLoad(ByteLevelLike());
  EXPECT_EQ(bytes->TokenBytes(0xc3), "\xc3");
  EXPECT_EQ(bytes->TokenText(' '), "\u0120");
  const auto pieces = MustLoad(SentencePieceLike());
  EXPECT_EQ(pieces->TokenBytes(3 + 0xc3), "\xc3");
  EXPECT_EQ(pieces->TokenBytes(264), " a");
}

TEST(Tokenizer, InvalidBytesBecomeReplacementSigns) {
  const auto tokenizer = MustLoad(SentencePieceLike());
  EXPECT_EQ(tokenizer->Decode(Ids{3 + 0xf0, 3 + 0x9f, 260}, SkipSpecial::kNo), "\ufffda");
  EXPECT_EQ(tokenizer->Decode(Ids{3 + 0xff, 3 + 0x80, 3 + 0xc3}, SkipSpecial::kNo), "\ufffd\ufffd\ufffd");
}

TEST(StreamDecoder, HoldsAnUnfinishedCodePointBack) {
  const auto tokenizer = MustLoad(ByteLevelLike());
  StreamDecoder decoder(*tokenizer, SkipSpecial::kYes);
  EXPECT_EQ(decoder.Push(0xe2), "");
  EXPECT_EQ(decoder.Push(0x82), "");
  EXPECT_EQ(decoder.Push(0xac), "\u20ac");
  EXPECT_EQ(decoder.Push(kByteTokenizerEos), "");
  EXPECT_EQ(decoder.Push(0xe2), "");
  EXPECT_EQ(decoder.Flush(), "\ufffd");
}

TEST(StreamDecoder, StripsOnlyTheFirstSpace) {
  const auto tokenizer = MustLoad(SentencePieceLike());
  StreamDecoder decoder(*tokenizer, SkipSpecial::kYes);
  EXPECT_EQ(decoder.Push(1), "");
  EXPECT_EQ(decoder.Push(268), " ");  // two spaces
  EXPECT_EQ(decoder.Push(264), " a");
}

// Decoders of every kind, with tokens of every kind: pieces equal the whole, and the whole is valid.
TEST(StreamDecoder, PiecesEqualTheWholeForRandomIds) {
  const auto with_decoder = [](json tokenizer, const char* decoder) {
    tokenizer["decoder"] = json::parse(decoder);
    return tokenizer;
  };
  const json base = SentencePieceLike();
  const json descriptions[] = {
      base,
      ByteLevelLike(),
      with_decoder(base, "null"),
      with_decoder(base, R"({"type":"Metaspace","replacement":"▁","prepend_scheme":"always"})"),
      with_decoder(base, R"({"type":"Metaspace","replacement":"▁","prepend_scheme":"never"})"),
      with_decoder(base, R"({"type":"Sequence","decoders":[{"type":"ByteFallback"},{"type":"Fuse"},
                            {"type":"Strip","content":"▁","start":2,"stop":3}]})"),
      with_decoder(base, R"({"type":"Sequence","decoders":[{"type":"Strip","content":"a","start":1,"stop":1},
                            {"type":"Replace","pattern":{"Regex":"▁+"},"content":" "},{"type":"ByteFallback"}]})"),
  };
  std::mt19937 random(3);
  for (const json& description : descriptions) {
    const auto tokenizer = MustLoad(description);
    const auto vocab = static_cast<std::uint32_t>(tokenizer->vocab_size());
    for (int round = 0; round < 400; ++round) {
      Ids ids;
      // Half of the ids from the bytes that make code points, so that some are well-formed.
      for (std::size_t i = 0, size = random() % 24; i < size; ++i) {
        ids.push_back(static_cast<std::int32_t>(random() % 2 == 0 ? random() % (vocab + 3) : 180 + random() % 80));
      }
      for (const SkipSpecial skip : {SkipSpecial::kYes, SkipSpecial::kNo}) {
        const std::string whole = tokenizer->Decode(ids, skip);
        ASSERT_EQ(Stream(*tokenizer, ids, skip), whole) << description["decoder"] << " round " << round;
        ASSERT_EQ(FakeTokenizer::ValidPrefix(whole), whole.size());
      }
    }
  }
}

TEST(StreamDecoder, WorksForATokenizerThatKnowsOnlyBytes) {
  const FakeTokenizer tokenizer;
  EXPECT_EQ(Stream(tokenizer, {'a', kFakeEmojiHead, kFakeEmojiTail, kFakeEos, 0xe2}, SkipSpecial::kYes),
            "a\U0001f600\ufffd");
}

TEST(TokenizerSettings, NameBosEosAndTemplate) {
  const auto tokenizer = MustLoad(
      SentencePieceLike(),
      {{"bos_token", "<s>"}, {"eos_token", {{"content", "</s>"}, {"lstrip", false}}}, {"chat_template", "{{ x }}"}});
  EXPECT_EQ(tokenizer->bos_token(), 1);
  EXPECT_EQ(tokenizer->eos_token(), 2);
  EXPECT_EQ(tokenizer->chat_template(), "{{ x }}");
  EXPECT_EQ(MustLoad(SentencePieceLike())->bos_token(), std::nullopt);
  EXPECT_EQ(MustLoad(SentencePieceLike())->chat_template(), "");
}

TEST(TokenizerSettings, TakeTheTemplateNamedDefault) {
  const json entries = {{{"name", "tool_use"}, {"template", "T"}}, {{"name", "default"}, {"template", "D"}}};
  EXPECT_EQ(MustLoad(SentencePieceLike(), {{"chat_template", entries}})->chat_template(), "D");
  const json others = json::array({{{"name", "tool_use"}, {"template", "T"}}});
  EXPECT_FALSE(Load(SentencePieceLike(), {{"chat_template", others}}).ok());
}

TEST(TokenizerSettings, ATemplateFileComesFirst) {
  const TempFolder folder;
  folder.Write("tokenizer.json", SentencePieceLike().dump());
  folder.Write("tokenizer_config.json", R"({"chat_template":"old"})");
  folder.Write("chat_template.jinja", "new");
  const auto tokenizer = Tokenizer::Load(folder.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->chat_template(), "new");
}

TEST(TokenizerSettings, AddBosAndEosHaveTheLastWord) {
  const auto encode = [](json settings) {
    settings["bos_token"] = "<s>";
    settings["eos_token"] = "</s>";
    return *MustLoad(SentencePieceLike(), settings)->Encode("a", SpecialTokens::kAdd);
  };
  EXPECT_THAT(encode(json::object()), ElementsAre(1, 264));
  EXPECT_THAT(encode({{"add_bos_token", true}}), ElementsAre(1, 264));
  EXPECT_THAT(encode({{"add_bos_token", false}}), ElementsAre(264));
  EXPECT_THAT(encode({{"add_eos_token", true}}), ElementsAre(1, 264, 2));
  EXPECT_THAT(encode({{"add_bos_token", false}, {"add_eos_token", true}}), ElementsAre(264, 2));
}

TEST(Tokenizer, AddsTokensOfSeveralTemplates) {
  json description = SentencePieceLike();
  const json inner = description["post_processor"];
  json outer = inner;
  outer["single"] = json::parse(R"([{"SpecialToken":{"id":"x"}},{"Sequence":{"id":"A"}},{"SpecialToken":{"id":"y"}}])");
  outer["special_tokens"] = {{"x", {{"ids", {7, 8}}}}, {"y", {{"ids", {9}}}}};
  description["post_processor"] = {{"type", "Sequence"}, {"processors", {inner, {{"type", "ByteLevel"}}, outer}}};
  EXPECT_THAT(*MustLoad(description)->Encode("a", SpecialTokens::kAdd), ElementsAre(7, 8, 1, 264, 9));
}

TEST(Tokenizer, AddedTokensTakeSpaceAndWordBoundsIntoAccount) {
  const auto encode = [](const json& flags, const std::string& text) {
    json description = ByteLevelLike();
    json token = {{"id", 400}, {"content", "dog"}, {"normalized", false}};
    token.merge_patch(flags);
    description["added_tokens"].push_back(token);
    return *MustLoad(description)->Encode(text, SpecialTokens::kNone);
  };
  EXPECT_THAT(encode(json::object(), "a dog s"), ElementsAre('a', ' ', 400, ' ', 's'));
  EXPECT_THAT(encode({{"lstrip", true}}, "a \n dog s"), ElementsAre('a', 400, ' ', 's'));
  EXPECT_THAT(encode({{"rstrip", true}}, "a dog\u3000 s"), ElementsAre('a', ' ', 400, 's'));
  EXPECT_THAT(encode({{"lstrip", true}, {"rstrip", true}}, "dog  dog"), ElementsAre(400, 400));
  EXPECT_THAT(encode({{"single_word", true}}, "dogs dog"), ElementsAre('d', 'o', 'g', 's', ' ', 400));
  EXPECT_THAT(encode({{"single_word", true}}, "\u00e9dog"), ElementsAre(0xc3, 0xa9, 'd', 'o', 'g'));
  EXPECT_THAT(encode({{"special", true}}, "dogdog"), ElementsAre(400, 400));
}

TEST(Tokenizer, TheLongestAddedTokenWins) {
  json description = ByteLevelLike();
  for (const auto& [id, text] : {std::pair(400, "<a"), std::pair(401, "<a><b>"), std::pair(402, "<b>")}) {
    description["added_tokens"].push_back({{"id", id}, {"content", text}, {"normalized", false}});
  }
  const auto tokenizer = MustLoad(description);
  EXPECT_THAT(*tokenizer->Encode("<a><b><a><b", SpecialTokens::kNone), ElementsAre(401, 400, '>', '<', 'b'));
  EXPECT_EQ(tokenizer->vocab_size(), 403);
  EXPECT_EQ(tokenizer->Find("<b>"), 402);
  EXPECT_FALSE(tokenizer->IsSpecial(402));
}

TEST(Tokenizer, NormalizedAddedTokensAreFoundInNormalizedText) {
  json description = ByteLevelLike();
  description["normalizer"] = {{"type", "Lowercase"}};
  description["added_tokens"].push_back({{"id", 400}, {"content", "DoG"}, {"normalized", true}});
  description["added_tokens"].push_back({{"id", 401}, {"content", "CaT"}, {"normalized", false}});
  const auto tokenizer = MustLoad(description);
  EXPECT_THAT(*tokenizer->Encode("dOG", SpecialTokens::kNone), ElementsAre(400));
  EXPECT_THAT(*tokenizer->Encode("CAT", SpecialTokens::kNone), ElementsAre('c', 'a', 't'));
  EXPECT_THAT(*tokenizer->Encode("CaT", SpecialTokens::kNone), ElementsAre(401));
}

}  // namespace
}  // namespace spillway
