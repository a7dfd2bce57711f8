#pragma once

// Requests among which are sequences larger than a small device tier, and what they give in rounds and one by one.

#include <cstdint>
#include <utility>
#include <vector>

#include "tests/support/engine_harness.h"
#include "tests/support/turns.h"

namespace spillway::testing {

inline std::vector<std::int32_t> Join(std::vector<std::int32_t> head, const std::vector<std::int32_t>& tail) {
  head.insert(head.end(), tail.begin(), tail.end());
  return head;
}

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

inline std::vector<Collected> RunRounds(Rig& rig) { return RunTurns(rig, Rounds()); }

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
