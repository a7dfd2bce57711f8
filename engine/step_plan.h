#pragma once

// StepPlan: what the next step computes. Plain data, made by Scheduler, executed by StepRunner.

#include <cstdint>
#include <vector>

namespace spillway {

struct Sequence;

struct PlannedSequence {
  Sequence* sequence = nullptr;  // tokens [num_computed, num_computed + num_planned), whose blocks are held
  bool samples = false;          // the chunk reaches the last token
};

struct StepPlan {
  std::vector<PlannedSequence> sequences;
  std::int32_t num_tokens = 0;
  std::int32_t num_prefill_tokens = 0;  // of sequences with more than one token to compute
  std::int32_t num_preempted = 0;

  bool empty() const { return sequences.empty(); }
};

}  // namespace spillway
