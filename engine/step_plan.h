#pragma once

// StepPlan: what the next step computes. Plain data, made by Scheduler, executed by StepRunner.

#include <cstdint>
#include <span>
#include <vector>

namespace spillway {

struct Sequence;

struct PlannedSequence {
  Sequence* sequence = nullptr;  // tokens [num_computed, num_computed + num_planned), whose blocks are held
  bool samples = false;          // the chunk reaches the last token
};

struct StepPlan {
  std::vector<PlannedSequence> sequences;  // the streamed ones, which have blocks at home only, behind the others
  std::int32_t num_streamed = 0;
  std::int32_t num_arriving = 0;  // blocks that come up inside the step, see LayerLoader
  std::int32_t num_tokens = 0;
  std::int32_t num_prefill_tokens = 0;  // of sequences with more than one token to compute
  std::int32_t num_preempted = 0;
  std::int32_t num_projected = 0;  // of the streamed ones' home blocks; set by the engine, see NumProjected

  bool empty() const { return sequences.empty(); }
  std::span<const PlannedSequence> streamed() const {
    return std::span(sequences).last(static_cast<std::size_t>(num_streamed));
  }
};

}  // namespace spillway
