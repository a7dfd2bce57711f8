#pragma once

// Pieces of OpenAI responses as JSON text, written straight into strings: they are made for every token.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/request.h"
#include "engine/tokenizer.h"
#include "server/openai_request.h"
#include "server/service.h"

namespace spillway {

struct UsageCounts {
  std::int64_t prompt_tokens = 0;
  std::int64_t completion_tokens = 0;
  std::int64_t cached_tokens = 0;
};
void AppendUsage(std::string& out, const UsageCounts& usage);

// The token's bytes as text; what is not UTF-8 becomes U+FFFD.
std::string TokenAsText(const Tokenizer& tokenizer, std::int32_t token);

// Logprobs of one choice, gathered token by token; Take writes what was gathered since the last Take.
class LogprobsFormat {
 public:
  LogprobsFormat(OpenAiKind kind, std::int64_t num_top) : kind_(kind), num_top_(num_top) {}
  void Add(const Tokenizer& tokenizer, const SampledToken& token);
  void Take(std::string& out);  // the object, or null where nothing was gathered
  bool is_empty() const { return count_ == 0; }

 private:
  void AddLegacy(const Tokenizer& tokenizer, const SampledToken& token);
  void AddChat(const Tokenizer& tokenizer, const SampledToken& token);

  const OpenAiKind kind_;
  const std::int64_t num_top_;
  std::int64_t count_ = 0;
  std::int64_t text_offset_ = 0;  // code points of all tokens so far
  std::string content_;           // chat
  std::string tokens_;            // completions: the four lists
  std::string logprobs_;
  std::string tops_;
  std::string offsets_;
};

void AppendTokenIds(std::string& out, std::span<const std::int32_t> tokens);

// "finish_reason":...,"stop_reason":...
void AppendFinish(std::string& out, const std::optional<OutputFinish>& finish);

}  // namespace spillway
