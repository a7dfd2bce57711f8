#pragma once

// CostReports: tells a CostModel what steps and transfers took, from counters that only grow. Engine thread only.

#include "engine/cost_model.h"
#include "engine/home_reader.h"
#include "engine/step_plan.h"
#include "engine/step_runner.h"
#include "kvstore/transfer_engine.h"

namespace spillway {

class CostReports {
 public:
  // Of what has come up since the last call.
  void OnTransfers(const TransferStats& restores, CostModel& model);
  // A step that `runner` has ended: what it was to compute, and the time it had to itself.
  void OnStep(const StepPlan& plan, const StepWork& work, double seconds, const StepRunner& runner, CostModel& model);

 private:
  // What the model has been told of.
  TransferStats restores_;
  HomeReader::Times home_times_;
  double load_stalled_seconds_ = 0;
};

}  // namespace spillway
