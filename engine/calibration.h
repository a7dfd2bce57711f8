#pragma once

// Calibration: the speeds of one model on one device, from a few real steps and copies before the engine is ready. What
// time does not allow to be measured is derived from what was; reports of the steps that are served correct it later.

#include "absl/status/statusor.h"
#include "engine/cost_model.h"
#include "engine/model.h"
#include "engine/step_runner.h"
#include "kernels/device.h"
#include "kvstore/kv_store.h"

namespace spillway {

struct CalibrationOptions {
  double budget_seconds =
      0.15;  // after a first token, which is always computed; a probe that would not end by then is left out
  std::int32_t max_step_tokens = 0;    // that `runner` takes
  std::int32_t max_model_len = 0;      // likewise
  bool has_link = false;               // there is a host tier
  LinkPacing pacing;                   // of the link
  std::size_t span_bytes = 4U << 20U;  // the largest copy that is measured; one block at least
};

// Start-up only, before anything else uses runner or store, whose blocks are all free before and after.
absl::StatusOr<CostModel> Calibrate(Device& device, const Model& model, StepRunner& runner, KvStore& store,
                                    const CalibrationOptions& options);

}  // namespace spillway
