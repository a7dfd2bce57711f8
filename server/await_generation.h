#pragma once

// A generation, start to end, for callers that can block.

#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "server/service.h"

namespace spillway {

struct GeneratedChoice {
  std::string text;
  std::vector<std::int32_t> tokens;
  OutputFinish finish;
};

struct GenerationResult {
  PromptInfo prompt;
  std::vector<GeneratedChoice> choices;
};

// Any thread but the Service's own. `on_chunk` (may be null) runs on Service threads, in order, before this returns.
absl::StatusOr<GenerationResult> AwaitGeneration(Service& service, GenerationRequest request,
                                                 std::function<void(const OutputChunk&)> on_chunk = nullptr);

}  // namespace spillway
