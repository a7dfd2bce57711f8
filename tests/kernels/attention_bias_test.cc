// Attention with a term per row of KV on its score.

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/kernels/attention_rig.h"

namespace spillway {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// One sequence of which the last num_new tokens are queries, and the bias of its rows, [token][kv head].
struct Problem {
  Heads heads;
  DType dtype;
  std::size_t num_tokens = 0;
  std::size_t num_new = 0;
  std::vector<float> rows;
  std::vector<float> bias;
  std::vector<float> q;
  std::int32_t window = 0;

  std::size_t kv_heads() const { return static_cast<std::size_t>(heads.num_kv_heads); }
  std::size_t row_size() const { return kv_heads() * 2 * static_cast<std::size_t>(heads.head_dim); }
  std::size_t query_size() const { return kv_heads() * static_cast<std::size_t>(heads.group * heads.head_dim); }
};

Problem MakeProblem(Heads heads, DType dtype, std::size_t num_tokens, std::size_t num_new, Random& random) {
  Problem problem{heads, dtype, num_tokens, num_new, {}, {}, {}, 0};
  problem.rows = random.Normals(num_tokens * problem.row_size());
  problem.bias.resize(num_tokens * problem.kv_heads());
  problem.q = random.Normals(num_new * problem.query_size(), 2);
  return problem;
}

// ln of a count, up to 500.
void DrawCounts(Problem& problem, Random& random) {
  for (float& bias : problem.bias) bias = std::log(static_cast<float>(1 + random.Below(500)));
}

// A call over keys [begin, end) for queries [query_begin, query_end), and what it reads; what no token wrote is NaN, of
// the bias too.
class Call {
 public:
  Call(const Problem& problem, std::size_t begin, std::size_t end, std::size_t query_begin, std::size_t query_end)
      : pool_(problem.heads, problem.dtype, 2, 80, 3),
        part_(MakePart(problem, begin, end, query_begin, query_end)),
        call(pool_, problem.heads.group, 1, problem.dtype, {part_}) {
    const std::size_t stride = problem.kv_heads() * kBlockTokens + 4;
    bias_.assign(80 * stride, std::numeric_limits<float>::quiet_NaN());
    for (std::size_t t = begin; t < end; ++t) {
      for (std::size_t h = 0; h < problem.kv_heads(); ++h) {
        const auto block = static_cast<std::size_t>(part_.blocks[(t - begin) / kBlockTokens]);
        bias_[block * stride + h * kBlockTokens + (t - begin) % kBlockTokens] =
            problem.bias[t * problem.kv_heads() + h];
      }
    }
    call.args.row_bias = bias_.data();
    call.args.row_bias_stride = static_cast<std::int64_t>(stride);
    call.args.window = problem.window;
  }

 private:
  Part MakePart(const Problem& problem, std::size_t begin, std::size_t end, std::size_t query_begin,
                std::size_t query_end) {
    const auto slice = [](const std::vector<float>& all, std::size_t size, std::size_t from, std::size_t to) {
      return std::vector<float>(all.begin() + static_cast<std::ptrdiff_t>(from * size),
                                all.begin() + static_cast<std::ptrdiff_t>(to * size));
    };
    return {pool_.Add(slice(problem.rows, problem.row_size(), begin, end), 1),
            static_cast<std::int32_t>(problem.num_tokens - problem.num_new + query_begin),
            slice(problem.q, problem.query_size(), query_begin, query_end)};
  }

  Pool pool_;
  Part part_;
  std::vector<float> bias_;

 public:
  AttentionCall call;
};

std::vector<float> Attend(Rig& rig, const Problem& problem) {
  return Call(problem, 0, problem.num_tokens, 0, problem.num_new).call.Run(rig);
}

std::vector<float> Expected(const Problem& problem) {
  const Pool pool(problem.heads, problem.dtype, 2, 1, 3);
  const Part part = {{}, static_cast<std::int32_t>(problem.num_tokens - problem.num_new), problem.q};
  return Oracle(pool, problem.heads.group, problem.dtype, problem.rows, part, static_cast<std::size_t>(problem.window),
                problem.bias);
}

class AttentionBiasTest : public testing::TestWithParam<TargetAndDType> {
 protected:
  std::string target() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  // As AttentionTest.
  void ExpectClose(const std::vector<float>& actual, const std::vector<float>& oracle, const std::string& what) const {
    if (dtype() == DType::kBF16 && (target() == "avx512_bf16" || target() == "amx")) {
      ExpectNearByNorm(actual, oracle, 2e-3, what);
    } else {
      ExpectNear(actual, oracle, 1e-5F, what);
    }
  }
};

TEST_P(AttentionBiasTest, MatchesTheOracle) {
  Rig rig(target());
  Random random(31);
  for (const Heads heads : {Heads{2, 3, 12}, {2, 2, 64}, {1, 8, 128}, {3, 1, 20}}) {
    for (const auto& [num_tokens, num_new] :
         {std::pair<std::size_t, std::size_t>{1, 1}, {17, 1}, {33, 21}, {257, 2}, {530, 40}, {600, 1}}) {
      if (num_tokens > 300 && (kEffort == 1 || target() == "reference") && heads.head_dim > 12) continue;
      Problem problem = MakeProblem(heads, dtype(), num_tokens, num_new, random);
      DrawCounts(problem, random);
      for (float& bias : problem.bias) bias = random.Below(7) == 0 ? kNever : bias;
      for (std::size_t h = 0; h < problem.kv_heads(); ++h) problem.bias[h] = 0;  // every query sees something
      for (const std::int32_t window : {0, 100}) {
        if (window > 0 && num_tokens < 500) continue;
        problem.window = window;
        ExpectClose(Attend(rig, problem), Expected(problem),
                    std::to_string(num_new) + " of " + std::to_string(num_tokens) + " tokens, window " +
                        std::to_string(problem.window) + ", head_dim " + std::to_string(heads.head_dim));
      }
    }
  }
}

TEST_P(AttentionBiasTest, ZerosHaveTheBitsOfNoBias) {
  Rig rig(target(), 3);
  Random random(32);
  for (const Heads heads : {Heads{2, 3, 12}, {1, 2, 64}, {1, 8, 128}}) {
    for (const std::size_t num_new : {1, 90}) {
      const Problem problem = MakeProblem(heads, dtype(), 300, num_new, random);
      Call with(problem, 0, 300, 0, num_new);
      Call without(problem, 0, 300, 0, num_new);
      without.call.args.row_bias = nullptr;
      ExpectSameBits(with.call.Run(rig), without.call.Run(rig), "head_dim " + std::to_string(heads.head_dim));
    }
  }
}

// What clustering rests on: a row that stands for n tokens weighs as n equal rows do.
TEST_P(AttentionBiasTest, ARowThatCountsAsManyWeighsAsThem) {
  Rig rig(target());
  Random random(33);
  for (const Heads heads : {Heads{2, 3, 12}, {1, 4, 64}}) {
    Problem few = MakeProblem(heads, dtype(), 130, 1, random);
    Problem many = few;
    many.rows.clear();
    many.num_tokens = 0;
    for (std::size_t t = 0; t < few.num_tokens; ++t) {
      const std::size_t count = t + 1 == few.num_tokens ? 1 : 1 + t % 4;
      for (std::size_t i = 0; i < count; ++i) {
        many.rows.insert(many.rows.end(), few.rows.begin() + static_cast<std::ptrdiff_t>(t * few.row_size()),
                         few.rows.begin() + static_cast<std::ptrdiff_t>((t + 1) * few.row_size()));
      }
      many.num_tokens += count;
      std::fill_n(few.bias.begin() + static_cast<std::ptrdiff_t>(t * few.kv_heads()), few.kv_heads(),
                  std::log(static_cast<float>(count)));
    }
    many.bias.assign(many.num_tokens * many.kv_heads(), 0.0F);
    ExpectClose(Attend(rig, few), Expected(many), "head_dim " + std::to_string(heads.head_dim));
  }
}

TEST_P(AttentionBiasTest, RowsThatNobodyMaySeeAreNotThere) {
  Rig rig(target(), 3);
  Random random(34);
  for (const Heads heads : {Heads{2, 3, 12}, {1, 2, 64}, {1, 8, 128}}) {
    const std::string what = ", head_dim " + std::to_string(heads.head_dim);
    Problem problem = MakeProblem(heads, dtype(), 800, 70, random);
    // Whole segments, half a block, and every third row.
    for (std::size_t t = 0; t < problem.num_tokens; ++t) {
      const bool is_seen = t >= 256 && t / kSegmentTokens != 2 && (t < 300 || t > 308) && t % 3 != 0;
      std::fill_n(problem.bias.begin() + static_cast<std::ptrdiff_t>(t * problem.kv_heads()), problem.kv_heads(),
                  is_seen ? 0.0F : kNever);
    }
    const std::vector<float> out = Attend(rig, problem);
    ExpectClose(out, Expected(problem), "some" + what);
    Problem other = problem;
    for (std::size_t t = 0; t < problem.num_tokens; ++t) {
      if (problem.bias[t * problem.kv_heads()] == kNever) {
        for (std::size_t i = 0; i < problem.row_size(); ++i) other.rows[t * problem.row_size() + i] *= -3;
      }
    }
    ExpectSameBits(Attend(rig, other), out, "whatever they hold" + what);

    std::fill(problem.bias.begin(), problem.bias.end(), kNever);
    for (const float value : Attend(rig, problem)) ASSERT_EQ(value, 0.0F) << "none" << what;
  }
}

TEST_P(AttentionBiasTest, LargeOnesDecide) {
  Rig rig(target());
  Random random(35);
  for (const Heads heads : {Heads{2, 3, 12}, {1, 2, 64}}) {
    Problem problem = MakeProblem(heads, dtype(), 400, 3, random);
    std::fill(problem.bias.begin(), problem.bias.end(), -30000.0F);
    problem.bias[100 * problem.kv_heads()] = 30000;  // of kv head 0
    for (std::size_t h = 1; h < problem.kv_heads(); ++h) problem.bias[390 * problem.kv_heads() + h] = 1000;
    ExpectClose(Attend(rig, problem), Expected(problem), "head_dim " + std::to_string(heads.head_dim));
  }
}

// A query alone, among others, in passes over parts of the keys, and with other workers.
TEST_P(AttentionBiasTest, ChunksPassesAndWorkersDoNotChangeBits) {
  if (target() == "reference") GTEST_SKIP() << "carries states in float between passes";
  Random random(36);
  Rig rig(target());
  for (const Heads heads : {Heads{2, 3, 12}, {1, 4, 64}, {1, 2, 128}}) {
    const std::string what = ", head_dim " + std::to_string(heads.head_dim);
    Problem problem = MakeProblem(heads, dtype(), 600, 130, random);
    DrawCounts(problem, random);
    const std::vector<float> whole = Attend(rig, problem);
    Rig other(target(), 3);
    ExpectSameBits(Attend(other, problem), whole, "three workers" + what);
    for (const std::size_t t : {0, 41, 42, 129}) {
      const std::vector<float> alone = Call(problem, 0, 470 + t + 1, t, t + 1).call.Run(rig);
      ExpectSameBits(alone,
                     {whole.begin() + static_cast<std::ptrdiff_t>(t * problem.query_size()),
                      whole.begin() + static_cast<std::ptrdiff_t>((t + 1) * problem.query_size())},
                     "query " + std::to_string(t) + what);
    }
    std::vector<float> states(problem.q.size() / static_cast<std::size_t>(heads.head_dim) *
                              static_cast<std::size_t>(heads.head_dim + 2));
    std::vector<float> out;
    for (const auto& [pass, begin, end] : {std::tuple{AttentionPass::kFirst, 0, 256},
                                           {AttentionPass::kMiddle, 256, 512},
                                           {AttentionPass::kLast, 512, 600}}) {
      Call part(problem, static_cast<std::size_t>(begin), static_cast<std::size_t>(end), 0, problem.num_new);
      part.call.args.pass = pass;
      part.call.args.key_begin = &begin;
      part.call.args.key_end = &end;
      part.call.args.states = states.data();
      out = part.call.Run(rig);
    }
    ExpectSameBits(out, whole, "passes" + what);
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionBiasTest,
                         testing::Combine(testing::ValuesIn(AllTargets()), testing::ValuesIn(AllDTypes())),
                         NameOfTargetAndDType);

}  // namespace
}  // namespace spillway
