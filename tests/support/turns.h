#pragma once

// Rounds of requests that are submitted at once, and what they give.

#include <cstddef>
#include <cstdint>
#include <future>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/check.h"
#include "tests/support/engine_harness.h"

namespace spillway::testing {

inline std::vector<std::int32_t> Tokens(std::uint32_t seed, std::size_t count) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(count);
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(3 + random() % 280);
  return tokens;
}

struct Turn {
  SequenceRequest request;
  std::size_t abort_after = 0;  // tokens; 0: never
};

// All rounds, each submitted at once. Aborted turns contribute the tokens they surely reached.
inline std::vector<Collected> RunTurns(Rig& rig, std::vector<std::vector<Turn>> rounds) {
  std::vector<Collected> all;
  for (std::vector<Turn>& round : rounds) {
    std::vector<std::future<Collected>> results;
    std::vector<std::size_t> aborts;
    std::vector<SequenceRequest> requests;
    for (Turn& turn : round) {
      auto sink = std::make_shared<CollectingSink>();
      if (turn.abort_after > 0) {
        sink->on_token = [engine = rig.engine.get(), id = turn.request.id,
                          after = turn.abort_after](const Collected& so_far) {
          if (so_far.tokens.size() == after) engine->Cancel(id);
        };
      }
      results.push_back(sink->Result());
      aborts.push_back(turn.abort_after);
      turn.request.sink = std::move(sink);
      requests.push_back(std::move(turn.request));
    }
    const absl::Status status = rig.engine->Submit(std::move(requests));
    SPILLWAY_CHECK(status.ok()) << status;
    for (std::size_t i = 0; i < results.size(); ++i) {
      Collected collected = results[i].get();
      EXPECT_TRUE(collected.error.ok()) << collected.error;
      if (aborts[i] > 0) collected.tokens.resize(aborts[i]);
      all.push_back(std::move(collected));
    }
  }
  return all;
}

}  // namespace spillway::testing
