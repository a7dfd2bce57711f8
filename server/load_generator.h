#pragma once

// Load on an OpenAI-compatible HTTP server: streamed completions of random prompts, from one thread, however many are
// open.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace spillway {

struct LoadOptions {
  std::string host;
  std::uint16_t port = 0;
  std::string model;    // empty: what /v1/models lists first
  std::string api_key;  // empty: none
  std::int64_t num_prompts = 1;
  double request_rate = 0;           // per second, exponentially spaced; infinity: all at once
  std::int64_t max_concurrency = 0;  // 0: no bound
  std::int64_t input_len = 1;
  std::int64_t output_len = 1;
  bool ignore_eos = false;
  std::uint64_t seed = 0;
};

// Times in seconds. A chunk of the stream is an arrival, however many tokens it holds.
struct LoadedRequest {
  std::string error;  // not empty: failed
  double first_token_seconds = 0;
  std::vector<double> inter_token_seconds;
  double total_seconds = 0;
  std::int64_t prompt_tokens = 0;
  std::int64_t output_tokens = 0;
};

struct LoadResult {
  std::string model;
  double seconds = 0;
  std::vector<LoadedRequest> requests;
};

// Blocks. An error only where the server cannot be asked for its model; failures of requests are in the result.
absl::StatusOr<LoadResult> GenerateLoad(const LoadOptions& options,
                                        const std::function<void(std::int64_t done, std::int64_t total)>& progress);

}  // namespace spillway
