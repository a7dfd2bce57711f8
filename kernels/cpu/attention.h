#pragma once

// Paged causal attention. A work item is a tile: (sequence, kv heads, query rows, range of keys), a query row being a
// (token, head of the group) pair; of several kv heads only where many sequences decode. The arithmetic of a row does
// not depend on its neighbours, nor on how its keys are cut into items: segments are partial states merged in position
// order.
//
// F32, and bf16 where the target has no product of bf16 pairs: lanes of scores are the 16 keys of a strip, one chain of
// fused multiply-adds over ascending head_dim; lanes of values are head_dim, one chain over ascending tokens. Bf16 on
// avx512_bf16 and amx: attention_bf16.cc, and attention_decode.cc for tiles of one token on amx.

#include <cstddef>
#include <cstdint>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/stream.h"
#include "kernels/cpu/targets.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

struct AttentionBodies {
  std::int64_t rows_per_tile;  // among which the rearranging of keys and values is shared, at most
  int heads_of_token;          // kv heads of a tile of one token, at most; other tiles are of one
  void (*attend)(const AttentionArgs&, const AttentionTile&, Scratch&);
  // Finishes the rows of a tile from the segment states that its items kept. The tile spans all its keys.
  void (*merge)(const AttentionArgs&, const AttentionTile&, Scratch&);
};

const AttentionBodies& AttentionBodiesOf(Target target);
// Null: the target has none.
const AttentionBodies* Bf16AttentionBodiesOf(Target target);

void RunAttention(Target target, const WorkPlace& place, const AttentionArgs& args);

}  // namespace spillway::cpu
