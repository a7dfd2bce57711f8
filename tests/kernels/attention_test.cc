#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/sampler.h"
#include "tests/kernels/attention_rig.h"

namespace spillway {
namespace {

class AttentionTest : public testing::TestWithParam<TargetAndDType> {
 protected:
  std::string target() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  // Weights are rounded to bf16 where the target multiplies pairs of bf16: its error is compared by norm.
  void ExpectClose(const std::vector<float>& actual, const std::vector<float>& oracle, float tolerance,
                   const std::string& what) const {
    if (dtype() == DType::kBF16 && (target() == "avx512_bf16" || target() == "amx")) {
      ExpectNearByNorm(actual, oracle, 2e-3, what);
    } else {
      ExpectNear(actual, oracle, tolerance, what);
    }
  }
  bool is_slow() const { return kEffort == 1 || target() == "reference" || target() == "scalar"; }
};

TEST_P(AttentionTest, MatchesTheOracle) {
  Rig rig(target());
  Random random(5);
  for (const Heads heads : {Heads{1, 1, 8}, {2, 3, 12}, {2, 2, 64}, {1, 7, 80}, {1, 8, 128}, {3, 1, 20}}) {
    for (const std::size_t num_tokens : {1, 2, 15, 16, 17, 31, 33, 255, 256, 257, 530}) {
      if (is_slow() && num_tokens > (kEffort > 1 ? 300U : 40U) && heads.head_dim > 12) continue;
      Pool pool(heads, dtype(), 2, 40, num_tokens);
      const std::vector<float> rows = random.Normals(RowsSize(pool, num_tokens));
      const std::vector<std::int32_t> blocks = pool.Add(rows, 1);
      for (const std::size_t num_new : {std::size_t{1}, std::min<std::size_t>(num_tokens, 21)}) {
        Part part;
        part.blocks = blocks;
        part.first_position = static_cast<std::int32_t>(num_tokens - num_new);
        part.q =
            random.Normals(num_new * static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim), 2);
        ExpectClose(RunAttention(rig, pool, heads.group, 1, dtype(), {part}),
                    Oracle(pool, heads.group, dtype(), rows, part), 1e-5F,
                    std::to_string(num_new) + " of " + std::to_string(num_tokens) + " tokens, head_dim " +
                        std::to_string(heads.head_dim));
      }
    }
  }
}

TEST_P(AttentionTest, ASlidingWindowMatchesTheOracleHoweverTokensAreCut) {
  Rig rig(target(), 3);
  Random random(12);
  for (const Heads heads : {Heads{2, 3, 12}, {1, 2, 64}, {1, 8, 128}}) {
    if (is_slow() && heads.head_dim > 12) continue;
    constexpr std::size_t kTokens = kEffort > 1 ? 620 : 300;
    const std::size_t token_size = static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim);
    Pool pool(heads, dtype(), 1, 50, 13);
    const std::vector<float> rows = random.Normals(RowsSize(pool, kTokens));
    const std::vector<std::int32_t> blocks = pool.Add(rows, 0);
    for (const std::int32_t window : {1, 40, 100, 256, 300, 1000}) {
      const auto run = [&](std::size_t begin, std::size_t end, const std::vector<float>& q) {
        Part part{blocks, static_cast<std::int32_t>(begin), q};
        part.q.assign(q.begin() + static_cast<std::ptrdiff_t>((begin - (kTokens - 90)) * token_size),
                      q.begin() + static_cast<std::ptrdiff_t>((end - (kTokens - 90)) * token_size));
        AttentionCall call(pool, heads.group, 0, dtype(), {part});
        call.args.window = window;
        return std::pair(call.Run(rig), part);
      };
      const std::vector<float> q = random.Normals(90 * token_size, 2);
      const std::string what = "window " + std::to_string(window) + ", head_dim " + std::to_string(heads.head_dim);
      const auto [whole, part] = run(kTokens - 90, kTokens, q);
      ExpectClose(whole, Oracle(pool, heads.group, dtype(), rows, part, static_cast<std::size_t>(window)), 1e-5F, what);
      for (const std::size_t t : {kTokens - 90, kTokens - 47, kTokens - 1}) {
        const std::size_t at = (t - (kTokens - 90)) * token_size;
        ExpectSameBits(run(t, t + 1, q).first,
                       {whole.begin() + static_cast<std::ptrdiff_t>(at),
                        whole.begin() + static_cast<std::ptrdiff_t>(at + token_size)},
                       what + ", alone");
      }
    }
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  Rig rig(target());
  Random random(6);
  constexpr Heads kHeads = {1, 2, 16};
  Pool pool(kHeads, dtype(), 1, 40, 1);
  const std::vector<float> rows = random.Normals(RowsSize(pool, 300), 100);
  Part part;
  part.blocks = pool.Add(rows, 0);
  part.first_position = 298;
  part.q = random.Normals(2 * 2 * 16, 100);
  // Scores of some 10^5: their last bits decide between near-equal keys, hence the wide tolerance.
  ExpectClose(RunAttention(rig, pool, kHeads.group, 0, dtype(), {part}),
              Oracle(pool, kHeads.group, dtype(), rows, part), 0.05F, "large");
}

// Infinities and NaN among the values of tokens that a query does not see. Chunks make them future tokens of one call.
TEST_P(AttentionTest, WhatATokenDoesNotSeeDoesNotReachIt) {
  Random random(8);
  for (const Heads heads : {Heads{1, 2, 16}, {2, 3, 40}}) {
    constexpr std::size_t kTokens = 300;
    constexpr std::size_t kOld = 261;
    const std::size_t token_size = static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim);
    Pool pool(heads, dtype(), 1, 40, 8);
    std::vector<float> rows = random.Normals(RowsSize(pool, kTokens));
    for (const std::size_t bad : {275, 290}) {
      std::fill(rows.begin() + static_cast<std::ptrdiff_t>(RowsSize(pool, bad)),
                rows.begin() + static_cast<std::ptrdiff_t>(RowsSize(pool, bad + 1)),
                bad == 275 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
    }
    Part part;
    part.blocks = pool.Add(rows, 0);
    part.first_position = kOld;
    part.q = random.Normals((kTokens - kOld) * token_size);
    Rig rig(target());
    const std::vector<float> whole = RunAttention(rig, pool, heads.group, 0, dtype(), {part});
    Part before = part;
    before.q.resize((275 - kOld) * token_size);
    const std::vector<float> expected = RunAttention(rig, pool, heads.group, 0, dtype(), {before});
    ExpectSameBits({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(expected.size())}, expected, "before");
    for (const float value : expected) ASSERT_TRUE(std::isfinite(value));
  }
}

// Values that are not finite reach the rows that see them, and none whose window begins behind them.
TEST_P(AttentionTest, WhatLiesBeforeAWindowDoesNotReachARow) {
  if (target().starts_with("cuda")) GTEST_SKIP() << "values before a window must be finite there";
  Random random(12);
  constexpr std::size_t kTokens = 300;
  constexpr std::size_t kBad = 200;
  constexpr std::int32_t kWindow = 40;
  for (const Heads heads : {Heads{1, 2, 16}, {2, 3, 40}, {1, 4, 64}}) {
    const std::size_t token_size = static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim);
    const std::vector<float> rows = random.Normals(RowsSize(Pool(heads, dtype(), 1, 1, 1), kTokens));
    std::vector<float> bad_rows = rows;
    for (const std::size_t bad : {std::size_t{3}, kBad}) {
      std::fill(bad_rows.begin() + static_cast<std::ptrdiff_t>(rows.size() / kTokens * bad),
                bad_rows.begin() + static_cast<std::ptrdiff_t>(rows.size() / kTokens * (bad + 1)),
                bad == kBad ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN());
    }
    const std::vector<float> q = random.Normals(kTokens * token_size);
    // Many tokens, a decoded one right behind the window of a bad one, and one that sees it.
    for (const auto& range : {std::pair<std::size_t, std::size_t>{190, 300}, {240, 241}, {239, 240}}) {
      const std::size_t first = range.first;
      const std::size_t last = range.second;
      const auto attend = [&](const std::vector<float>& kv_rows) {
        Pool pool(heads, dtype(), 1, 40, 8);
        Part part;
        part.blocks =
            pool.Add({kv_rows.begin(), kv_rows.begin() + static_cast<std::ptrdiff_t>(RowsSize(pool, last))}, 0);
        part.first_position = static_cast<std::int32_t>(first);
        part.q.assign(q.begin() + static_cast<std::ptrdiff_t>(first * token_size),
                      q.begin() + static_cast<std::ptrdiff_t>(last * token_size));
        Rig rig(target());
        AttentionCall call(pool, heads.group, 0, dtype(), {part});
        call.args.window = kWindow;
        return call.Run(rig);
      };
      const std::vector<float> expected = attend(rows);
      const std::vector<float> actual = attend(bad_rows);
      for (std::size_t i = 0; i < expected.size(); ++i) {
        const std::size_t token = first + i / token_size;
        ASSERT_TRUE(std::isfinite(expected[i]));
        if (token < kBad || token >= kBad + kWindow) {
          ASSERT_EQ(actual[i], expected[i]) << "token " << token << " from " << first;
        } else {
          ASSERT_FALSE(std::isfinite(actual[i])) << "token " << token << " from " << first;
        }
      }
    }
  }
}

// Few rows over many keys are cut into items, by the number of workers.
TEST_P(AttentionTest, WorkersDoNotChangeBits) {
  if (target() == "reference" || kEffort == 1) GTEST_SKIP() << "slow";
  Random random(10);
  constexpr Heads kHeads = {1, 4, 32};
  Pool pool(kHeads, dtype(), 1, 400, 11);
  std::vector<Part> parts;
  for (const auto& [num_tokens, num_new] : {std::pair{5000, 1}, {300, 1}, {600, 3}}) {
    Part part;
    part.blocks = pool.Add(random.Normals(RowsSize(pool, static_cast<std::size_t>(num_tokens))), 0);
    part.first_position = num_tokens - num_new;
    part.q = random.Normals(static_cast<std::size_t>(num_new * kHeads.group * kHeads.head_dim));
    parts.push_back(part);
  }
  Rig alone(target(), 1);
  const std::vector<float> expected = RunAttention(alone, pool, kHeads.group, 0, dtype(), parts);
  for (const int num_workers : {2, 3, 7}) {
    Rig rig(target(), num_workers);
    ExpectSameBits(RunAttention(rig, pool, kHeads.group, 0, dtype(), parts), expected,
                   std::to_string(num_workers) + " workers");
  }
}

// The promise that prefix caching and preemption rest on.
TEST_P(AttentionTest, ChunksTokensNeighboursAndPlacesDoNotChangeBits) {
  Random random(7);
  for (const Heads heads : {Heads{2, 3, 12}, {1, 4, 64}, {2, 1, 128}}) {
    if (is_slow() && heads.head_dim > 12) continue;
    constexpr std::size_t kTokens = kEffort > 1 ? 550 : 300;
    const std::size_t token_size = static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim);
    const std::vector<float> q = random.Normals(kTokens * token_size);
    Pool pool(heads, dtype(), 1, 100, 8);
    const std::vector<float> rows = random.Normals(RowsSize(pool, kTokens));
    const std::vector<std::int32_t> blocks = pool.Add(rows, 0);
    const auto chunk = [&](std::size_t begin, std::size_t end) {
      Part part;
      part.blocks.assign(blocks.begin(), blocks.begin() + static_cast<std::ptrdiff_t>((end + 15) / 16));
      part.first_position = static_cast<std::int32_t>(begin);
      part.q.assign(q.begin() + static_cast<std::ptrdiff_t>(begin * token_size),
                    q.begin() + static_cast<std::ptrdiff_t>(end * token_size));
      return part;
    };
    const auto slice = [&](const std::vector<float>& values, std::size_t begin, std::size_t end) {
      return std::vector<float>(values.begin() + static_cast<std::ptrdiff_t>(begin * token_size),
                                values.begin() + static_cast<std::ptrdiff_t>(end * token_size));
    };
    Rig rig(target());
    const std::vector<float> whole = RunAttention(rig, pool, heads.group, 0, dtype(), {chunk(0, kTokens)});

    Rig other(target(), 3);
    ExpectSameBits(RunAttention(other, pool, heads.group, 0, dtype(), {chunk(0, kTokens)}), whole, "three workers");
    for (const std::size_t size : {std::size_t{7}, std::size_t{16}, std::size_t{100}, std::size_t{256}}) {
      std::vector<Part> chunks;
      for (std::size_t begin = 0; begin < kTokens; begin += size)
        chunks.push_back(chunk(begin, std::min(begin + size, kTokens)));
      ExpectSameBits(RunAttention(rig, pool, heads.group, 0, dtype(), chunks), whole,
                     "chunks of " + std::to_string(size));
    }
    // In a pool where later tokens do not exist yet (NaN), at other places, beside another sequence.
    for (const std::size_t t : {0, 1, 15, 16, 17, 100, 255, 256, 257, 300, 511, 512, 549}) {
      if (t >= kTokens) continue;
      Pool fresh(heads, dtype(), 1, 100, 1000 + t);
      const std::vector<float> mate_rows = random.Normals(RowsSize(fresh, 40));
      Part mate;
      mate.blocks = fresh.Add(mate_rows, 0);
      mate.first_position = 35;
      mate.q = random.Normals(5 * token_size);
      Part alone = chunk(t, t + 1);
      alone.blocks = fresh.Add({rows.begin(), rows.begin() + static_cast<std::ptrdiff_t>(RowsSize(fresh, t + 1))}, 0);
      const std::vector<float> both = RunAttention(rig, fresh, heads.group, 0, dtype(), {mate, alone});
      ExpectSameBits(slice(both, 5, 6), slice(whole, t, t + 1), "token " + std::to_string(t) + " alone");
    }
  }
}

// Where many sequences decode, several kv heads may be one item.
TEST_P(AttentionTest, SequencesThatDecodeTogetherHaveTheBitsOfEachAlone) {
  Random random(13);
  for (const Heads heads : {Heads{6, 2, 64}, {5, 4, 32}, {2, 3, 96}, {3, 1, 24}}) {
    if (is_slow() && heads.head_dim > 24) continue;
    Pool pool(heads, dtype(), 2, 120, 14);
    std::vector<Part> parts;
    for (const int num_tokens : {1, 270, 16, 33, 100, 257, 512, 15, 48}) {
      Part part;
      part.blocks = pool.Add(random.Normals(RowsSize(pool, static_cast<std::size_t>(num_tokens))), 1);
      part.first_position = num_tokens - 1;
      part.q = random.Normals(static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim));
      parts.push_back(part);
    }
    Rig alone(target(), 3);
    std::vector<float> expected;
    for (const Part& part : parts) {
      const std::vector<float> one = RunAttention(alone, pool, heads.group, 1, dtype(), {part});
      expected.insert(expected.end(), one.begin(), one.end());
    }
    Rig rig(target());
    ExpectSameBits(RunAttention(rig, pool, heads.group, 1, dtype(), parts), expected,
                   "head_dim " + std::to_string(heads.head_dim));
  }
}

TEST_P(AttentionTest, RowsOfOtherSequencesAreLeftAlone) {
  Rig rig(target());
  Random random(8);
  constexpr Heads kHeads = {1, 2, 12};
  Pool pool(kHeads, dtype(), 1, 120, 2);
  std::vector<Part> parts(3);
  for (Part& part : parts) {
    part.blocks = pool.Add(random.Normals(RowsSize(pool, 520)), 0);
    part.first_position = 519;
    part.q = random.Normals(2 * 12);
  }
  AttentionCall call(pool, kHeads.group, 0, dtype(), parts);
  const std::vector<float> before = call.Run(rig);
  // Now the middle sequence only, over fewer keys.
  const std::int32_t first_position[] = {300};
  ++call.args.query_begin;
  ++call.args.block_begin;
  call.args.first_position = first_position;
  call.args.num_sequences = 1;
  const std::vector<float> after = call.Run(rig);
  for (std::size_t i = 0; i < before.size(); ++i) {
    EXPECT_EQ(before[i] == after[i], i / 24 != 1) << "element " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionTest,
                         testing::Combine(testing::ValuesIn(AllTargets()), testing::ValuesIn(AllDTypes())),
                         NameOfTargetAndDType);

TEST(AttentionTargetsTest, TargetsThatMultiplyFloatsGiveTheSameBitsOnAllMachines) {
  Random random(9);
  struct Hashed {
    Heads heads;
    std::uint64_t hash;
  };
  for (const auto& [heads, hash] : {Hashed{{2, 3, 12}, 0x17a93d40d7dfedf3U}, {{1, 2, 40}, 0x44208c098d974aecU}}) {
    Pool pool(heads, DType::kBF16, 1, 40, 3);
    const std::vector<float> rows = random.Uniforms(RowsSize(pool, 300));
    Part part;
    part.blocks = pool.Add(rows, 0);
    part.first_position = 270;
    part.q = random.Uniforms(30 * static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim));
    std::vector<float> expected;
    for (const std::string& target : FastTargets()) {
      if (target == "avx512_bf16" || target == "amx") continue;
      Rig rig(target);
      const std::vector<float> out = RunAttention(rig, pool, heads.group, 0, DType::kBF16, {part});
      if (expected.empty()) expected = out;
      ExpectSameBits(out, expected, target);
    }
    EXPECT_EQ(HashLogits(expected), hash);
  }
}

}  // namespace
}  // namespace spillway
