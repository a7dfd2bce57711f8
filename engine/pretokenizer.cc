#include "engine/pretokenizer.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "engine/tokenizer_byte_alphabet.h"
#include "engine/tokenizer_pattern.h"
#include "engine/utf8.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

// gpt2's own cut, which ByteLevel applies unless told otherwise.
constexpr const char* kByteLevelRegex = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// \w of the library that Hugging Face uses for Whitespace.
constexpr const char* kWordsRegex = R"([\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}]+)"
                                    R"(|[^\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200c}\x{200d}\s]+)";
constexpr const char* kPunctuationRegex = R"([\p{P}$+<=>^`|~])";

enum class Behavior : std::uint8_t { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

absl::StatusOr<Behavior> BehaviorNamed(const std::string& name, const std::string& where) {
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  return absl::InvalidArgumentError(absl::StrCat(where, ": no split behavior is named ", Excerpt(name)));
}

// Joins or drops the spans as the behavior says. A delimiter merges with a neighbour that is no delimiter.
void Arrange(Behavior behavior, std::vector<Span>& spans) {
  std::vector<Span> arranged;
  arranged.reserve(spans.size());
  bool previous_is_match = false;
  const bool backwards = behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(spans.begin(), spans.end());
  for (const Span& span : spans) {
    const bool joins =
        behavior == Behavior::kContiguous ? span.is_match == previous_is_match : span.is_match && !previous_is_match;
    previous_is_match = span.is_match;
    if (!joins || arranged.empty()) {
      arranged.push_back(span);
    } else if (backwards) {
      arranged.back().begin = span.begin;
    } else {
      arranged.back().end = span.end;
    }
  }
  if (backwards) std::reverse(arranged.begin(), arranged.end());
  spans = std::move(arranged);
}

absl::Status CutPieces(const Pattern& pattern, Behavior behavior, bool invert, CutText& cut) {
  std::vector<Piece> pieces;
  pieces.reserve(cut.pieces.size());
  std::vector<Span> spans;
  for (const Piece& piece : cut.pieces) {
    spans.clear();
    RETURN_IF_ERROR(pattern.Cut(cut.text, piece.begin, piece.end, spans));
    if (invert) {
      for (Span& span : spans) span.is_match = !span.is_match;
    }
    if (behavior == Behavior::kRemoved) {
      std::erase_if(spans, [](const Span& span) { return span.is_match; });
    } else if (behavior != Behavior::kIsolated) {
      Arrange(behavior, spans);
    }
    for (const Span& span : spans) {
      if (span.begin < span.end) {
        pieces.push_back({span.begin, span.end, piece.begins_text && span.begin == piece.begin});
      }
    }
  }
  cut.pieces = std::move(pieces);
  return absl::OkStatus();
}

// Rewrites the text piece by piece; write(piece's text, piece, text) appends the new spelling.
template <typename Write>
void Respell(CutText& cut, std::size_t reserve_bytes, Write write) {
  std::string text;
  text.reserve(reserve_bytes);
  for (Piece& piece : cut.pieces) {
    const std::size_t begin = text.size();
    write(std::string_view(cut.text).substr(piece.begin, piece.end - piece.begin), piece, text);
    piece.begin = begin;
    piece.end = text.size();
  }
  cut.text = std::move(text);
}

}  // namespace

class Pretokenizer::Step {
 public:
  virtual ~Step() = default;
  virtual absl::Status Apply(CutText& cut) const = 0;
};

class Pretokenizer::Split final : public Step {
 public:
  Split(Pattern pattern, Behavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}

  absl::Status Apply(CutText& cut) const override { return CutPieces(pattern_, behavior_, invert_, cut); }

 private:
  Pattern pattern_;
  Behavior behavior_;
  bool invert_;
};

class Pretokenizer::ByteLevel final : public Step {
 public:
  ByteLevel(std::optional<Pattern> pattern, bool add_prefix_space)
      : pattern_(std::move(pattern)), add_prefix_space_(add_prefix_space) {}

  absl::Status Apply(CutText& cut) const override {
    if (add_prefix_space_) {
      Respell(cut, cut.text.size() + cut.pieces.size(), [](std::string_view spelling, const Piece&, std::string& text) {
        if (!spelling.starts_with(' ')) text += ' ';
        text += spelling;
      });
    }
    if (pattern_) RETURN_IF_ERROR(CutPieces(*pattern_, Behavior::kIsolated, /*invert=*/false, cut));
    Respell(cut, 2 * cut.text.size(), [](std::string_view spelling, const Piece&, std::string& text) {
      for (const char byte : spelling) AppendUtf8(kByteAlphabet[static_cast<unsigned char>(byte)], text);
    });
    return absl::OkStatus();
  }

 private:
  std::optional<Pattern> pattern_;
  bool add_prefix_space_;
};

class Pretokenizer::Metaspace final : public Step {
 public:
  enum class Prepend : std::uint8_t { kAlways, kFirst, kNever };

  Metaspace(std::string sign, Pattern sign_pattern, Prepend prepend, bool split)
      : sign_(std::move(sign)), sign_pattern_(std::move(sign_pattern)), prepend_(prepend), split_(split) {}

  absl::Status Apply(CutText& cut) const override {
    Respell(cut, 2 * cut.text.size(), [this](std::string_view spelling, const Piece& piece, std::string& text) {
      const bool wants_sign = prepend_ == Prepend::kAlways || (prepend_ == Prepend::kFirst && piece.begins_text);
      if (wants_sign && !spelling.starts_with(' ') && !spelling.starts_with(sign_)) text += sign_;
      for (const char c : spelling) {
        if (c == ' ') {
          text += sign_;
        } else {
          text += c;
        }
      }
    });
    if (!split_) return absl::OkStatus();
    return CutPieces(sign_pattern_, Behavior::kMergedWithNext, /*invert=*/false, cut);
  }

 private:
  std::string sign_;
  Pattern sign_pattern_;
  Prepend prepend_;
  bool split_;
};

Pretokenizer::Pretokenizer() = default;
Pretokenizer::Pretokenizer(Pretokenizer&&) noexcept = default;
Pretokenizer& Pretokenizer::operator=(Pretokenizer&&) noexcept = default;
Pretokenizer::~Pretokenizer() = default;

absl::StatusOr<Pretokenizer> Pretokenizer::FromJson(const json* description, const std::string& where) {
  Pretokenizer pretokenizer;
  if (description != nullptr) RETURN_IF_ERROR(pretokenizer.Add(*description, where));
  return pretokenizer;
}

absl::Status Pretokenizer::Apply(CutText& cut) const {
  for (const std::unique_ptr<Step>& step : steps_) RETURN_IF_ERROR(step->Apply(cut));
  return absl::OkStatus();
}

absl::Status Pretokenizer::AddRegexSplit(const std::string& regex, const std::string& behavior, bool invert,
                                         const std::string& where) {
  ASSIGN_OR_RETURN(const Behavior parsed, BehaviorNamed(behavior, where));
  ASSIGN_OR_RETURN(Pattern pattern, Pattern::Regex(regex));
  steps_.push_back(std::make_unique<Split>(std::move(pattern), parsed, invert));
  return absl::OkStatus();
}

absl::Status Pretokenizer::Add(const json& description, const std::string& where) {
  ASSIGN_OR_RETURN(const std::optional<std::string> named, ReadString(description, "type", where));
  const std::string type = named.value_or("(none)");
  if (type == "Sequence") {
    const json* parts = FindMember(description, "pretokenizers");
    if (parts == nullptr || !parts->is_array()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Sequence without its list pretokenizers"));
    }
    for (const json& part : *parts) RETURN_IF_ERROR(Add(part, where));
    return absl::OkStatus();
  }
  if (type == "Split") {
    const json* pattern = FindMember(description, "pattern");
    ASSIGN_OR_RETURN(const auto behavior, ReadString(description, "behavior", where));
    ASSIGN_OR_RETURN(const auto invert, ReadBool(description, "invert", where));
    if (pattern == nullptr || !behavior) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Split without pattern or behavior"));
    }
    ASSIGN_OR_RETURN(const Behavior parsed, BehaviorNamed(*behavior, where));
    ASSIGN_OR_RETURN(Pattern compiled, Pattern::FromJson(*pattern, where));
    steps_.push_back(std::make_unique<Split>(std::move(compiled), parsed, invert.value_or(false)));
    return absl::OkStatus();
  }
  if (type == "ByteLevel") {
    ASSIGN_OR_RETURN(const auto add_prefix_space, ReadBool(description, "add_prefix_space", where));
    ASSIGN_OR_RETURN(const auto use_regex, ReadBool(description, "use_regex", where));
    std::optional<Pattern> pattern;
    if (use_regex.value_or(true)) {
      ASSIGN_OR_RETURN(pattern, Pattern::Regex(kByteLevelRegex));
    }
    steps_.push_back(std::make_unique<ByteLevel>(std::move(pattern), add_prefix_space.value_or(true)));
    return absl::OkStatus();
  }
  if (type == "Metaspace") {
    ASSIGN_OR_RETURN(const auto sign, ReadString(description, "replacement", where));
    ASSIGN_OR_RETURN(const auto split, ReadBool(description, "split", where));
    ASSIGN_OR_RETURN(const auto add_prefix_space, ReadBool(description, "add_prefix_space", where));
    ASSIGN_OR_RETURN(const auto scheme, ReadString(description, "prepend_scheme", where));
    // Files from before prepend_scheme say it with add_prefix_space.
    const std::string prepend = scheme.value_or(add_prefix_space.value_or(true) ? "always" : "never");
    if (prepend != "always" && prepend != "first" && prepend != "never") {
      return absl::InvalidArgumentError(absl::StrCat(where, ": no prepend_scheme is named ", Excerpt(prepend)));
    }
    ASSIGN_OR_RETURN(Pattern sign_pattern, Pattern::Literal(sign.value_or("\u2581")));
    steps_.push_back(std::make_unique<Metaspace>(sign.value_or("\u2581"), std::move(sign_pattern),
                                                 prepend == "always"  ? Metaspace::Prepend::kAlways
                                                 : prepend == "first" ? Metaspace::Prepend::kFirst
                                                                      : Metaspace::Prepend::kNever,
                                                 split.value_or(true)));
    return absl::OkStatus();
  }
  if (type == "Digits") {
    ASSIGN_OR_RETURN(const auto individual, ReadBool(description, "individual_digits", where));
    return AddRegexSplit("\\p{N}", individual.value_or(false) ? "Isolated" : "Contiguous", /*invert=*/false, where);
  }
  if (type == "Punctuation") {
    ASSIGN_OR_RETURN(const auto behavior, ReadString(description, "behavior", where));
    return AddRegexSplit(kPunctuationRegex, behavior.value_or("Isolated"), /*invert=*/false, where);
  }
  if (type == "Whitespace") return AddRegexSplit(kWordsRegex, "Removed", /*invert=*/true, where);
  if (type == "WhitespaceSplit") return AddRegexSplit("\\s", "Removed", /*invert=*/false, where);
  return absl::UnimplementedError(absl::StrCat(where, ": pre_tokenizer ", Excerpt(type), " is not supported"));
}

}  // namespace spillway
