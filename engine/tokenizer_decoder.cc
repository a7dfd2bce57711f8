#include "engine/tokenizer_decoder.h"

#include <charconv>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "engine/tokenizer_byte_alphabet.h"
#include "engine/tokenizer_pattern.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxStrip = 1024;

std::size_t LeadingCount(std::string_view text, std::string_view content, std::size_t limit) {
  std::size_t count = 0;
  while (count < limit && text.substr(count * content.size()).starts_with(content)) ++count;
  return count;
}

std::size_t TrailingCount(std::string_view text, std::string_view content, std::size_t limit) {
  std::size_t count = 0;
  while (count < limit && text.substr(0, text.size() - count * content.size()).ends_with(content)) ++count;
  return count;
}

}  // namespace

// From what the steps before made of a token to what the next one sees.
class TokenDecoder::Step {
 public:
  virtual ~Step() = default;
  virtual std::string Apply(std::string token, Position position) const = 0;
};

class TokenDecoder::Replace final : public Step {
 public:
  Replace(Pattern pattern, std::string content) : pattern_(std::move(pattern)), content_(std::move(content)) {}

  std::string Apply(std::string token, Position) const override {
    std::vector<Span> spans;
    // A pattern that gives up leaves the token as it is: a vocabulary's spelling is a poor reason to end a stream.
    if (!pattern_.Cut(token, 0, token.size(), spans).ok()) return token;
    std::string replaced;
    for (const Span& span : spans) {
      replaced += span.is_match ? content_ : token.substr(span.begin, span.end - span.begin);
    }
    return replaced;
  }

 private:
  Pattern pattern_;
  std::string content_;
};

// A token with a character outside the alphabet (an added token) stands for its own bytes.
class TokenDecoder::ByteLevel final : public Step {
 public:
  std::string Apply(std::string token, Position) const override {
    std::string bytes;
    for (std::size_t offset = 0; offset < token.size();) {
      const char32_t letter = NextCodePoint(token, offset);
      const int byte = letter < kByteAlphabetEnd ? kByteOfLetter[letter] : -1;
      if (byte < 0) return token;
      bytes.push_back(static_cast<char>(byte));
    }
    return bytes;
  }
};

// "<0x0A>" is a line feed.
class TokenDecoder::ByteFallback final : public Step {
 public:
  std::string Apply(std::string token, Position) const override {
    if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return token;
    unsigned byte = 0;
    const char* end = token.data() + 5;
    const auto [parsed, error] = std::from_chars(token.data() + 3, end, byte, 16);
    if (error != std::errc() || parsed != end) return token;
    return std::string(1, static_cast<char>(byte));
  }
};

class TokenDecoder::StripEach final : public Step {
 public:
  explicit StripEach(Strip strip) : strip_(std::move(strip)) {}

  std::string Apply(std::string token, Position) const override {
    token.erase(0, LeadingCount(token, strip_.content, strip_.start) * strip_.content.size());
    token.resize(token.size() - TrailingCount(token, strip_.content, strip_.stop) * strip_.content.size());
    return token;
  }

 private:
  Strip strip_;
};

class TokenDecoder::Metaspace final : public Step {
 public:
  Metaspace(std::string sign, bool is_prepended) : sign_(std::move(sign)), is_prepended_(is_prepended) {}

  std::string Apply(std::string token, Position position) const override {
    const bool drops = is_prepended_ && position == Position::kFirst;
    std::string text;
    std::size_t from = 0;
    for (std::size_t at = token.find(sign_); at != std::string::npos; at = token.find(sign_, from)) {
      text.append(token, from, at - from);
      if (!drops) text += ' ';
      from = at + sign_.size();
    }
    return text.append(token, from);
  }

 private:
  std::string sign_;
  bool is_prepended_;
};

TokenDecoder::TokenDecoder() = default;
TokenDecoder::TokenDecoder(TokenDecoder&&) noexcept = default;
TokenDecoder& TokenDecoder::operator=(TokenDecoder&&) noexcept = default;
TokenDecoder::~TokenDecoder() = default;

absl::StatusOr<TokenDecoder> TokenDecoder::FromJson(const json* description, const std::string& where) {
  TokenDecoder decoder;
  decoder.joins_with_spaces_ = description == nullptr;
  if (description != nullptr) RETURN_IF_ERROR(decoder.Add(*description, where));
  return decoder;
}

absl::Status TokenDecoder::Add(const json& description, const std::string& where) {
  ASSIGN_OR_RETURN(const std::optional<std::string> named, ReadString(description, "type", where));
  const std::string type = named.value_or("(none)");
  if (type == "Sequence") {
    const json* parts = FindMember(description, "decoders");
    if (parts == nullptr || !parts->is_array()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Sequence without its list decoders"));
    }
    for (const json& part : *parts) RETURN_IF_ERROR(Add(part, where));
    return absl::OkStatus();
  }
  if (type == "Fuse") {
    is_fused_ = true;
    return absl::OkStatus();
  }
  if (type == "Strip") return AddStrip(description, where);
  if (type != "Replace" && type != "ByteLevel" && type != "ByteFallback" && type != "Metaspace") {
    return absl::UnimplementedError(absl::StrCat(where, ": decoder ", Excerpt(type), " is not supported"));
  }
  if (makes_bytes_ || is_fused_) {
    return absl::UnimplementedError(
        absl::StrCat(where, ": decoder ", type, " behind ByteLevel, ByteFallback or Fuse is not supported"));
  }
  if (type == "ByteLevel") {
    steps_.push_back(std::make_unique<ByteLevel>());
    makes_bytes_ = true;
    is_fused_ = true;
  } else if (type == "ByteFallback") {
    steps_.push_back(std::make_unique<ByteFallback>());
    makes_bytes_ = true;
  } else if (type == "Metaspace") {
    ASSIGN_OR_RETURN(const auto sign, ReadString(description, "replacement", where));
    ASSIGN_OR_RETURN(const auto scheme, ReadString(description, "prepend_scheme", where));
    ASSIGN_OR_RETURN(const auto add_prefix_space, ReadBool(description, "add_prefix_space", where));
    if (sign.value_or("\u2581").empty()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Metaspace with an empty replacement"));
    }
    const bool is_prepended = scheme ? *scheme != "never" : add_prefix_space.value_or(true);
    steps_.push_back(std::make_unique<Metaspace>(sign.value_or("\u2581"), is_prepended));
  } else {
    const json* pattern = FindMember(description, "pattern");
    ASSIGN_OR_RETURN(const auto content, ReadString(description, "content", where));
    if (pattern == nullptr || !content) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": a Replace without pattern or content"));
    }
    ASSIGN_OR_RETURN(Pattern compiled, Pattern::FromJson(*pattern, where));
    steps_.push_back(std::make_unique<Replace>(std::move(compiled), *content));
  }
  return absl::OkStatus();
}

absl::Status TokenDecoder::AddStrip(const json& description, const std::string& where) {
  ASSIGN_OR_RETURN(const auto content, ReadString(description, "content", where));
  ASSIGN_OR_RETURN(const auto start, ReadInteger(description, "start", 0, kMaxStrip, where));
  ASSIGN_OR_RETURN(const auto stop, ReadInteger(description, "stop", 0, kMaxStrip, where));
  if (!content || content->empty()) return absl::InvalidArgumentError(absl::StrCat(where, ": a Strip without content"));
  Strip strip{*content, static_cast<std::size_t>(start.value_or(0)), static_cast<std::size_t>(stop.value_or(0))};
  if (is_fused_) {
    strips_.push_back(std::move(strip));
  } else if (makes_bytes_) {
    return absl::UnimplementedError(
        absl::StrCat(where, ": decoder Strip between ByteFallback and Fuse is not supported"));
  } else {
    steps_.push_back(std::make_unique<StripEach>(std::move(strip)));
  }
  return absl::OkStatus();
}

std::string TokenDecoder::Spell(std::string_view spelling, Position position) const {
  std::string token(spelling);
  if (joins_with_spaces_ && position == Position::kLater) token.insert(0, 1, ' ');
  for (const std::unique_ptr<Step>& step : steps_) token = step->Apply(std::move(token), position);
  return token;
}

std::string TokenDecoder::BytesOf(std::string_view spelling) const { return Spell(spelling, Position::kLater); }

void TokenDecoder::Push(std::string_view spelling, Progress& progress, std::string& text) const {
  std::string bytes = Spell(spelling, progress.is_first_ ? Position::kFirst : Position::kLater);
  progress.is_first_ = false;
  progress.strips_.resize(strips_.size());
  for (std::size_t i = 0; i < strips_.size(); ++i) {
    const auto& [content, start, stop] = strips_[i];
    Progress::StripProgress& strip = progress.strips_[i];
    if (!strip.has_begun) {
      const std::size_t count = LeadingCount(bytes, content, start - strip.stripped);
      strip.stripped += count;
      bytes.erase(0, count * content.size());
      strip.has_begun = strip.stripped == start || !bytes.empty();
    }
    if (stop == 0) continue;
    bytes.insert(0, strip.held);
    const std::size_t kept = bytes.size() - TrailingCount(bytes, content, stop) * content.size();
    strip.held = bytes.substr(kept);
    bytes.resize(kept);
  }
  progress.repair_.Push(bytes, text);
}

void TokenDecoder::Flush(Progress& progress, std::string& text) const {
  progress.repair_.Flush(text);
  progress = Progress();
}

}  // namespace spillway
