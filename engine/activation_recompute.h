#pragma once

// Activation recomputation (KVPR): of a streamed sequence, the inputs of each layer are kept in the host tier beside
// keys and values, and the keys and values of some of its tokens are projected from them again while those of the
// others come over the link. Inputs are half the bytes with as many KV heads as heads, and no fewer from two heads to a
// KV head on: such models are refused. Here: the setting, whether it applies, and how many tokens.

#include <cstdint>

#include "absl/status/status.h"
#include "engine/cost_model.h"
#include "engine/input_layout.h"
#include "engine/model_config.h"
#include "engine/step_plan.h"
#include "kernels/kv_layout.h"

namespace spillway {

// How many tokens of each streamed sequence, whole blocks, where so many of its inputs are kept; or one of these.
inline constexpr std::int32_t kRecomputeOff = 0;
inline constexpr std::int32_t kRecomputeAuto = -1;  // as CostModel::ProjectedTokens says

InputLayout InputLayoutOf(const ModelConfig& config, const KvLayout& kv);

// UNIMPLEMENTED, with both numbers, for a model whose inputs are no smaller than its keys and values.
absl::Status CheckRecomputes(const ModelConfig& config);

// Of `slots` of the host tier, how many blocks of keys and values may have as home; the rest is for their inputs.
std::int64_t HomeSlotsBesideInputs(std::int64_t slots, const InputLayout& inputs, const KvLayout& kv);

// Home blocks of the step's streamed sequences whose keys and values are to be projected. `work` is the step's.
std::int32_t NumProjected(std::int32_t setting, const StepPlan& plan, const StepWork& work, const CostModel& costs);

}  // namespace spillway
