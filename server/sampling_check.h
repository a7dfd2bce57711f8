#pragma once

// What a request may ask for: ranges of its fields, and the parameters the engine gets.

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "engine/request.h"
#include "server/service.h"

namespace spillway {

inline constexpr std::size_t kMaxStopStrings = 64;
inline constexpr std::size_t kMaxStopBytes = 1024;  // of one stop string
inline constexpr std::size_t kMaxStopTokenIds = 1024;
inline constexpr std::size_t kMaxRequestIdBytes = 256;

// Everything that can be said before tokenizing. Errors name field, value and limit.
absl::Status CheckRequest(const GenerationRequest& request, const ServiceOptions& options, std::int32_t vocab,
                          const EngineOptions& engine);

// Cuts `prompt` as truncate_prompt_tokens says, checks lengths and ids, fills in what the request leaves unset.
//   OUT_OF_RANGE  prompt and max_tokens do not fit max_model_len: names all three
absl::StatusOr<SamplingParams> MakeSampling(const GenerationRequest& request, const GenerationDefaults& defaults,
                                            std::int32_t vocab, std::int32_t max_model_len,
                                            std::vector<std::int32_t>& prompt);

}  // namespace spillway
