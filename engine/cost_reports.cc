#include "engine/cost_reports.h"

#include <utility>

namespace spillway {

void CostReports::OnTransfers(const TransferStats& restores, CostModel& model) {
  for (std::size_t i = 0; i < kNumCopySizes; ++i) {
    const CopyStats& known = restores_.by_copy_size[i];
    const CopyStats& copies = restores.by_copy_size[i];
    if (copies.copies == known.copies) continue;
    const auto bytes = static_cast<double>(copies.bytes - known.bytes);
    model.OnTransfer(bytes, bytes / static_cast<double>(copies.copies - known.copies), copies.seconds - known.seconds);
  }
  restores_ = restores;
}

// Only what is not copying, waiting for the link or projecting is the work's.
void CostReports::OnStep(const StepPlan& plan, const StepWork& work, double seconds, const StepRunner& runner,
                         CostModel& model) {
  if (plan.num_streamed > 0 && runner.is_timing_streams()) {
    const HomeReader::Times now = runner.home_times();
    const HomeReader::Times known = std::exchange(home_times_, now);
    const double projecting = now.projecting_seconds - known.projecting_seconds;
    model.OnStream(now.strips.bytes + now.inputs.bytes - known.strips.bytes - known.inputs.bytes,
                   now.strips.seconds + now.inputs.seconds - known.strips.seconds - known.inputs.seconds);
    model.OnProjection(now.projected_flops - known.projected_flops, projecting);
    seconds -= projecting + now.waiting_seconds - known.waiting_seconds;
  }
  const double stalled = runner.load_stalled_seconds();
  seconds -= stalled - std::exchange(load_stalled_seconds_, stalled);
  model.OnStep(work, seconds);
}

}  // namespace spillway
