#include "engine/tokenizer_normalizer.h"

#include <unicode/bytestream.h>
#include <unicode/normalizer2.h>
#include <unicode/uchar.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "engine/tokenizer_pattern.h"
#include "engine/utf8.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

absl::Status ApplyForm(const icu::Normalizer2& form, std::string& text) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::StringPiece source(text.data(), static_cast<std::int32_t>(text.size()));
  if (form.isNormalizedUTF8(source, error) && U_SUCCESS(error)) return absl::OkStatus();
  std::string normalized;
  icu::StringByteSink<std::string> sink(&normalized);
  error = U_ZERO_ERROR;
  form.normalizeUTF8(0, source, sink, nullptr, error);
  if (U_FAILURE(error)) return absl::InternalError(absl::StrCat("Unicode normalization failed: ", u_errorName(error)));
  text = std::move(normalized);
  return absl::OkStatus();
}

// Code point by code point as in Hugging Face: no final sigma, but the one unconditional mapping to two code points.
void Lowercase(std::string& text) {
  std::string lower;
  lower.reserve(text.size());
  for (std::size_t offset = 0; offset < text.size();) {
    const char32_t code_point = NextCodePoint(text, offset);
    if (code_point == 0x130) {
      lower += "i\u0307";
    } else {
      AppendUtf8(static_cast<char32_t>(u_tolower(static_cast<UChar32>(code_point))), lower);
    }
  }
  text = std::move(lower);
}

void StripWhitespace(bool left, bool right, std::string& text) {
  std::size_t begin = text.size();
  std::size_t end = 0;
  for (std::size_t offset = 0; offset < text.size();) {
    const std::size_t at = offset;
    if (u_isUWhiteSpace(static_cast<UChar32>(NextCodePoint(text, offset)))) continue;
    if (begin == text.size()) begin = at;
    end = offset;
  }
  if (!left) begin = 0;
  if (!right) end = text.size();
  text = begin < end ? text.substr(begin, end - begin) : "";
}

absl::Status ReplaceMatches(const Pattern& pattern, const std::string& content, std::string& text) {
  std::vector<Span> spans;
  RETURN_IF_ERROR(pattern.Cut(text, 0, text.size(), spans));
  std::string replaced;
  replaced.reserve(text.size());
  for (const Span& span : spans) {
    replaced +=
        span.is_match ? std::string_view(content) : std::string_view(text).substr(span.begin, span.end - span.begin);
  }
  text = std::move(replaced);
  return absl::OkStatus();
}

const icu::Normalizer2* FormNamed(std::string_view type, UErrorCode& error) {
  if (type == "NFC") return icu::Normalizer2::getNFCInstance(error);
  if (type == "NFD") return icu::Normalizer2::getNFDInstance(error);
  if (type == "NFKC") return icu::Normalizer2::getNFKCInstance(error);
  if (type == "NFKD") return icu::Normalizer2::getNFKDInstance(error);
  return nullptr;
}

}  // namespace

absl::StatusOr<Normalizer> Normalizer::FromJson(const json* description, const std::string& where) {
  Normalizer normalizer;
  if (description != nullptr) RETURN_IF_ERROR(normalizer.Add(*description, where));
  return normalizer;
}

absl::Status Normalizer::Apply(std::string& text) const {
  for (const Step& step : steps_) RETURN_IF_ERROR(step(text));
  return absl::OkStatus();
}

absl::Status Normalizer::Add(const json& description, const std::string& where) {
  ASSIGN_OR_RETURN(const std::optional<std::string> named, ReadString(description, "type", where));
  const std::string type = named.value_or("(none)");
  if (type == "Sequence") {
    const json* parts = FindMember(description, "normalizers");
    if (parts == nullptr || !parts->is_array()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Sequence without its list normalizers"));
    }
    for (const json& part : *parts) RETURN_IF_ERROR(Add(part, where));
    return absl::OkStatus();
  }
  UErrorCode error = U_ZERO_ERROR;
  if (const icu::Normalizer2* form = FormNamed(type, error)) {
    steps_.emplace_back([form](std::string& text) { return ApplyForm(*form, text); });
    return absl::OkStatus();
  }
  if (U_FAILURE(error)) return absl::InternalError(absl::StrCat("no data for ", type, ": ", u_errorName(error)));
  if (type == "Lowercase") {
    steps_.emplace_back([](std::string& text) {
      Lowercase(text);
      return absl::OkStatus();
    });
    return absl::OkStatus();
  }
  if (type == "Strip") {
    ASSIGN_OR_RETURN(const auto left, ReadBool(description, "strip_left", where));
    ASSIGN_OR_RETURN(const auto right, ReadBool(description, "strip_right", where));
    steps_.emplace_back([left = left.value_or(true), right = right.value_or(true)](std::string& text) {
      StripWhitespace(left, right, text);
      return absl::OkStatus();
    });
    return absl::OkStatus();
  }
  if (type == "Prepend") {
    ASSIGN_OR_RETURN(const auto prefix, ReadString(description, "prepend", where));
    steps_.emplace_back([prefix = prefix.value_or("")](std::string& text) {
      if (!text.empty()) text.insert(0, prefix);
      return absl::OkStatus();
    });
    return absl::OkStatus();
  }
  if (type == "Replace") {
    const json* pattern = FindMember(description, "pattern");
    ASSIGN_OR_RETURN(const auto content, ReadString(description, "content", where));
    if (pattern == nullptr || !content) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Replace without pattern or content"));
    }
    ASSIGN_OR_RETURN(Pattern compiled, Pattern::FromJson(*pattern, where));
    steps_.emplace_back([pattern = std::make_shared<const Pattern>(std::move(compiled)),
                         content = *content](std::string& text) { return ReplaceMatches(*pattern, content, text); });
    return absl::OkStatus();
  }
  return absl::UnimplementedError(absl::StrCat(where, ": normalizer ", Excerpt(type), " is not supported"));
}

}  // namespace spillway
