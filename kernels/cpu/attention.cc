#include "kernels/cpu/attention.h"

#include <algorithm>

namespace spillway::cpu {
namespace {

// Rows among which the transposition of a strip is shared, at most.
constexpr std::int64_t kRowsPerTile = 128;

}  // namespace

void RunAttention(const AttentionBodies& bodies, const WorkPlace& place, const AttentionArgs& args) {
  const int num_kv_heads = args.kv.layout.num_kv_heads;
  const std::int64_t group = args.num_heads / num_kv_heads;
  const std::int64_t tokens_per_tile = std::max<std::int64_t>(1, kRowsPerTile / group);

  // tile_begin[s]: tiles of the sequences before s, for one kv head.
  auto* const tile_begin = reinterpret_cast<std::int64_t*>(
      place.call.Get(static_cast<std::size_t>(args.num_sequences + 1) * sizeof(std::int64_t)));
  tile_begin[0] = 0;
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const std::int64_t num_tokens = args.query_begin[s + 1] - args.query_begin[s];
    tile_begin[s + 1] = tile_begin[s] + (num_tokens + tokens_per_tile - 1) / tokens_per_tile;
  }
  place.pool.ParallelFor(
      tile_begin[args.num_sequences] * num_kv_heads, place.worker, [&](std::int64_t item, Scratch& scratch) {
        const std::int64_t tile = item / num_kv_heads;
        const std::int64_t s = std::upper_bound(tile_begin, tile_begin + args.num_sequences + 1, tile) - tile_begin - 1;
        const std::int64_t begin = args.query_begin[s] + (tile - tile_begin[s]) * tokens_per_tile;
        const std::int64_t end = std::min<std::int64_t>(begin + tokens_per_tile, args.query_begin[s + 1]);
        bodies.attend(args, {s, static_cast<int>(item % num_kv_heads), begin, end}, scratch);
      });
}

}  // namespace spillway::cpu
