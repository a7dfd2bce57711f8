#pragma once

// The experiments of papers_bench. Each prints its table and returns it.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "bench/paced_rig.h"

namespace spillway::papers_bench {

constexpr std::int32_t kStepTokens = 512;
constexpr std::uint32_t kHostBlocks = 16384;

// Seeded prompts, no two alike.
class Prompts {
 public:
  explicit Prompts(std::uint32_t seed) : random_(seed) {}
  std::vector<std::int32_t> Next(std::int32_t num_tokens) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(num_tokens));
    for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(random_() % 256);
    return tokens;
  }
  std::vector<std::int32_t> Continue(std::vector<std::int32_t> prefix, std::int32_t num_tokens) {
    const std::vector<std::int32_t> more = Next(num_tokens);
    prefix.insert(prefix.end(), more.begin(), more.end());
    return prefix;
  }

 private:
  std::mt19937 random_;
};

inline double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Seconds until the first token of `prompt`, whose first `cached` tokens are in some tier; returns once its blocks are
// written through.
inline double TimeToFirstToken(Engine& engine, const std::vector<std::int32_t>& prompt) {
  const auto waiter = PacedRig::Submit(engine, {{.prompt = prompt}}, 1).front();
  waiter->Await();
  PacedRig::AwaitWriteThrough(engine);
  return waiter->first_token_seconds();
}

// What a server that has been up for a while has behind it: every block of the device tier was written once, so that
// its memory is there, and the cost model has followed steps of so many new tokens.
inline void WarmUp(Engine& engine, std::int64_t device_blocks, Prompts& prompts,
                   const std::vector<std::int32_t>& sizes) {
  constexpr std::int32_t kLong = 4096;
  constexpr int kRounds = 8;
  for (std::int64_t left = device_blocks * kBlockTokens; left > 0; left -= kLong) {
    TimeToFirstToken(engine, prompts.Next(kLong));
  }
  for (int i = 0; i < kRounds; ++i) {
    for (const std::int32_t size : sizes) TimeToFirstToken(engine, prompts.Next(size));
  }
}

// Links in bytes per second.
// Time to first token over kappa, with the prefix below the device and on it, measured and predicted.
nlohmann::json MeasureOverhead(PacedRig& rig, const std::vector<double>& links);
// The same prompt with its prefix loaded, recomputed, split, and as the cost model chooses.
nlohmann::json MeasureChoices(PacedRig& rig, const std::vector<double>& links);
// Ten minutes of a trace, cut to this machine's size, served and replayed.
nlohmann::json CompareReplay(PacedRig& rig, const std::string& trace_path,
                             const std::vector<SchedulingPolicy>& policies);

}  // namespace spillway::papers_bench
