#include "server/openai_format.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/utf8.h"

namespace spillway {
namespace {

constexpr float kLowestLogprob = -9999;  // JSON has no infinity

void AppendFloat(std::string& out, float value) {
  if (!std::isfinite(value)) value = kLowestLogprob;
  std::array<char, 32> digits;
  const auto written = std::to_chars(digits.data(), digits.data() + digits.size(), value);
  out.append(digits.data(), written.ptr);
}

void AppendComma(std::string& out) {
  if (!out.empty()) out.push_back(',');
}

std::int64_t CountCodePoints(std::string_view text) {
  return std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; });
}

// "token":...,"logprob":...,"bytes":[...]
void AppendChatToken(std::string& out, const Tokenizer& tokenizer, std::int32_t token, float logprob) {
  out += R"("token":)";
  AppendJsonString(out, TokenAsText(tokenizer, token));
  out += R"(,"logprob":)";
  AppendFloat(out, logprob);
  out += R"(,"bytes":[)";
  bool is_first = true;
  for (const char byte : tokenizer.TokenBytes(token)) {
    absl::StrAppend(&out, is_first ? "" : ",", static_cast<int>(static_cast<unsigned char>(byte)));
    is_first = false;
  }
  out += "]";
}

}  // namespace

void AppendUsage(std::string& out, const UsageCounts& usage) {
  absl::StrAppend(&out, R"("usage":{"prompt_tokens":)", usage.prompt_tokens, R"(,"total_tokens":)",
                  usage.prompt_tokens + usage.completion_tokens, R"(,"completion_tokens":)", usage.completion_tokens,
                  R"(,"prompt_tokens_details":{"cached_tokens":)", usage.cached_tokens, "}}");
}

std::string TokenAsText(const Tokenizer& tokenizer, std::int32_t token) {
  std::string text;
  Utf8Repair repair;
  repair.Push(tokenizer.TokenBytes(token), text);
  repair.Flush(text);
  return text;
}

void LogprobsFormat::Add(const Tokenizer& tokenizer, const SampledToken& token) {
  ++count_;
  kind_ == OpenAiKind::kChat ? AddChat(tokenizer, token) : AddLegacy(tokenizer, token);
}

void LogprobsFormat::AddChat(const Tokenizer& tokenizer, const SampledToken& token) {
  AppendComma(content_);
  content_ += "{";
  AppendChatToken(content_, tokenizer, token.token, token.logprob);
  content_ += R"(,"top_logprobs":[)";
  std::int64_t rank = 0;
  for (const LogprobEntry& entry : token.top) {
    if (rank == num_top_) break;
    content_ += rank++ == 0 ? "{" : ",{";
    AppendChatToken(content_, tokenizer, entry.token, entry.logprob);
    content_ += "}";
  }
  content_ += "]}";
}

void LogprobsFormat::AddLegacy(const Tokenizer& tokenizer, const SampledToken& token) {
  const std::string text = TokenAsText(tokenizer, token.token);
  AppendComma(tokens_);
  AppendJsonString(tokens_, text);
  AppendComma(logprobs_);
  AppendFloat(logprobs_, token.logprob);
  AppendComma(tops_);
  tops_ += "{";
  std::vector<std::string> named = {text};  // several tokens may look alike: the likeliest keeps the name
  AppendJsonString(tops_, text);
  tops_ += ":";
  AppendFloat(tops_, token.logprob);
  std::int64_t rank = 0;
  for (const LogprobEntry& entry : token.top) {
    if (rank++ == num_top_) break;
    std::string name = TokenAsText(tokenizer, entry.token);
    if (std::ranges::count(named, name) > 0) continue;
    tops_ += ",";
    AppendJsonString(tops_, name);
    tops_ += ":";
    AppendFloat(tops_, entry.logprob);
    named.push_back(std::move(name));
  }
  tops_ += "}";
  AppendComma(offsets_);
  absl::StrAppend(&offsets_, text_offset_);
  text_offset_ += CountCodePoints(text);
}

void LogprobsFormat::Take(std::string& out) {
  if (count_ == 0) {
    out += "null";
  } else if (kind_ == OpenAiKind::kChat) {
    absl::StrAppend(&out, R"({"content":[)", content_, "]}");
  } else {
    absl::StrAppend(&out, R"({"text_offset":[)", offsets_, R"(],"token_logprobs":[)", logprobs_, R"(],"tokens":[)",
                    tokens_, R"(],"top_logprobs":[)", tops_, "]}");
  }
  count_ = 0;
  for (std::string* list : {&content_, &tokens_, &logprobs_, &tops_, &offsets_}) list->clear();
}

void AppendTokenIds(std::string& out, std::span<const std::int32_t> tokens) {
  out.push_back('[');
  for (std::size_t i = 0; i < tokens.size(); ++i) absl::StrAppend(&out, i == 0 ? "" : ",", tokens[i]);
  out.push_back(']');
}

void AppendFinish(std::string& out, const std::optional<OutputFinish>& finish) {
  if (!finish) {
    out += R"("finish_reason":null,"stop_reason":null)";
    return;
  }
  switch (finish->reason) {
    case FinishReason::kStop:
      out += R"("finish_reason":"stop","stop_reason":)";
      break;
    case FinishReason::kLength:
      out += R"("finish_reason":"length","stop_reason":)";
      break;
    case FinishReason::kAborted:
      out += R"("finish_reason":"abort","stop_reason":)";
      break;
  }
  if (const auto* text = std::get_if<std::string>(&finish->stop)) {
    AppendJsonString(out, *text);
  } else if (const auto* token = std::get_if<std::int32_t>(&finish->stop); token != nullptr && !finish->is_eos) {
    absl::StrAppend(&out, *token);
  } else {
    out += "null";
  }
}

}  // namespace spillway
