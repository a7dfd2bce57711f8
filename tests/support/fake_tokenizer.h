#pragma once

// A tokenizer without files: every byte is a token, beside a few longer ones and the specials, so that tokens may be
// half a code point or hold several.

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/tokenizer.h"

namespace spillway {

inline constexpr std::int32_t kFakeBos = 256;
inline constexpr std::int32_t kFakeEos = 257;
inline constexpr std::int32_t kFakeEmojiHead = 258;  // F0 9F
inline constexpr std::int32_t kFakeEmojiTail = 259;  // 98 80
inline constexpr std::int32_t kFakeWord = 260;       // " world"
inline constexpr std::int32_t kFakeKanji = 261;      // 世界
inline constexpr std::int32_t kFakeMixed = 262;      // "END" and the first byte of é
inline constexpr std::int32_t kFakeFirstExtra = 263;
inline constexpr std::int32_t kFakeVocab = 280;  // ids past the last extra one are unknown

class FakeTokenizer : public Tokenizer {
 public:
  // `extra_specials` become special tokens from kFakeFirstExtra on.
  explicit FakeTokenizer(const std::vector<std::string>& extra_specials = {}) {
    for (int byte = 0; byte < 256; ++byte) pieces_.emplace_back(1, static_cast<char>(byte));
    for (const char* text : {"<s>", "</s>", "\xF0\x9F", "\x98\x80", " world", "\u4e16\u754c", "END\xC3"}) {
      pieces_.emplace_back(text);
    }
    pieces_.insert(pieces_.end(), extra_specials.begin(), extra_specials.end());
  }

  absl::StatusOr<std::vector<std::int32_t>> Encode(std::string_view text, SpecialTokens special) const override {
    if (const std::size_t valid = ValidPrefix(text); valid != text.size()) {
      return absl::InvalidArgumentError(absl::StrCat("invalid UTF-8 at byte ", valid));
    }
    std::vector<std::int32_t> tokens;
    if (special == SpecialTokens::kAdd) tokens.push_back(kFakeBos);
    while (!text.empty()) {
      std::int32_t token = static_cast<unsigned char>(text.front());
      for (std::int32_t id = 256; id < known(); ++id) {
        if (IsSpecial(id) && text.starts_with(piece(id))) token = id;
      }
      tokens.push_back(token);
      text.remove_prefix(piece(token).size());
    }
    return tokens;
  }

  std::string Decode(std::span<const std::int32_t> tokens, SkipSpecial skip) const override {
    std::string bytes;
    for (const std::int32_t token : tokens) {
      if (skip == SkipSpecial::kNo || !IsSpecial(token)) bytes += TokenBytes(token);
    }
    std::string text;
    for (std::string_view rest = bytes; !rest.empty();) {
      const std::size_t valid = ValidPrefix(rest);
      text.append(rest.substr(0, valid));
      rest.remove_prefix(valid);
      if (rest.empty()) break;
      text += "\uFFFD";
      rest.remove_prefix(CodePointPrefix(rest).first);
    }
    return text;
  }

  std::string TokenBytes(std::int32_t token) const override { return std::string(TokenText(token)); }
  std::string_view TokenText(std::int32_t token) const override {
    return token >= 0 && token < known() ? piece(token) : std::string_view();
  }
  bool IsSpecial(std::int32_t token) const override {
    return token == kFakeBos || token == kFakeEos || (token >= kFakeFirstExtra && token < known());
  }
  std::optional<std::int32_t> Find(std::string_view token) const override {
    const auto found = std::ranges::find(pieces_, token);
    if (found == pieces_.end()) return std::nullopt;
    return static_cast<std::int32_t>(found - pieces_.begin());
  }
  std::int32_t vocab_size() const override { return kFakeVocab; }
  std::optional<std::int32_t> bos_token() const override { return kFakeBos; }
  std::optional<std::int32_t> eos_token() const override { return kFakeEos; }
  std::string_view chat_template() const override { return {}; }

  // {bytes of the longest well-formed beginning of one code point, whether it is a whole one}; at least 1 byte.
  static std::pair<std::size_t, bool> CodePointPrefix(std::string_view text) {
    const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
    const unsigned char lead = byte(0);
    if (lead < 0x80) return {1, true};
    const std::size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
    if (lead < 0xC2 || lead > 0xF4) return {1, false};
    const unsigned char low = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const unsigned char high = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    for (std::size_t i = 1; i < length; ++i) {
      if (i >= text.size() || byte(i) < (i == 1 ? low : 0x80) || byte(i) > (i == 1 ? high : 0xBF)) return {i, false};
    }
    return {length, true};
  }

  static std::size_t ValidPrefix(std::string_view text) {
    std::size_t valid = 0;
    while (valid < text.size()) {
      const auto [length, is_whole] = CodePointPrefix(text.substr(valid));
      if (!is_whole) break;
      valid += length;
    }
    return valid;
  }

 private:
  std::int32_t known() const { return static_cast<std::int32_t>(pieces_.size()); }
  std::string_view piece(std::int32_t token) const { return pieces_[static_cast<std::size_t>(token)]; }

  std::vector<std::string> pieces_;
};

}  // namespace spillway
