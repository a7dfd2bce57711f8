#pragma once

// Load on an engine of a benchmark: sequences of made-up tokens that start together, greedy, to a fixed length.

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "bench/waiter.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"

namespace spillway {

// Returns when all have ended. Ids count on from `last_id`, so that no prompt is like one before.
inline void GenerateTogether(Engine& engine, int num_sequences, std::int32_t prompt, std::int32_t output,
                             std::uint64_t& last_id) {
  std::vector<std::shared_ptr<Waiter>> sinks;
  std::vector<SequenceRequest> requests;
  for (int s = 0; s < num_sequences; ++s) {
    sinks.push_back(std::make_shared<Waiter>());
    SequenceRequest request;
    request.id = ++last_id;
    const std::int32_t vocab = engine.model().config().vocab;
    for (std::int32_t i = 0; i < prompt; ++i) {
      request.prompt.push_back((i * 7919 + static_cast<std::int32_t>(last_id % 1000) * 104729) % vocab);
    }
    request.sampling.temperature = 0;
    request.sampling.max_tokens = output;
    request.sampling.ignore_eos = true;
    request.sink = sinks.back();
    requests.push_back(std::move(request));
  }
  SPILLWAY_CHECK(engine.Submit(std::move(requests)).ok());
  for (const auto& sink : sinks) sink->Await();
}

}  // namespace spillway
