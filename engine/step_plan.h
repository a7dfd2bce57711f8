#pragma once

// StepPlan: what the next step computes. Plain data, made by Scheduler, executed by StepRunner.

#include <cstdint>
#include <span>
#include <vector>

#include "engine/sequence.h"

namespace spillway {

// What a step computes of a sequence: `count` tokens from position `begin` on, whose blocks are held.
struct PlannedSequence {
  // Null: it has ended since the step was launched, and what the step samples for it is discarded.
  Sequence* sequence = nullptr;
  bool samples = false;  // the chunk reaches the last token
  // Of a step that is launched behind one that runs (Scheduler::PlanAhead): the one token is what that step samples in
  // this row of its results. -1: the tokens are known.
  std::int32_t sampled_row = -1;

  bool is_ahead() const { return sampled_row >= 0; }
  std::int32_t begin() const { return sequence->num_computed + (is_ahead() ? sequence->num_planned : 0); }
  std::int32_t count() const { return is_ahead() ? 1 : sequence->num_planned; }
  std::int32_t num_outputs() const { return sequence->num_outputs() + (is_ahead() ? 1 : 0); }
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
  bool is_ahead() const { return !empty() && sequences.front().is_ahead(); }
  std::span<const PlannedSequence> streamed() const {
    return std::span(sequences).last(static_cast<std::size_t>(num_streamed));
  }
};

}  // namespace spillway
