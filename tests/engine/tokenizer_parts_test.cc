// The components of tokenizer.json one by one, against what the documentation of Hugging Face's tokenizers says.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "engine/json_file.h"
#include "engine/pretokenizer.h"
#include "engine/tokenizer_decoder.h"
#include "engine/tokenizer_normalizer.h"
#include "engine/tokenizer_pattern.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<std::string> Cut(const json& description, const std::string& text, bool begins_text = true) {
  const auto pretokenizer = Pretokenizer::FromJson(&description, "test");
  EXPECT_TRUE(pretokenizer.ok()) << pretokenizer.status();
  CutText cut{text, {{0, text.size(), begins_text}}};
  const absl::Status status = pretokenizer->Apply(cut);
  EXPECT_TRUE(status.ok()) << status;
  std::vector<std::string> pieces;
  for (const Piece& piece : cut.pieces) pieces.push_back(cut.text.substr(piece.begin, piece.end - piece.begin));
  return pieces;
}

std::string Normalize(const json& description, std::string text) {
  const auto normalizer = Normalizer::FromJson(&description, "test");
  EXPECT_TRUE(normalizer.ok()) << normalizer.status();
  const absl::Status status = normalizer->Apply(text);
  EXPECT_TRUE(status.ok()) << status;
  return text;
}

std::string Decode(const json& description, const std::vector<std::string>& spellings) {
  const auto decoder = TokenDecoder::FromJson(description.is_null() ? nullptr : &description, "test");
  EXPECT_TRUE(decoder.ok()) << decoder.status();
  TokenDecoder::Progress progress;
  std::string text;
  for (const std::string& spelling : spellings) decoder->Push(spelling, progress, text);
  decoder->Flush(progress, text);
  return text;
}

json Split(const char* pattern, const char* behavior, bool invert = false) {
  return {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", behavior}, {"invert", invert}};
}

TEST(Pretokenizer, SplitsByEveryBehavior) {
  const std::string text = "the-final--countdown";
  EXPECT_THAT(Cut(Split("-", "Removed"), text), ElementsAre("the", "final", "countdown"));
  EXPECT_THAT(Cut(Split("-", "Isolated"), text), ElementsAre("the", "-", "final", "-", "-", "countdown"));
  EXPECT_THAT(Cut(Split("-", "MergedWithPrevious"), text), ElementsAre("the-", "final-", "-", "countdown"));
  EXPECT_THAT(Cut(Split("-", "MergedWithNext"), text), ElementsAre("the", "-final", "-", "-countdown"));
  EXPECT_THAT(Cut(Split("-", "Contiguous"), text), ElementsAre("the", "-", "final", "--", "countdown"));
  EXPECT_THAT(Cut(Split("[a-z]+", "Removed", /*invert=*/true), text), ElementsAre("the", "final", "countdown"));
  EXPECT_THAT(Cut(Split("x*", "Isolated"), "abxc"), ElementsAre("a", "b", "x", "c"));
  EXPECT_THAT(Cut({{"type", "Split"}, {"pattern", {{"String", "."}}}, {"behavior", "Removed"}}, "a.b"),
              ElementsAre("a", "b"));
  EXPECT_THAT(Cut(Split(".", "Removed"), "ab"), IsEmpty());
}

TEST(Pretokenizer, ByteLevelSpellsBytesAsLetters) {
  EXPECT_THAT(Cut({{"type", "ByteLevel"}, {"add_prefix_space", false}}, "It's 12 \u00e9!\n\n x"),
              ElementsAre("It", "'s", "\u012012", "\u0120\u00c3\u00a9", "!", "\u010a\u010a", "\u0120x"));
  EXPECT_THAT(Cut({{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", false}}, "a b"),
              ElementsAre("\u0120a\u0120b"));
  EXPECT_THAT(Cut({{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", false}}, " a"),
              ElementsAre("\u0120a"));
}

TEST(Pretokenizer, MetaspaceMarksSpaces) {
  const auto metaspace = [](const char* scheme, bool split) {
    return json{{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", scheme}, {"split", split}};
  };
  EXPECT_THAT(Cut(metaspace("always", true), "Hey  you"), ElementsAre("\u2581Hey", "\u2581", "\u2581you"));
  EXPECT_THAT(Cut(metaspace("always", true), " Hey"), ElementsAre("\u2581Hey"));
  EXPECT_THAT(Cut(metaspace("never", false), "Hey you"), ElementsAre("Hey\u2581you"));
  EXPECT_THAT(Cut(metaspace("first", false), "Hey"), ElementsAre("\u2581Hey"));
  EXPECT_THAT(Cut(metaspace("first", false), "Hey", /*begins_text=*/false), ElementsAre("Hey"));
  const json words = {{"type", "Sequence"},
                      {"pretokenizers", {{{"type", "WhitespaceSplit"}}, metaspace("first", false)}}};
  EXPECT_THAT(Cut(words, "a b"), ElementsAre("\u2581a", "b"));
  EXPECT_THAT(Cut({{"type", "Metaspace"}, {"add_prefix_space", false}}, "a"), ElementsAre("a"));
}

TEST(Pretokenizer, CutsByClassOfCharacter) {
  EXPECT_THAT(Cut({{"type", "Digits"}, {"individual_digits", true}}, "a12\u0663"),
              ElementsAre("a", "1", "2", "\u0663"));
  EXPECT_THAT(Cut({{"type", "Digits"}}, "a12b3"), ElementsAre("a", "12", "b", "3"));
  EXPECT_THAT(Cut({{"type", "Punctuation"}}, "Hi, you$!"), ElementsAre("Hi", ",", " you", "$", "!"));
  EXPECT_THAT(Cut({{"type", "Whitespace"}}, "Hi, y_1\u00e9 -- x"), ElementsAre("Hi", ",", "y_1\u00e9", "--", "x"));
  EXPECT_THAT(Cut({{"type", "WhitespaceSplit"}}, " Hi,\u3000you\n"), ElementsAre("Hi,", "you"));
}

TEST(Pattern, SpacesAreThoseOfUnicode) {
  // U+180E has not been white space since Unicode 6.3; the regex library's own \s still holds it.
  EXPECT_THAT(Cut(Split("\\s", "Removed"), "a\u0085b\u2028c\u180e"), ElementsAre("a", "b", "c\u180e"));
  EXPECT_THAT(Cut(Split("[^\\S\\n]", "Removed"), "a b\nc"), ElementsAre("a", "b\nc"));
  EXPECT_THAT(Cut(Split("[]x[:digit:]]", "Removed"), "a]b1c"), ElementsAre("a", "b", "c"));
}

TEST(Pattern, RefusesWhatItCannotRead) {
  EXPECT_EQ(Pattern::Regex("[a-z&&[aeiou]]").status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(Pattern::Regex("[a[bc]]").status().code(), absl::StatusCode::kUnimplemented);
  for (const std::string& source :
       {std::string("("), std::string("[a"), std::string("[[:alpha"), std::string("a{2,1}"), std::string("\\"),
        std::string("\\C"), std::string(300, '('), std::string(100000, 'a')}) {
    EXPECT_EQ(Pattern::Regex(source).status().code(), absl::StatusCode::kInvalidArgument) << source.substr(0, 20);
  }
}

TEST(Pattern, GivesUpOnEndlessBacktracking) {
  const auto pattern = Pattern::Regex("(?:a|aa|aaa)+$");
  ASSERT_TRUE(pattern.ok()) << pattern.status();
  std::vector<Span> spans;
  const std::string text = std::string(60, 'a') + "b";
  EXPECT_EQ(pattern->Cut(text, 0, text.size(), spans).code(), absl::StatusCode::kInvalidArgument);
}

TEST(Pattern, TakesLongRuns) {
  const auto pattern = Pattern::Regex("\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+");
  ASSERT_TRUE(pattern.ok()) << pattern.status();
  const std::string text = std::string(1 << 20, ' ') + "x";
  std::vector<Span> spans;
  const absl::Status status = pattern->Cut(text, 0, text.size(), spans);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(spans.size(), 3U);
}

TEST(Normalizer, AppliesEveryKind) {
  EXPECT_EQ(Normalize({{"type", "NFC"}}, "e\u0301 \ufb01"), "\u00e9 \ufb01");
  EXPECT_EQ(Normalize({{"type", "NFD"}}, "\u00e9"), "e\u0301");
  EXPECT_EQ(Normalize({{"type", "NFKC"}}, "\ufb01\u2167"), "fiVIII");
  EXPECT_EQ(Normalize({{"type", "NFKD"}}, "\u00bd"), "1\u20442");
  EXPECT_EQ(Normalize({{"type", "Lowercase"}}, "\u00c9\u0130\u03a3 x"), "\u00e9i\u0307\u03c3 x");
  EXPECT_EQ(Normalize({{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}}, "\u3000 a b\n"), "a b");
  EXPECT_EQ(Normalize({{"type", "Strip"}, {"strip_left", false}, {"strip_right", true}}, " a "), " a");
  EXPECT_EQ(Normalize({{"type", "Strip"}, {"strip_left", true}, {"strip_right", false}}, "  "), "");
  EXPECT_EQ(Normalize({{"type", "Prepend"}, {"prepend", "\u2581"}}, "a"), "\u2581a");
  EXPECT_EQ(Normalize({{"type", "Prepend"}, {"prepend", "\u2581"}}, ""), "");
  EXPECT_EQ(Normalize({{"type", "Replace"}, {"pattern", {{"String", "."}}}, {"content", "$0"}}, "a.b"), "a$0b");
  EXPECT_EQ(Normalize({{"type", "Replace"}, {"pattern", {{"Regex", " {2,}"}}}, {"content", " "}}, "a   b c"), "a b c");
  EXPECT_EQ(
      Normalize(
          json::parse(R"({"type":"Sequence","normalizers":[{"type":"Lowercase"},{"type":"Prepend","prepend":"X"}]})"),
          "A"),
      "Xa");
}

TEST(TokenDecoder, DecodesEveryKind) {
  EXPECT_EQ(Decode(nullptr, {"a", "b"}), "a b");
  EXPECT_EQ(Decode({{"type", "ByteLevel"}}, {"\u0120Hi", "\u00c3", "\u00a9", "<x y>"}), " Hi\u00e9<x y>");
  EXPECT_EQ(Decode({{"type", "ByteFallback"}}, {"<0xC3>", "<0xa9>", "<0xZZ>", "<0x1>"}), "\u00e9<0xZZ><0x1>");
  EXPECT_EQ(Decode({{"type", "Metaspace"}}, {"\u2581a", "\u2581b\u2581"}), "a b ");
  EXPECT_EQ(Decode({{"type", "Metaspace"}, {"prepend_scheme", "never"}}, {"\u2581a"}), " a");
  EXPECT_EQ(Decode({{"type", "Strip"}, {"content", "_"}, {"start", 1}, {"stop", 2}}, {"__a___", "_"}), "_a_");
  EXPECT_EQ(Decode({{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}}, {"\u2581a", "b"}),
            " ab");
  const json strips = json::parse(R"({"type":"Sequence","decoders":[{"type":"Fuse"},
                                      {"type":"Strip","content":" ","start":2,"stop":1}]})");
  EXPECT_EQ(Decode(strips, {" ", "  a", " ", " "}), " a ");
  EXPECT_EQ(Decode(strips, {" ", "a"}), "a");
}

TEST(TokenizerParts, NameWhatIsNotBuilt) {
  const auto message = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
    return std::string(status.message());
  };
  for (const char* type : {"BertNormalizer", "Precompiled", "Nmt", "StripAccents"}) {
    const json description = {{"type", type}};
    EXPECT_THAT(message(Normalizer::FromJson(&description, "w").status()), HasSubstr(type));
  }
  for (const char* type : {"BertPreTokenizer", "UnicodeScripts"}) {
    const json description = {{"type", "Sequence"}, {"pretokenizers", {{{"type", type}}}}};
    EXPECT_THAT(message(Pretokenizer::FromJson(&description, "w").status()), HasSubstr(type));
  }
  for (const char* type : {"WordPiece", "CTC", "BPEDecoder"}) {
    const json description = {{"type", type}};
    EXPECT_THAT(message(TokenDecoder::FromJson(&description, "w").status()), HasSubstr(type));
  }
  const json late = json::parse(R"({"type":"Sequence","decoders":[{"type":"Fuse"},{"type":"ByteFallback"}]})");
  EXPECT_THAT(message(TokenDecoder::FromJson(&late, "w").status()), HasSubstr("ByteFallback behind"));
}

TEST(TokenizerParts, RefuseBrokenDescriptions) {
  for (const char* text :
       {"{}", "[]", "7", R"({"type":7})", R"({"type":"Sequence"})", R"({"type":"Sequence","normalizers":[1]})",
        R"({"type":"Prepend","prepend":1})", R"({"type":"Replace"})", R"({"type":"Replace","pattern":{},"content":""})",
        R"({"type":"Replace","pattern":{"String":"a","Regex":"a"},"content":""})",
        R"({"type":"Replace","pattern":{"Regex":"("},"content":""})", R"({"type":"Strip","strip_left":"yes"})"}) {
    const json description = json::parse(text);
    EXPECT_FALSE(Normalizer::FromJson(&description, "w").ok()) << text;
  }
  for (const char* text :
       {"{}", R"({"type":"Sequence","pretokenizers":{}})", R"({"type":"Split"})",
        R"({"type":"Split","pattern":{"String":"a"}})",
        R"({"type":"Split","pattern":{"String":"a"},"behavior":"Joined"})",
        R"({"type":"Split","pattern":"a","behavior":"Isolated"})", R"({"type":"Metaspace","prepend_scheme":"often"})",
        R"({"type":"Punctuation","behavior":"x"})", R"({"type":"Digits","individual_digits":1})"}) {
    const json description = json::parse(text);
    EXPECT_FALSE(Pretokenizer::FromJson(&description, "w").ok()) << text;
  }
  for (const char* text : {"{}", R"({"type":"Sequence"})", R"({"type":"Strip"})", R"({"type":"Strip","content":""})",
                           R"({"type":"Strip","content":"a","start":-1})", R"({"type":"Replace","content":"a"})",
                           R"({"type":"Metaspace","replacement":""})"}) {
    const json description = json::parse(text);
    EXPECT_FALSE(TokenDecoder::FromJson(&description, "w").ok()) << text;
  }
}

TEST(JsonFile, BoundsNestingSizeAndKind) {
  EXPECT_TRUE(ParseJson(std::string(kMaxJsonDepth, '[') + std::string(kMaxJsonDepth, ']'), "w").ok());
  EXPECT_THAT(std::string(ParseJson(std::string(100000, '['), "w").status().message()), HasSubstr("nested 100000"));
  EXPECT_TRUE(ParseJson("\"" + std::string(100000, '[') + "\\\"[\"", "w").ok());
  const TempFolder folder;
  folder.Write("a.json", "{\"a\":1}");
  EXPECT_TRUE(ReadJsonFile(folder.File("a.json"), 7).ok());
  EXPECT_THAT(std::string(ReadJsonFile(folder.File("a.json"), 6).status().message()), HasSubstr("limit is 6"));
  EXPECT_EQ(ReadJsonFile(folder.path(), 6).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadJsonFile(folder.File("b.json"), 6).status().code(), absl::StatusCode::kNotFound);
}

TEST(JsonFile, MessagesAreShortLines) {
  const absl::Status status = ParseJson("{\"a\": \"" + std::string(100000, 'x') + "\n\x01", "w").status();
  EXPECT_LT(status.message().size(), 300U);
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
}

}  // namespace
}  // namespace spillway
