#include "engine/activation_recompute.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/sequence.h"

namespace spillway {

InputLayout InputLayoutOf(const ModelConfig& config, const KvLayout& kv) {
  return {.num_layers = config.num_layers, .hidden = config.hidden, .dtype = kv.dtype};
}

absl::Status CheckRecomputes(const ModelConfig& config) {
  const bool is_grouped = config.num_heads >= 2 * config.num_kv_heads;
  const int width = 2 * config.num_kv_heads * config.head_dim;
  if (!is_grouped && config.hidden < width) return absl::OkStatus();
  return absl::UnimplementedError(
      absl::StrCat("activation recomputation: the model has ", config.num_heads, " heads to ", config.num_kv_heads,
                   " KV heads and inputs of ", config.hidden, " values beside ", width,
                   " of keys and values: from two heads to a KV head on, or with inputs no smaller, nothing is saved"));
}

std::int64_t HomeSlotsBesideInputs(std::int64_t slots, const InputLayout& inputs, const KvLayout& kv) {
  const auto per_slot = static_cast<std::int64_t>(inputs.blocks_per_slot(kv));
  return slots * per_slot / (per_slot + 1);
}

std::int32_t NumProjected(std::int32_t setting, const StepPlan& plan, const StepWork& work, const CostModel& costs) {
  if (setting == kRecomputeOff) return 0;
  std::int32_t num_home = 0;
  std::int32_t num_kept = 0;
  std::int32_t num_wanted = 0;
  for (const PlannedSequence& planned : plan.streamed()) {
    const Sequence& sequence = *planned.sequence;
    std::int32_t kept = 0;
    for (std::int32_t i = 0; i < sequence.num_home; ++i) kept += sequence.HasInputs(i) ? 1 : 0;
    num_home += sequence.num_home;
    num_kept += kept;
    num_wanted += std::min(kept, BlocksFor(setting));
  }
  if (setting != kRecomputeAuto) return num_wanted;
  if (num_kept == 0) return 0;
  const std::int64_t tokens =
      costs.ProjectedTokens(std::int64_t{num_home} * kBlockTokens, std::int64_t{num_kept} * kBlockTokens, work);
  return static_cast<std::int32_t>(tokens / kBlockTokens);
}

}  // namespace spillway
