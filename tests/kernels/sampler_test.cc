#include "kernels/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/exp2p.h"
#include "tests/kernels/kernel_rig.h"

namespace spillway {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(PhiloxTest, KnownAnswers) {
  constexpr std::uint32_t kOnes = 0xffffffffU;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (std::array<std::uint32_t, 4>{0x6627e8d5U, 0xe169c58dU, 0xbc57ac4cU, 0x9b00dbd8U}));
  EXPECT_EQ(Philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}),
            (std::array<std::uint32_t, 4>{0x408f276dU, 0x41c83b0eU, 0xa20bc7c6U, 0x6d5451fdU}));
  EXPECT_EQ(Philox4x32({0x243f6a88U, 0x85a308d3U, 0x13198a2eU, 0x03707344U}, {0xa4093822U, 0x299f31d0U}),
            (std::array<std::uint32_t, 4>{0xd16cfe09U, 0x94fdccebU, 0x5001e420U, 0x24126ea1U}));
}

TEST(Exp2pTest, IsCloseToThePowerAndExactAtIntegers) {
  for (int n = 0; n >= -126; --n) EXPECT_EQ(Exp2p(static_cast<float>(n)), std::ldexp(1.0F, n));
  for (float x = 0; x > -126; x -= 0.00913F) {
    EXPECT_NEAR(Exp2p(x) / std::exp2(double{x}), 1, 3e-7) << x;
  }
  EXPECT_EQ(Exp2p(-126.5F), 0);
  EXPECT_EQ(Exp2p(-kInfinity), 0);
  EXPECT_EQ(Exp2p(kNan), 0);
}

TEST(WeightTest, IsFixedPointWith31Bits) {
  EXPECT_EQ(WeightOf(0), 1U << 31);
  EXPECT_EQ(WeightOf(-1), 1U << 30);
  EXPECT_EQ(WeightOf(-31), 1U);
  EXPECT_EQ(WeightOf(-31.001F), 0U);
  EXPECT_EQ(WeightOf(-kInfinity), 0U);
}

TEST(HashTest, IsFnv1aOverWords) {
  EXPECT_EQ(HashLogits({}), 0xcbf29ce484222325U);
  const std::vector<float> one = {1.0F};
  EXPECT_EQ(HashLogits(one), (0xcbf29ce484222325U ^ 0x3f800000U) * 0x100000001b3U);
}

// A batch of rows as SampleArgs wants it.
struct Batch {
  std::int64_t vocab = 0;
  std::vector<float> logits;
  std::vector<SampleRow> rows;
  std::vector<std::int32_t> banned_begin = {0};
  std::vector<std::int32_t> banned;

  void Add(const std::vector<float>& row_logits, const SampleRow& row, const std::vector<std::int32_t>& bans = {}) {
    vocab = static_cast<std::int64_t>(row_logits.size());
    logits.insert(logits.end(), row_logits.begin(), row_logits.end());
    rows.push_back(row);
    banned.insert(banned.end(), bans.begin(), bans.end());
    banned_begin.push_back(static_cast<std::int32_t>(banned.size()));
  }
};

std::vector<SampleResult> SampleBatch(Rig& rig, const Batch& batch) {
  std::vector<SampleResult> results(batch.rows.size());
  SampleArgs args;
  args.logits = batch.logits.data();
  args.num_rows = static_cast<std::int64_t>(batch.rows.size());
  args.vocab = batch.vocab;
  args.rows = batch.rows.data();
  args.banned_begin = batch.banned_begin.data();
  args.banned = batch.banned.data();
  args.hash_logits = true;
  args.results = results.data();
  rig.kernels().Sample(rig.stream(), args);
  rig.Finish();
  return results;
}

void ExpectSameResults(const std::vector<SampleResult>& actual, const std::vector<SampleResult>& oracle,
                       const Batch& batch, const std::string& what) {
  for (std::size_t r = 0; r < oracle.size(); ++r) {
    const SampleRow& row = batch.rows[r];
    const std::string where = what + ": row " + std::to_string(r) + ", temperature " + std::to_string(row.temperature) +
                              ", top_k " + std::to_string(row.top_k) + ", top_p " + std::to_string(row.top_p) +
                              ", min_p " + std::to_string(row.min_p);
    ASSERT_EQ(actual[r].token, oracle[r].token) << where;
    ASSERT_EQ(actual[r].logits_hash, oracle[r].logits_hash) << where;
    ASSERT_EQ(actual[r].rank, oracle[r].rank) << where;
    ASSERT_EQ(actual[r].num_top, oracle[r].num_top) << where;
    if (std::isfinite(oracle[r].logprob)) {
      ASSERT_NEAR(actual[r].logprob, oracle[r].logprob, 1e-4) << where;
    }
    for (int i = 0; i < oracle[r].num_top; ++i) {
      ASSERT_EQ(actual[r].top_tokens[i], oracle[r].top_tokens[i]) << where;
      if (std::isfinite(oracle[r].top_logprobs[i])) {
        ASSERT_NEAR(actual[r].top_logprobs[i], oracle[r].top_logprobs[i], 1e-4) << where;
      }
    }
  }
}

// Logits of many characters: wide, narrow, tied, peaked, with infinities and NaN.
std::vector<float> MakeLogits(Random& random, std::int64_t vocab) {
  const std::int64_t kind = random.Below(8);
  constexpr float kScales[] = {1, 0.01F, 10, 3, 5, 40, 2, 2};
  std::vector<float> logits = random.Normals(static_cast<std::size_t>(vocab), kScales[kind]);
  for (float& logit : logits) {
    if (kind == 3) logit = std::round(logit);
    if (kind == 4) logit = std::round(logit * 2) * 0.5F * (random.Below(2) == 0 ? 1.0F : -0.0F);
    if (kind == 6 && random.Below(3) == 0) logit = -kInfinity;
    if (kind == 7 && random.Below(5) == 0) logit = kNan;
  }
  return logits;
}

SampleRow MakeRow(Random& random, std::int64_t vocab) {
  SampleRow row;
  constexpr float kTemperatures[] = {0, 1e-6F, 1e-5F, 0.1F, 0.7F, 1, 2, 100};
  row.temperature = kTemperatures[random.Below(8)];
  constexpr float kTopPs[] = {1, 1, 0.95F, 0.5F, 0.01F, 1e-10F, 0.9999999F};
  row.top_p = random.Below(4) == 0 ? std::max(1e-6F, random.Uniform()) : kTopPs[random.Below(7)];
  constexpr float kMinPs[] = {0, 0, 0, 0.05F, 0.5F, 1, 1e-30F};
  row.min_p = kMinPs[random.Below(7)];
  const std::int64_t top_ks[] = {0, 0, 1, 5, 40, random.Below(vocab) + 1, vocab, vocab + 10};
  row.top_k = static_cast<std::int32_t>(top_ks[random.Below(8)]);
  row.seed = random.engine()();
  row.choice = static_cast<std::uint32_t>(random.Below(4));
  row.output_index = static_cast<std::uint32_t>(random.Below(1000));
  row.num_logprobs = static_cast<std::int32_t>(random.Below(23)) - 2;
  return row;
}

class SamplerTest : public testing::TestWithParam<std::string> {
 protected:
  Rig rig_{GetParam()};
};

TEST_P(SamplerTest, EqualsTheReferenceForRandomRows) {
  Rig reference("reference");
  Random random(1);
  for (const std::int64_t vocab : {1, 2, 7, 16, 33, 100, 1000, 1024, 1025, 5000}) {
    const int num_rows = (vocab < 500 ? 60 : 15) * kEffort;
    Batch batch;
    for (int r = 0; r < num_rows; ++r) {
      std::vector<std::int32_t> bans;
      if (random.Below(3) == 0) {
        for (std::int64_t i = random.Below(4); i >= 0; --i)
          bans.push_back(static_cast<std::int32_t>(random.Below(vocab)));
      }
      batch.Add(MakeLogits(random, vocab), MakeRow(random, vocab), bans);
    }
    ExpectSameResults(SampleBatch(rig_, batch), SampleBatch(reference, batch), batch, "vocab " + std::to_string(vocab));
  }
}

TEST_P(SamplerTest, EqualsTheReferenceForALargeVocabulary) {
  Rig reference("reference");
  Random random(2);
  Batch batch;
  for (int r = 0; r < 2 + kEffort; ++r) batch.Add(MakeLogits(random, 32003), MakeRow(random, 32003));
  ExpectSameResults(SampleBatch(rig_, batch), SampleBatch(reference, batch), batch, "large");
}

TEST_P(SamplerTest, DegenerateRows) {
  Rig reference("reference");
  SampleRow drawn;
  drawn.temperature = 1;
  drawn.num_logprobs = 3;
  SampleRow truncated = drawn;
  truncated.top_k = 2;
  truncated.top_p = 0.7F;
  SampleRow greedy;
  greedy.num_logprobs = 0;
  Batch batch;
  for (const SampleRow& row : {drawn, truncated, greedy}) {
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      SampleRow seeded = row;
      seeded.seed = seed;
      batch.Add(std::vector<float>(40, kNan), seeded);
      batch.Add(std::vector<float>(40, -kInfinity), seeded, {0, 1, 5});
      batch.Add(std::vector<float>(40, 2.5F), seeded);
      std::vector<std::int32_t> all(40);
      for (std::int32_t id = 0; id < 40; ++id) all[static_cast<std::size_t>(id)] = id;
      std::vector<float> rising(40);
      for (std::size_t i = 0; i < 40; ++i) rising[i] = static_cast<float>(i) * 0.1F;
      batch.Add(rising, seeded, all);
      rising[7] = kInfinity;
      rising[9] = kInfinity;
      batch.Add(rising, seeded);
    }
  }
  const std::vector<SampleResult> results = SampleBatch(rig_, batch);
  const std::vector<SampleResult> oracle = SampleBatch(reference, batch);
  for (std::size_t r = 0; r < results.size(); ++r) EXPECT_EQ(results[r].token, oracle[r].token) << "row " << r;
}

TEST_P(SamplerTest, GreedyTakesTheLowestOfEquals) {
  Batch batch;
  batch.Add({1, 3, 3, 2}, SampleRow{});
  batch.Add({1, 3, 3, 2}, SampleRow{}, {1});
  batch.Add({-0.0F, 0.0F, kNan, -1}, SampleRow{});
  const std::vector<SampleResult> results = SampleBatch(rig_, batch);
  EXPECT_EQ(results[0].token, 1);
  EXPECT_EQ(results[1].token, 2);
  EXPECT_EQ(results[2].token, 0);
}

TEST_P(SamplerTest, FrequenciesFollowTheSoftmax) {
  const std::vector<float> logits = {0, 1, 2, -1, 0.5F};
  Batch batch;
  constexpr int kDraws = 2000 * kEffort;
  for (int i = 0; i < kDraws; ++i) {
    SampleRow row;
    row.temperature = 0.8F;
    row.seed = 42;
    row.output_index = static_cast<std::uint32_t>(i);
    batch.Add(logits, row);
  }
  std::vector<double> counts(logits.size());
  for (const SampleResult& result : SampleBatch(rig_, batch)) counts[static_cast<std::size_t>(result.token)] += 1;
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit / 0.8);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const double p = std::exp(logits[i] / 0.8) / sum;
    // Five standard deviations of a binomial.
    EXPECT_NEAR(counts[i] / kDraws, p, 5 * std::sqrt(p * (1 - p) / kDraws)) << i;
  }
}

TEST_P(SamplerTest, ChoicesAndIndicesDrawIndependently) {
  Batch batch;
  for (std::uint32_t choice = 0; choice < 4; ++choice) {
    for (std::uint32_t index = 0; index < 50; ++index) {
      SampleRow row;
      row.temperature = 1;
      row.choice = choice;
      row.output_index = index;
      batch.Add(std::vector<float>(1000, 0.0F), row);
    }
  }
  std::vector<std::int32_t> tokens;
  for (const SampleResult& result : SampleBatch(rig_, batch)) tokens.push_back(result.token);
  std::sort(tokens.begin(), tokens.end());
  const auto distinct = std::unique(tokens.begin(), tokens.end()) - tokens.begin();
  EXPECT_GT(distinct, 160);  // 200 draws out of 1000: 181 are expected
}

INSTANTIATE_TEST_SUITE_P(Targets, SamplerTest, testing::ValuesIn(AllTargets()),
                         [](const auto& target) { return target.param; });

}  // namespace
}  // namespace spillway
