#pragma once

// Requests among which are sequences larger than a small device tier, and what they give in rounds and one by one.

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

inline std::vector<std::int32_t> Join(std::vector<std::int32_t> head, const std::vector<std::int32_t>& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

struct Turn {
  SequenceRequest request;
  std::size_t abort_after = 0;  // tokens; 0: never
};

// Two rounds, each submitted at once: sequences of 1.2 to 2.5 times a device tier of 33 blocks among short ones, some
// with a long prefix in common, some as two choices, some aborted while they stream.
inline std::vector<std::vector<Turn>> Rounds() {
  const std::vector<std::int32_t> shared = Tokens(1, 600);
  std::vector<std::vector<Turn>> rounds(2);
  for (std::uint32_t round = 0; round < rounds.size(); ++round) {
    const auto add = [&](std::vector<std::int32_t> prompt, std::int32_t max_tokens, std::uint32_t choice = 0,
                         std::size_t abort_after = 0) {
      Turn turn{.request = MakeRequest(std::move(prompt), max_tokens), .abort_after = abort_after};
      turn.request.choice = choice;
      if (rounds[round].size() % 3 == 1) {
        turn.request.sampling.temperature = 0.8F;
        turn.request.sampling.seed = 40 + rounds[round].size();
      }
      rounds[round].push_back(std::move(turn));
    };
    add(Join(shared, Tokens(2, 150 + 90 * round)), 12);
    add(Tokens(3, 60 + 30 * round), 9);
    add(Tokens(4, 1290), 40, /*choice=*/0, /*abort_after=*/round == 0 ? 5 : 0);
    for (const std::uint32_t choice : {0U, 1U}) add(Join(shared, Tokens(5, 41)), 25, choice);
    add(Tokens(6, 500), 60);  // grows beyond the device tier while it decodes
    add(Tokens(7, 17), 5);
  }
  return rounds;
}

inline std::vector<Collected> RunRounds(Rig& rig) {
  std::vector<Collected> all;
  for (std::vector<Turn>& round : Rounds()) {
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

inline std::vector<Collected> RunRoundsSolo(Rig& rig) {
  std::vector<Collected> solo;
  for (std::vector<Turn>& round : Rounds()) {
    for (Turn& turn : round) {
      Collected collected = rig.RunOne(std::move(turn.request));
      if (turn.abort_after > 0) collected.tokens.resize(turn.abort_after);
      solo.push_back(std::move(collected));
    }
  }
  return solo;
}

}  // namespace spillway::testing
