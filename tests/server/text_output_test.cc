#include "server/text_output.h"

#include <gtest/gtest.h>

#include <random>

#include "tests/support/fake_tokenizer.h"

namespace spillway {
namespace {

std::vector<std::int32_t> Bytes(std::string_view text) {
  std::vector<std::int32_t> tokens;
  for (const char byte : text) tokens.push_back(static_cast<unsigned char>(byte));
  return tokens;
}

struct Result {
  std::string text;
  std::optional<std::string> stop;
  std::size_t num_tokens = 0;
  std::vector<std::string> pieces;
};

Result Output(const std::vector<std::int32_t>& tokens, const TextOptions& options) {
  const FakeTokenizer tokenizer;
  TextOutput output(tokenizer, options);
  Result result;
  for (const std::int32_t token : tokens) {
    ++result.num_tokens;
    result.pieces.push_back(output.Push(token));
    if (output.stop()) break;
  }
  if (!output.stop()) result.pieces.push_back(output.Flush());
  for (const std::string& piece : result.pieces) result.text += piece;
  result.stop = output.stop();
  return result;
}

TEST(TextOutput, StopStringAcrossTokensIsCut) {
  const Result result = Output(Bytes("one END two"), {.stop = {"END"}});
  EXPECT_EQ(result.text, "one ");
  EXPECT_EQ(result.stop, "END");
  EXPECT_EQ(result.num_tokens, 7U);
}

TEST(TextOutput, StopStringMayStayInTheText) {
  EXPECT_EQ(Output(Bytes("one END two"), {.stop = {"END"}, .include_stop = true}).text, "one END");
}

TEST(TextOutput, WhatMayBeginAStopStringIsHeldBack) {
  const Result result = Output(Bytes("aEN"), {.stop = {"END"}});
  EXPECT_EQ(result.pieces, (std::vector<std::string>{"a", "", "", "EN"}));
  EXPECT_EQ(Output(Bytes("EENx"), {.stop = {"END"}}).pieces, (std::vector<std::string>{"", "E", "", "ENx", ""}));
}

TEST(TextOutput, TheStopStringCompletedFirstWins) {
  EXPECT_EQ(Output(Bytes("xabcd"), {.stop = {"abcd", "bc"}}).stop, "bc");
  EXPECT_EQ(Output(Bytes("xabcd"), {.stop = {"c", "abc"}}).stop, "abc");  // the longest of those that end together
}

TEST(TextOutput, NoStopStringEndsBeforeMinTokens) {
  const Result result = Output(Bytes("aaaa"), {.stop = {"aa"}, .min_tokens = 3});
  EXPECT_EQ(result.text, "a");
  EXPECT_EQ(result.num_tokens, 3U);
}

TEST(TextOutput, HalfCodePointsWaitForTheRest) {
  const Result result = Output({kFakeEmojiHead, kFakeEmojiTail, kFakeEmojiHead}, {});
  EXPECT_EQ(result.pieces, (std::vector<std::string>{"", "\U0001F600", "", "\uFFFD"}));
}

TEST(TextOutput, StopStringOfSeveralBytesPerCharacter) {
  EXPECT_EQ(Output({kFakeKanji, kFakeEmojiHead, kFakeEmojiTail}, {.stop = {"界\U0001F600"}}).text, "世");
}

TEST(TextOutput, ManyOverlappingStopStringsStayLinear) {
  TextOptions options;
  for (int i = 0; i < 64; ++i) options.stop.push_back(std::string(1000, 'a') + static_cast<char>('b' + i % 20));
  EXPECT_EQ(Output(Bytes(std::string(20000, 'a')), options).text.size(), 20000U);
}

// Against a definition that looks at the whole text: where does the first stop string end?
TEST(TextOutput, EqualsItsDefinitionOnRandomTokens) {
  const FakeTokenizer tokenizer;
  std::mt19937 random(7);
  const std::vector<std::int32_t> alphabet = {
      'a', 'b', 'a', 'b', kFakeEos, kFakeWord, kFakeKanji, kFakeEmojiHead, kFakeEmojiTail, kFakeMixed, 0xA9, 0xFF};
  const std::vector<std::string> stops = {"ab", "aab",        "ba",  "bb",     " wo", "d",
                                          "界", "\U0001F600", "END", "\u00e9", "aaaa"};
  for (int round = 0; round < 5000; ++round) {
    std::vector<std::int32_t> tokens(random() % 12);
    for (std::int32_t& token : tokens) token = alphabet[random() % alphabet.size()];
    TextOptions options{.skip_special = random() % 2 == 0 ? SkipSpecial::kYes : SkipSpecial::kNo,
                        .stop = {},
                        .include_stop = random() % 2 == 0,
                        .min_tokens = static_cast<std::int32_t>(random() % 4)};
    for (std::size_t i = random() % 3; i > 0; --i) options.stop.push_back(stops[random() % stops.size()]);

    std::string whole = tokenizer.Decode(tokens, options.skip_special);
    std::vector<std::size_t> tokens_at(whole.size() + 1, tokens.size());  // tokens needed for the first n bytes
    StreamDecoder decoder(tokenizer, options.skip_special);
    std::size_t length = 0;
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      const std::size_t grown = length + decoder.Push(tokens[i]).size();
      std::fill(tokens_at.begin() + static_cast<std::ptrdiff_t>(length) + 1,
                tokens_at.begin() + static_cast<std::ptrdiff_t>(grown) + 1, i + 1);
      length = grown;
    }
    std::optional<std::string> stop;
    for (std::size_t end = 1; end <= whole.size() && !stop; ++end) {
      if (tokens_at[end] < static_cast<std::size_t>(options.min_tokens)) continue;
      for (const std::string& each : options.stop) {
        if (std::string_view(whole).substr(0, end).ends_with(each) && (!stop || each.size() > stop->size()))
          stop = each;
      }
      if (stop) whole.resize(options.include_stop ? end : end - stop->size());
    }
    const Result result = Output(tokens, options);
    ASSERT_EQ(result.text, whole) << "round " << round;
    ASSERT_EQ(result.stop, stop) << "round " << round;
  }
}

}  // namespace
}  // namespace spillway
