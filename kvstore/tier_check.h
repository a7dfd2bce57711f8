#pragma once

// A check of the tiers themselves: blocks are written on the device, stored, forgotten there, brought back and
// compared, through the same transfers that serve. At start-up, before anything else uses the tiers, and in `spillway
// check`.

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kv_layout.h"
#include "kvstore/host_tier.h"

namespace spillway {

struct TierCheck {
  int host_blocks = 0;   // compared after they came back from the host tier
  int lower_blocks = 0;  // compared after they came back from the tier below it
  double seconds = 0;
};

// `num_blocks` fit the host tier. Leaves the host tier empty, and the blocks, under keys that no prompt has, in the
// tier below. DATA_LOSS: names tier, block and byte that differ. Others: what did not work.
absl::StatusOr<TierCheck> CheckTiers(Device& device, HostTier& host, const KvLayout& layout, int num_blocks);

}  // namespace spillway
