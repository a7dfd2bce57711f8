#include "server/text_output.h"

#include <algorithm>
#include <utility>

namespace spillway {

TextOutput::Matcher::Matcher(std::string text) : pattern(std::move(text)), borders(pattern.size() + 1) {
  for (std::size_t length = 2; length <= pattern.size(); ++length) {
    std::size_t border = borders[length - 1];
    while (border > 0 && pattern[border] != pattern[length - 1]) border = borders[border];
    borders[length] = pattern[border] == pattern[length - 1] ? border + 1 : 0;
  }
}

bool TextOutput::Matcher::Advance(char byte) {
  if (matched == pattern.size()) matched = borders[matched];
  while (matched > 0 && pattern[matched] != byte) matched = borders[matched];
  if (pattern[matched] == byte) ++matched;
  return matched == pattern.size();
}

TextOutput::TextOutput(const Tokenizer& tokenizer, TextOptions options)
    : decoder_(tokenizer, options.skip_special), include_stop_(options.include_stop), min_tokens_(options.min_tokens) {
  matchers_.reserve(options.stop.size());
  for (std::string& stop : options.stop) matchers_.emplace_back(std::move(stop));
}

void TextOutput::Continue(std::span<const std::int32_t> prompt) {
  // The tail is enough for the decoder to be past the beginning and to know a code point that the prompt leaves
  // unfinished.
  constexpr std::size_t kTail = 16;
  for (const std::int32_t token : prompt.last(std::min(prompt.size(), kTail))) decoder_.Push(token);
}

std::string TextOutput::Push(std::int32_t token) {
  ++num_tokens_;
  return Release(decoder_.Push(token));
}

std::string TextOutput::Flush() {
  std::string text = Release(decoder_.Flush());
  if (!stop_) text += std::exchange(held_, {});
  return text;
}

std::string TextOutput::Release(std::string_view text) {
  if (matchers_.empty()) return std::string(text);
  for (const char byte : text) {
    held_.push_back(byte);
    const Matcher* found = nullptr;
    for (Matcher& matcher : matchers_) {
      const bool ends_here = matcher.Advance(byte) && num_tokens_ >= min_tokens_;
      if (ends_here && (found == nullptr || matcher.pattern.size() > found->pattern.size())) found = &matcher;
    }
    if (found == nullptr) continue;
    stop_ = found->pattern;
    if (!include_stop_) held_.resize(held_.size() - found->pattern.size());
    return std::exchange(held_, {});
  }
  std::size_t num_held = 0;  // a whole match that came too early is no beginning: only its border is
  for (const Matcher& matcher : matchers_) {
    const bool is_whole = matcher.matched == matcher.pattern.size();
    num_held = std::max(num_held, is_whole ? matcher.borders[matcher.matched] : matcher.matched);
  }
  std::string released = held_.substr(0, held_.size() - num_held);
  held_.erase(0, released.size());
  return released;
}

}  // namespace spillway
