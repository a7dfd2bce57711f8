#pragma once

// Patterns of tokenizer.json ({"String": ...} or {"Regex": ...}) over PCRE2. Foreign regexes: their size, and the work
// of one match, are bounded.

#include <cstddef>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spillway {

// A part [begin, end) of the searched text: a match, or what lies between two matches.
struct Span {
  std::size_t begin = 0;
  std::size_t end = 0;
  bool is_match = false;
};

// Immutable; any thread.
class Pattern {
 public:
  static absl::StatusOr<Pattern> Literal(std::string_view text);
  // Oniguruma's reading, as Hugging Face has it: ^ and $ match at lines, \s is the White_Space property. Constructs
  // that PCRE2 would take otherwise (set operations inside a class) are UNIMPLEMENTED.
  static absl::StatusOr<Pattern> Regex(const std::string& source);
  // {"String": text} or {"Regex": source}.
  static absl::StatusOr<Pattern> FromJson(const nlohmann::json& pattern, const std::string& where);

  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;
  ~Pattern();

  // Cuts [begin, end) of a valid UTF-8 text into matches and what lies between, in order and without gaps. Lookarounds
  // see nothing outside the range. INVALID_ARGUMENT where a match takes more work than the limit.
  absl::Status Cut(std::string_view text, std::size_t begin, std::size_t end, std::vector<Span>& spans) const;

 private:
  struct Compiled;
  explicit Pattern(std::unique_ptr<Compiled> compiled);
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace spillway
