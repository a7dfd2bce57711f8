// Attention at the shape of Llama-3-8B (32 heads on 8 kv heads, head_dim 128), one layer at a time: decode against
// measured memory bandwidth, decode that reads its KV from host memory in place against the link, prefill in FLOP/s.

#include <algorithm>
#include <cstdio>
#include <random>

#include "bench/gpu/measure.h"

namespace spillway::bench {
namespace {

constexpr int kHeads = 32;
constexpr KvLayout kLayout = {1, 8, 128, DType::kBF16};

// Sequences of `context` tokens each, of which the last num_new are new, over a pool of their own.
struct Problem {
  Buffer pool;
  Buffer q;
  Buffer out;
  Buffer query_begin;
  Buffer first_position;
  Buffer block_begin;
  Buffer block_table;
  AttentionArgs args;

  Problem(Bench& bench, MemoryKind kind, int num_sequences, int context, int num_new) {
    const int num_blocks = (context + kBlockTokens - 1) / kBlockTokens;
    const auto total = static_cast<std::size_t>(num_sequences) * static_cast<std::size_t>(num_blocks);
    std::vector<std::int32_t> table(total);
    for (std::size_t i = 0; i < total; ++i) table[i] = static_cast<std::int32_t>(i);
    std::mt19937 random(3);
    std::shuffle(table.begin(), table.end(), random);
    std::vector<std::int32_t> queries;
    std::vector<std::int32_t> blocks;
    for (int s = 0; s <= num_sequences; ++s) {
      queries.push_back(s * num_new);
      blocks.push_back(s * num_blocks);
    }
    pool = bench.RandomBF16(kind, total * kLayout.block_bytes());
    const std::size_t size = static_cast<std::size_t>(num_sequences * num_new) * kHeads * 128;
    q = bench.RandomBF16(MemoryKind::kDevice, size * 2);
    out = bench.Allocate(MemoryKind::kDevice, size * 2);
    query_begin = bench.Upload(queries);
    first_position =
        bench.Upload(std::vector<std::int32_t>(static_cast<std::size_t>(num_sequences), context - num_new));
    block_begin = bench.Upload(blocks);
    block_table = bench.Upload(table);
    args.q = q.get();
    args.q_dtype = DType::kBF16;
    args.num_heads = kHeads;
    args.scale = 0.0884F;
    args.kv = {pool.get(), kLayout};
    args.num_sequences = num_sequences;
    args.num_tokens = std::int64_t{num_sequences} * num_new;
    args.query_begin = reinterpret_cast<const std::int32_t*>(query_begin.get());
    args.first_position = reinterpret_cast<const std::int32_t*>(first_position.get());
    args.block_begin = reinterpret_cast<const std::int32_t*>(block_begin.get());
    args.block_table = reinterpret_cast<const std::int32_t*>(block_table.get());
    args.out = out.get();
    args.out_dtype = DType::kBF16;
  }
};

void Decode(Bench& bench, MemoryKind kind, int num_sequences, int context, bool has_bias = false) {
  const double kv_bytes = 1.0 * num_sequences * context * kLayout.row_bytes() * kLayout.num_kv_heads;
  // Repeated runs over less than L2 would measure L2: rotate among pools that together exceed it fourfold.
  const double want = kind == MemoryKind::kDevice ? 4.0 * bench.properties().l2CacheSize : 0;
  const int num_pools = std::clamp(static_cast<int>(want / kv_bytes) + 1, 1, 64);
  std::vector<Problem> problems;
  problems.reserve(static_cast<std::size_t>(num_pools));
  for (int i = 0; i < num_pools; ++i) problems.emplace_back(bench, kind, num_sequences, context, 1);
  const auto stride = static_cast<std::size_t>(kLayout.num_kv_heads) * kBlockTokens;
  Buffer bias;
  if (has_bias) {
    const auto num_blocks = static_cast<std::size_t>(num_sequences) * static_cast<std::size_t>(context / kBlockTokens);
    bias = bench.Upload(std::vector<float>(num_blocks * stride, 1.0F));
  }
  for (Problem& problem : problems) {
    problem.args.row_bias = reinterpret_cast<const float*>(bias.get());
    problem.args.row_bias_stride = static_cast<std::int64_t>(stride);
  }
  const Measured time = bench.Time([&](int run) {
    bench.kernels().Attention(bench.stream(), problems[static_cast<std::size_t>(run % num_pools)].args);
  });
  const bool is_host = kind != MemoryKind::kDevice;
  char what[96];
  std::snprintf(what, sizeof(what), "decode%s%s, batch %d, context %d", is_host ? " from host memory" : "",
                has_bias ? " with a bias" : "", num_sequences, context);
  bench.Report({"attention", what, time, kv_bytes / time.median_us * 1e-3, "GB/s",
                is_host ? bench.pinned_gbps : bench.hbm_gbps});
}

// A sequence whose first three quarters are read from host memory in place, in a pass of their own, and the rest from
// the device: what decoding beyond the device's memory does in every layer.
void StreamedDecode(Bench& bench, int context) {
  const int at_home = context / 4 * 3 / kSegmentTokens * kSegmentTokens;
  Problem home(bench, MemoryKind::kPinnedHost, 1, at_home, 1);
  Problem here(bench, MemoryKind::kDevice, 1, context - at_home, 1);
  const Buffer ranges = bench.Upload(std::vector<std::int32_t>{0, at_home, context});
  const Buffer position = bench.Upload(std::vector<std::int32_t>{context - 1});
  const Buffer states = bench.Allocate(MemoryKind::kDevice, kHeads * (128 + 2) * sizeof(float));
  const auto* const range = reinterpret_cast<const std::int32_t*>(ranges.get());
  home.args.pass = AttentionPass::kFirst;
  here.args.pass = AttentionPass::kLast;
  home.args.key_begin = range;
  home.args.key_end = here.args.key_begin = range + 1;
  here.args.key_end = range + 2;
  for (AttentionArgs* const args : {&home.args, &here.args}) {
    args->q = here.q.get();
    args->first_position = reinterpret_cast<const std::int32_t*>(position.get());
    args->states = reinterpret_cast<float*>(states.get());
  }
  const Measured time = bench.Time([&](int) {
    bench.kernels().Attention(bench.stream(), home.args);
    bench.kernels().Attention(bench.stream(), here.args);
  });
  const double host_bytes = 1.0 * at_home * kLayout.row_bytes() * kLayout.num_kv_heads;
  char what[96];
  std::snprintf(what, sizeof(what), "decode in two passes, %d of %d tokens in host memory", at_home, context);
  bench.Report({"attention", what, time, host_bytes / time.median_us * 1e-3, "GB/s", bench.pinned_gbps});
}

void Prefill(Bench& bench, int num_sequences, int context, int num_new) {
  const Problem problem(bench, MemoryKind::kDevice, num_sequences, context, num_new);
  const Measured time = bench.Time([&](int) { bench.kernels().Attention(bench.stream(), problem.args); });
  // Two products of 2 * head_dim operations per (query, visible key, head).
  const double pairs = 1.0 * num_sequences * num_new * (context - num_new + (num_new + 1) / 2.0);
  char what[96];
  std::snprintf(what, sizeof(what), "prefill, batch %d, %d new of %d", num_sequences, num_new, context);
  bench.Report({"attention", what, time, pairs * kHeads * 4 * 128 / time.median_us * 1e-6, "TFLOP/s", 0});
}

}  // namespace

void RunAttentionBench(Bench& bench) {
  for (const int context : {1024, 4096, 16384, 32768, 131072}) {
    for (const int batch : {1, 8, 64}) {
      const double bytes = 1.0 * batch * context * kLayout.block_bytes() / kBlockTokens;
      if (bytes < 0.6 * static_cast<double>(bench.device().free_bytes())) {
        Decode(bench, MemoryKind::kDevice, batch, context);
      }
    }
  }
  Decode(bench, MemoryKind::kDevice, 8, 32768, /*has_bias=*/true);
  Decode(bench, MemoryKind::kPinnedHost, 1, 32768);
  Decode(bench, MemoryKind::kPinnedHost, 8, 8192);
  StreamedDecode(bench, 32768);
  StreamedDecode(bench, 131072);
  Prefill(bench, 16, 1024, 1024);
  Prefill(bench, 4, 4096, 4096);
  Prefill(bench, 1, 16384, 16384);
  Prefill(bench, 1, 32768, 2048);
}

}  // namespace spillway::bench
