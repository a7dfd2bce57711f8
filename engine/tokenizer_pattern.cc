#include "engine/tokenizer_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "engine/utf8.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

constexpr std::size_t kMaxPatternBytes = 1 << 16;
constexpr std::uint32_t kMaxParentheses = 200;
constexpr std::uint32_t kMatchLimit = 300'000'000;  // backtracks of one match; a run of spaces needs one for each
constexpr std::uint32_t kHeapLimitKiB = 64 << 10;
constexpr std::size_t kJitStackBytes = 1 << 20;

struct Delete {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};

std::string MessageOf(int error) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(error, text, sizeof(text));
  return reinterpret_cast<const char*>(text);
}

// From Oniguruma's syntax to PCRE2's: \s as a property (PCRE2's own holds U+180E too). Inside a class Oniguruma nests
// and intersects, PCRE2 would read the same characters as themselves: refused.
absl::StatusOr<std::string> Translate(std::string_view source) {
  std::string translated;
  bool in_class = false;
  for (std::size_t i = 0; i < source.size(); ++i) {
    const char c = source[i];
    const char next = i + 1 < source.size() ? source[i + 1] : '\0';
    if (c == '\\' && next != '\0') {
      ++i;
      if (next == 's') {
        translated += "\\p{White_Space}";
      } else if (next == 'S') {
        translated += "\\P{White_Space}";
      } else {
        translated += c;
        translated += next;
      }
      continue;
    }
    if (in_class && ((c == '[' && next != ':') || (c == '&' && next == '&'))) {
      return absl::UnimplementedError(
          absl::StrCat("set operations inside a class are not supported: ", Excerpt(source.substr(i))));
    }
    translated += c;
    if (in_class && c == '[') {  // [:name:]
      const std::size_t close = source.find(":]", i);
      if (close == std::string_view::npos) return absl::InvalidArgumentError("a class name without its end");
      translated += source.substr(i + 1, close + 1 - i);
      i = close + 1;
    } else if (in_class) {
      in_class = c != ']';
    } else if (c == '[') {
      in_class = true;
      // A bracket that comes first is a member.
      if (next == '^') translated += source[++i];
      if (i + 1 < source.size() && source[i + 1] == ']') translated += source[++i];
    }
  }
  return translated;
}

}  // namespace

struct Pattern::Compiled {
  std::unique_ptr<pcre2_code, Delete> code;
  std::unique_ptr<pcre2_match_context, Delete> limits;
};

Pattern::Pattern(std::unique_ptr<Compiled> compiled) : compiled_(std::move(compiled)) {}
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;
Pattern::~Pattern() = default;

absl::StatusOr<Pattern> Pattern::Regex(const std::string& source) {
  if (source.size() > kMaxPatternBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("a pattern of ", source.size(), " bytes, the limit is ", kMaxPatternBytes));
  }
  ASSIGN_OR_RETURN(const std::string translated, Translate(source));
  std::unique_ptr<pcre2_compile_context, Delete> context(pcre2_compile_context_create(nullptr));
  SPILLWAY_CHECK(context != nullptr);
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  pcre2_set_parens_nest_limit(context.get(), kMaxParentheses);
  auto compiled = std::make_unique<Compiled>();
  int error = 0;
  PCRE2_SIZE offset = 0;
  constexpr std::uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C;
  compiled->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(), kOptions,
                                     &error, &offset, context.get()));
  if (compiled->code == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("the pattern '", Excerpt(source), "' does not compile: ", MessageOf(error), " at byte ", offset));
  }
  // Without a JIT for this machine the interpreter runs: slower, same matches.
  pcre2_jit_compile(compiled->code.get(), PCRE2_JIT_COMPLETE);
  compiled->limits.reset(pcre2_match_context_create(nullptr));
  SPILLWAY_CHECK(compiled->limits != nullptr);
  pcre2_set_match_limit(compiled->limits.get(), kMatchLimit);
  pcre2_set_heap_limit(compiled->limits.get(), kHeapLimitKiB);
  // Runs of a hundred thousand spaces need more than the machine stack's 32 KiB; one stack per thread.
  pcre2_jit_stack_assign(
      compiled->limits.get(),
      [](void*) -> pcre2_jit_stack* {
        thread_local const std::unique_ptr<pcre2_jit_stack, Delete> stack(
            pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr));
        return stack.get();
      },
      nullptr);
  return Pattern(std::move(compiled));
}

absl::StatusOr<Pattern> Pattern::Literal(std::string_view text) {
  std::string source;
  std::size_t offset = 0;
  while (offset < text.size()) {
    absl::StrAppend(&source, "\\x{", absl::Hex(static_cast<std::uint32_t>(NextCodePoint(text, offset))), "}");
  }
  return Regex(source.empty() ? "(?!)" : source);  // the empty text is found nowhere
}

absl::StatusOr<Pattern> Pattern::FromJson(const nlohmann::json& pattern, const std::string& where) {
  ASSIGN_OR_RETURN(const std::optional<std::string> literal, ReadString(pattern, "String", where));
  ASSIGN_OR_RETURN(const std::optional<std::string> regex, ReadString(pattern, "Regex", where));
  if (literal.has_value() == regex.has_value()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": pattern is neither {\"String\": ..} nor {\"Regex\": ..}"));
  }
  absl::StatusOr<Pattern> compiled = literal ? Literal(*literal) : Regex(*regex);
  if (!compiled.ok()) {
    return absl::Status(compiled.status().code(), absl::StrCat(where, ": ", compiled.status().message()));
  }
  return compiled;
}

absl::Status Pattern::Cut(std::string_view text, std::size_t begin, std::size_t end, std::vector<Span>& spans) const {
  const std::unique_ptr<pcre2_match_data, Delete> data(pcre2_match_data_create(1, nullptr));
  SPILLWAY_CHECK(data != nullptr);
  const std::string_view range = text.substr(begin, end - begin);
  std::size_t search_from = 0;
  std::size_t uncut = 0;  // [uncut, ...) is in no span yet
  std::optional<std::size_t> last_match_end;
  while (search_from <= range.size()) {
    const int count = pcre2_match(compiled_->code.get(), reinterpret_cast<PCRE2_SPTR>(range.data()), range.size(),
                                  search_from, PCRE2_NO_UTF_CHECK, data.get(), compiled_->limits.get());
    if (count == PCRE2_ERROR_NOMATCH) break;
    if (count < 0) {
      return absl::InvalidArgumentError(absl::StrCat("the tokenizer's pattern gave up on the text at byte ",
                                                     begin + search_from, ": ", MessageOf(count)));
    }
    const PCRE2_SIZE* offsets = pcre2_get_ovector_pointer(data.get());
    const std::size_t match_begin = offsets[0];
    const std::size_t match_end = offsets[1];
    if (match_begin > match_end || match_begin < uncut) {
      return absl::InvalidArgumentError("the tokenizer's pattern moves the start of a match with \\K");
    }
    if (match_begin == match_end && last_match_end == match_end) {
      // An empty match right behind the last one is not taken, else it would be found for ever.
      if (search_from == range.size()) break;
      NextCodePoint(range, search_from);
      continue;
    }
    search_from = match_end;
    last_match_end = match_end;
    if (uncut < match_begin) spans.push_back({begin + uncut, begin + match_begin, false});
    spans.push_back({begin + match_begin, begin + match_end, true});
    uncut = match_end;
  }
  if (uncut < range.size()) spans.push_back({begin + uncut, begin + range.size(), false});
  return absl::OkStatus();
}

}  // namespace spillway
