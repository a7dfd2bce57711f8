#pragma once

// Attention over bf16 of one token, on AMX: what decoding consists of. The bits are those of attention_bf16.cc.

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/scratch.h"

namespace spillway::cpu {

// Rows of a tile, and kv heads, at most.
inline constexpr std::int64_t kMostDecodeRows = 16;
inline constexpr int kMostDecodeHeads = 4;

// Whether AttendDecode attends a tile.
bool IsDecode(const AttentionArgs& args, const AttentionTile& tile);

// On a thread that has no tiles in use. HasAmx().
void AttendDecode(const AttentionArgs& args, const AttentionTile& tile, Scratch& scratch);

}  // namespace spillway::cpu
