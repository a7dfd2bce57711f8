#pragma once

// Paged causal attention. A work item is (sequence, kv head, tile of query rows), a query row being a (token, head of
// the group) pair. Scores: lanes are the 16 keys of a strip, one chain of fused multiply-adds over ascending head_dim.
// Values: lanes are head_dim, one chain over ascending tokens. So the arithmetic of a row does not depend on its
// neighbours.

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/stream.h"
#include "kernels/cpu/targets.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

// Query rows of one item: tokens [token_begin, token_end) of sequence `sequence`, all heads of kv head `kv_head`.
struct AttentionTile {
  std::int64_t sequence = 0;
  int kv_head = 0;
  std::int64_t token_begin = 0;  // row of the step
  std::int64_t token_end = 0;
};

struct AttentionBodies {
  void (*attend)(const AttentionArgs&, const AttentionTile&, Scratch&);
};

const AttentionBodies& AttentionBodiesOf(Target target);

void RunAttention(const AttentionBodies& bodies, const WorkPlace& place, const AttentionArgs& args);

}  // namespace spillway::cpu
