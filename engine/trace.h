#pragma once

// Trace: recorded arrivals and lengths of requests, and which prompts begin alike. Read from
//
//   Mooncake   JSON lines: timestamp (ms), input_length, output_length, hash_ids (one for each 512 tokens of the
//   prompt;
//              equal ids at equal places are equal text)
//   Azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens; nothing is shared
//
// Neither holds text: prompts are made up from the ids.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace spillway {

inline constexpr std::int32_t kTraceIdTokens = 512;

struct TraceRequest {
  double arrival_seconds = 0;  // after the first request
  std::int32_t prompt_tokens = 0;
  std::int32_t output_tokens = 0;
  std::vector<std::int32_t> ids;  // one for each Trace::id_tokens of the prompt, the last one perhaps in part
};

struct Trace {
  std::string name;                         // the file's, without its folder
  std::int32_t id_tokens = kTraceIdTokens;  // of the prompt that an id stands for
  std::vector<TraceRequest> requests;       // by arrival
};

// INVALID_ARGUMENT names file, line and field; NOT_FOUND a file that cannot be opened.
absl::StatusOr<Trace> ReadTrace(const std::string& path);

// The prompt that the ids stand for: equal ids give equal tokens. With `vocab` 0 tokens are unique to id and place;
// else they are spread over [0, vocab).
std::vector<std::int32_t> PromptOf(const Trace& trace, const TraceRequest& request, std::int32_t vocab);

}  // namespace spillway
