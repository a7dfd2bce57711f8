#pragma once

// Bodies of /v1/completions, /v1/chat/completions, /tokenize -> what the Service is asked for.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/chat_template.h"
#include "server/openai_json.h"
#include "server/service.h"

namespace spillway {

enum class OpenAiKind : std::uint8_t { kCompletion, kChat };

struct OpenAiRequest {
  OpenAiKind kind = OpenAiKind::kCompletion;
  std::string model;                           // as asked for; empty: the served one
  std::string request_id;                      // of the body; empty: none
  std::vector<GenerationRequest> generations;  // one per prompt
  bool echo = false;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool return_token_ids = false;
  std::optional<std::int64_t> logprobs;  // wanted beside the sampled one
};

using OnUnknownField = std::function<void(const std::string& name)>;

// INVALID_ARGUMENT carries the field that is wrong or not supported yet. Ranges are the Service's to check.
absl::StatusOr<OpenAiRequest> ReadOpenAiRequest(OpenAiKind kind, const Json& body, const ChatTemplate& chat_template,
                                                const OnUnknownField& on_unknown);

// {prompt | messages, add_special_tokens, add_generation_prompt}
struct TokenizeRequest {
  std::string model;
  std::string text;
  SpecialTokens special_tokens = SpecialTokens::kAdd;
  bool return_token_strings = false;
};
absl::StatusOr<TokenizeRequest> ReadTokenizeRequest(const Json& body, const ChatTemplate& chat_template,
                                                    const OnUnknownField& on_unknown);

struct DetokenizeRequest {
  std::string model;
  std::vector<std::int64_t> tokens;
};
absl::StatusOr<DetokenizeRequest> ReadDetokenizeRequest(const Json& body, const OnUnknownField& on_unknown);

}  // namespace spillway
