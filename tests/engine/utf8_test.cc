#include "engine/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace spillway {
namespace {

std::string Repair(const std::vector<std::string>& pieces) {
  Utf8Repair repair;
  std::string text;
  for (const std::string& piece : pieces) {
    repair.Push(piece, text);
    EXPECT_FALSE(FindInvalidUtf8(text).has_value());
  }
  repair.Flush(text);
  return text;
}

TEST(Utf8, EveryCodePointRoundTrips) {
  for (char32_t code_point = 0; code_point < 0x110000; ++code_point) {
    if (code_point >= 0xd800 && code_point < 0xe000) continue;
    std::string text;
    AppendUtf8(code_point, text);
    std::size_t offset = 0;
    ASSERT_EQ(NextCodePoint(text, offset), code_point);
    ASSERT_EQ(offset, text.size());
    ASSERT_FALSE(FindInvalidUtf8(text).has_value());
    for (std::size_t cut = 1; cut < text.size(); ++cut) ASSERT_EQ(FindInvalidUtf8(text.substr(0, cut)), 0U);
  }
}

TEST(Utf8, FindsTheFirstIllFormedByte) {
  EXPECT_EQ(FindInvalidUtf8(""), std::nullopt);
  EXPECT_EQ(FindInvalidUtf8("ab\xff"), 2U);
  EXPECT_EQ(FindInvalidUtf8("\xc3\xa9\x80"), 2U);
  EXPECT_EQ(FindInvalidUtf8("\xc0\xaf"), 0U);          // overlong
  EXPECT_EQ(FindInvalidUtf8("\xe0\x80\x80"), 0U);      // overlong
  EXPECT_EQ(FindInvalidUtf8("x\xed\xa0\x80"), 1U);     // surrogate
  EXPECT_EQ(FindInvalidUtf8("\xf4\x90\x80\x80"), 0U);  // beyond U+10FFFF
  EXPECT_EQ(FindInvalidUtf8(std::string("a\0b", 3)), std::nullopt);
}

// Unicode 15, section 3.9, tables 3-8 to 3-11.
TEST(Utf8, RepairsMaximalSubparts) {
  const auto signs = [](std::string_view shape) {
    std::string text;
    for (const char c : shape) text += c == '?' ? "\ufffd" : std::string(1, c);
    return text;
  };
  EXPECT_EQ(Repair({"\xc0\xaf\xe0\x80\xbf\xf0\x81\x82\x41"}), signs("????????A"));
  EXPECT_EQ(Repair({"\xed\xa0\x80\xed\xbf\xbf\xed\xaf\x41"}), signs("????????A"));
  EXPECT_EQ(Repair({"\xf4\x91\x92\x93\xff\x41\x80\xbf\x42"}), signs("?????A??B"));
  EXPECT_EQ(Repair({"\xe1\x80\xe2\xf0\x91\x92\xf1\xbf\x41"}), signs("????A"));
  EXPECT_EQ(Repair({"\xf0\x9f\x98"}), signs("?"));
}

TEST(Utf8, RepairDoesNotDependOnTheCuts) {
  std::mt19937 random(7);
  const std::string alphabet("a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xed\xa0\xf4\x90\xff\xe0\x80\xbf\xc0", 20);
  for (int round = 0; round < 20000; ++round) {
    std::string bytes;
    for (std::size_t i = 0, size = random() % 12; i < size; ++i) bytes += alphabet[random() % alphabet.size()];
    std::vector<std::string> pieces;
    for (std::size_t at = 0; at < bytes.size();) {
      const std::size_t size = random() % 4;
      pieces.push_back(bytes.substr(at, size));
      at += size;
    }
    ASSERT_EQ(Repair(pieces), Repair({bytes})) << "round " << round;
  }
}

}  // namespace
}  // namespace spillway
