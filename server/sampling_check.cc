#include "server/sampling_check.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "kernels/kernels.h"
#include "kernels/status_macros.h"
#include "server/tenant.h"

namespace spillway {
namespace {

constexpr char kFieldPayload[] = "spillway.dev/field";

absl::Status WithField(absl::Status status, const std::string& field) {
  status.SetPayload(kFieldPayload, absl::Cord(field));
  return status;
}

template <typename Value>
absl::Status Expect(bool holds, const char* field, const char* range, const Value& value) {
  if (holds) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(field, " must be ", range, ", got ", value));
}

absl::Status ExpectIn(const char* field, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(field, " must be in [", low, ", ", high, "], got ", value));
}

absl::Status CheckSampling(const GenerationRequest& request) {
  if (const auto& value = request.temperature) {
    RETURN_IF_ERROR(Expect(*value >= 0 && std::isfinite(static_cast<float>(*value)), "temperature",
                           "a finite number of at least 0", *value));
  }
  if (const auto& value = request.top_p)
    RETURN_IF_ERROR(Expect(*value > 0 && *value <= 1, "top_p", "in (0, 1]", *value));
  if (const auto& value = request.min_p)
    RETURN_IF_ERROR(Expect(*value >= 0 && *value <= 1, "min_p", "in [0, 1]", *value));
  if (const auto& value = request.top_k) {
    RETURN_IF_ERROR(Expect(*value >= -1 && *value <= std::numeric_limits<std::int32_t>::max(), "top_k",
                           "-1 or 0 (all tokens) or at least 1", *value));
  }
  if (const auto& value = request.logprobs) RETURN_IF_ERROR(ExpectIn("logprobs", *value, 0, kMaxLogprobs));
  return absl::OkStatus();
}

absl::Status CheckStops(const GenerationRequest& request, std::int32_t vocab) {
  if (request.stop.size() > kMaxStopStrings) {
    return InvalidField("stop", absl::StrCat("stop holds ", request.stop.size(), " strings, at most ", kMaxStopStrings,
                                             " are allowed"));
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) return InvalidField("stop", "stop must not hold an empty string");
    if (stop.size() > kMaxStopBytes) {
      return InvalidField(
          "stop", absl::StrCat("a stop string has ", stop.size(), " bytes, at most ", kMaxStopBytes, " are allowed"));
    }
  }
  if (request.stop_token_ids.size() > kMaxStopTokenIds) {
    return InvalidField("stop_token_ids", absl::StrCat("stop_token_ids holds ", request.stop_token_ids.size(),
                                                       " ids, at most ", kMaxStopTokenIds, " are allowed"));
  }
  for (const std::int64_t id : request.stop_token_ids) {
    if (id < 0 || id >= vocab) {
      return InvalidField("stop_token_ids",
                          absl::StrCat("stop_token_ids: ", id, " is not in the vocabulary of ", vocab, " tokens"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckLengths(const GenerationRequest& request, std::int32_t max_model_len) {
  constexpr auto kLargest = std::numeric_limits<std::int32_t>::max();
  if (const auto& value = request.max_tokens) RETURN_IF_ERROR(Expect(*value >= 1, "max_tokens", "at least 1", *value));
  RETURN_IF_ERROR(ExpectIn("min_tokens", request.min_tokens, 0, kLargest));
  if (request.max_tokens && request.min_tokens > *request.max_tokens) {
    return InvalidField("min_tokens", absl::StrCat("min_tokens must be at most max_tokens (", *request.max_tokens,
                                                   "), got ", request.min_tokens));
  }
  if (const auto& value = request.truncate_prompt_tokens; value && *value != -1) {
    RETURN_IF_ERROR(ExpectIn("truncate_prompt_tokens", *value, 1, max_model_len));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status InvalidField(const std::string& field, const std::string& message) {
  return WithField(absl::InvalidArgumentError(message), field);
}

std::optional<std::string> FieldOf(const absl::Status& status) {
  const auto payload = status.GetPayload(kFieldPayload);
  if (!payload) return std::nullopt;
  return std::string(*payload);
}

absl::Status CheckRequest(const GenerationRequest& request, const ServiceOptions& options, std::int32_t vocab,
                          const EngineOptions& engine) {
  if (request.request_id.size() > kMaxRequestIdBytes) {
    return InvalidField("request_id", absl::StrCat("request_id has ", request.request_id.size(), " bytes, at most ",
                                                   kMaxRequestIdBytes, " are allowed"));
  }
  if (request.tenant.size() > kMaxTenantBytes) {
    return InvalidField(kFairnessHeaders[0], absl::StrCat(kFairnessHeaders[0], " has ", request.tenant.size(),
                                                          " bytes, at most ", kMaxTenantBytes, " are allowed"));
  }
  RETURN_IF_ERROR(ExpectIn("n", request.n, 1, options.max_choices));
  RETURN_IF_ERROR(CheckSampling(request));
  RETURN_IF_ERROR(CheckLengths(request, engine.max_model_len));
  RETURN_IF_ERROR(CheckStops(request, vocab));
  if (engine.scheduling_policy != SchedulingPolicy::kPriority && request.priority != 0) {
    return InvalidField("priority", absl::StrCat("priority is ", request.priority,
                                                 "; other than 0 it needs --scheduling-policy priority, and this "
                                                 "server runs ",
                                                 std::string(NameOf(engine.scheduling_policy))));
  }
  RETURN_IF_ERROR(ExpectIn("priority", request.priority, std::numeric_limits<std::int32_t>::min(),
                           std::numeric_limits<std::int32_t>::max()));
  if (const auto* text = std::get_if<std::string>(&request.prompt); text != nullptr) {
    if (text->size() > options.max_prompt_bytes) {
      return InvalidField("prompt", absl::StrCat("the prompt has ", text->size(), " bytes, at most ",
                                                 options.max_prompt_bytes, " are allowed"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<SamplingParams> MakeSampling(const GenerationRequest& request, const GenerationDefaults& defaults,
                                            std::int32_t vocab, std::int32_t max_model_len,
                                            std::vector<std::int32_t>& prompt) {
  if (const auto& keep = request.truncate_prompt_tokens) {
    const std::int64_t room = std::max<std::int64_t>(max_model_len - request.max_tokens.value_or(1), 1);
    const auto limit = static_cast<std::size_t>(*keep == -1 ? room : *keep);
    if (prompt.size() > limit) prompt.erase(prompt.begin(), prompt.end() - static_cast<std::ptrdiff_t>(limit));
  }
  if (prompt.empty()) return InvalidField("prompt", "the prompt is empty: at least one token is needed");
  for (const std::int32_t token : prompt) {
    if (token < 0 || token >= vocab) {
      return InvalidField("prompt",
                          absl::StrCat("prompt token ", token, " is not in the vocabulary of ", vocab, " tokens"));
    }
  }
  const auto length = static_cast<std::int64_t>(prompt.size());
  if (length >= max_model_len) {
    return WithField(absl::OutOfRangeError(absl::StrCat("This model's maximum context length is ", max_model_len,
                                                        " tokens, but the prompt has ", length,
                                                        " tokens and at least 1 is to be generated.")),
                     "prompt");
  }
  const std::int64_t room = max_model_len - length;
  const std::int64_t max_tokens = request.max_tokens.value_or(
      std::min<std::int64_t>(room, std::max(defaults.max_new_tokens.value_or(max_model_len), 1)));
  if (max_tokens > room) {
    return WithField(absl::OutOfRangeError(absl::StrCat("This model's maximum context length is ", max_model_len,
                                                        " tokens, but the prompt has ", length,
                                                        " tokens and max_tokens asks for ", max_tokens, " more (",
                                                        max_tokens, " > ", max_model_len, " - ", length, ").")),
                     "max_tokens");
  }
  if (request.min_tokens > max_tokens) {
    return InvalidField("min_tokens",
                        absl::StrCat("min_tokens must be at most ", max_tokens, " here, got ", request.min_tokens));
  }
  SamplingParams sampling;
  sampling.temperature =
      request.temperature ? static_cast<float>(*request.temperature) : defaults.temperature.value_or(1);
  sampling.top_p = request.top_p ? static_cast<float>(*request.top_p) : defaults.top_p.value_or(1);
  // A tiny positive top_p must not round to 0, which means nothing.
  sampling.top_p = std::max(sampling.top_p, std::numeric_limits<float>::min());
  sampling.min_p = request.min_p ? static_cast<float>(*request.min_p) : defaults.min_p.value_or(0);
  const std::int64_t top_k = request.top_k.value_or(defaults.top_k.value_or(0));
  sampling.top_k = static_cast<std::int32_t>(std::max<std::int64_t>(top_k, 0));
  if (request.seed) {
    sampling.seed = static_cast<std::uint64_t>(*request.seed);
  } else {
    std::random_device entropy;
    sampling.seed = (static_cast<std::uint64_t>(entropy()) << 32U) | entropy();
  }
  sampling.max_tokens = static_cast<std::int32_t>(max_tokens);
  sampling.min_tokens = static_cast<std::int32_t>(request.min_tokens);
  sampling.ignore_eos = request.ignore_eos;
  sampling.stop_token_ids.assign(request.stop_token_ids.begin(), request.stop_token_ids.end());
  sampling.num_logprobs = static_cast<std::int32_t>(request.logprobs.value_or(-1));
  return sampling;
}

}  // namespace spillway
