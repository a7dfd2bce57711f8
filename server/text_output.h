#pragma once

// Tokens of one choice -> text for its client: decoding, stop strings, held-back text.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/tokenizer.h"

namespace spillway {

struct TextOptions {
  SkipSpecial skip_special = SkipSpecial::kYes;
  std::vector<std::string> stop;  // none empty
  bool include_stop = false;      // the stop string or stop token stays in the text
  std::int32_t min_tokens = 0;    // no stop string ends before this many tokens
};

// The stop string that is completed first (the longest of those that end together) ends the text, however the text was
// cut into tokens. Text that may begin a stop string is held back. Not thread-safe.
class TextOutput {
 public:
  TextOutput(const Tokenizer& tokenizer, TextOptions options);

  // The output continues this prompt: what a decoder does only to the first token of a text is not done to the
  // output's. Once, before the first Push.
  void Continue(std::span<const std::int32_t> prompt);
  // The text that one more token releases.
  std::string Push(std::int32_t token);
  // The rest, when the sequence has ended by itself.
  std::string Flush();
  // The stop string that ended the text; nothing may be pushed after it.
  const std::optional<std::string>& stop() const { return stop_; }

 private:
  // One stop string, matched byte by byte (Knuth-Morris-Pratt): linear whatever the strings are.
  struct Matcher {
    explicit Matcher(std::string pattern);
    bool Advance(char byte);  // true: the text so far ends with the pattern

    std::string pattern;
    std::vector<std::size_t> borders;  // [n]: longest proper border of the first n bytes
    std::size_t matched = 0;           // longest prefix that the text ends with
  };

  std::string Release(std::string_view text);

  StreamDecoder decoder_;
  std::vector<Matcher> matchers_;
  const bool include_stop_;
  const std::int32_t min_tokens_;
  std::int32_t num_tokens_ = 0;
  std::string held_;
  std::optional<std::string> stop_;
};

}  // namespace spillway
