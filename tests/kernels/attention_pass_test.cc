// Attention of one layer in several calls, each over a range of keys in a pool of its own.

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "tests/kernels/attention_rig.h"

namespace spillway {
namespace {

constexpr int kLayer = 1;

// The last num_new of num_tokens tokens are queries.
struct Sequence {
  std::size_t num_tokens = 0;
  std::size_t num_new = 0;
  std::vector<float> rows;
  std::vector<float> q;
};

struct Case {
  Heads heads;
  DType dtype;
  std::vector<Sequence> sequences;
  std::int32_t window = 0;
};

Case MakeCase(Heads heads, DType dtype, const std::vector<std::pair<std::size_t, std::size_t>>& sizes, Random& random) {
  Case result{heads, dtype, {}, 0};
  const auto row_size = static_cast<std::size_t>(heads.num_kv_heads * 2 * heads.head_dim);
  for (const auto& [num_tokens, num_new] : sizes) {
    const auto token_size = static_cast<std::size_t>(heads.num_kv_heads * heads.group * heads.head_dim);
    result.sequences.push_back(
        {num_tokens, num_new, random.Normals(num_tokens * row_size), random.Normals(num_new * token_size, 2)});
  }
  return result;
}

// Keys [begin, end) of each sequence, as far as it goes.
std::vector<Part> PartsOf(const Case& all, std::size_t begin, std::size_t end, Pool& pool) {
  std::vector<Part> parts;
  for (const Sequence& sequence : all.sequences) {
    const std::size_t row_size = sequence.rows.size() / sequence.num_tokens;
    const auto at = [&](std::size_t token) {
      return sequence.rows.begin() + static_cast<std::ptrdiff_t>(std::min(token, sequence.num_tokens) * row_size);
    };
    Part part;
    part.blocks = pool.Add({at(begin), at(end)}, kLayer);
    part.first_position = static_cast<std::int32_t>(sequence.num_tokens - sequence.num_new);
    part.q = sequence.q;
    parts.push_back(part);
  }
  return parts;
}

std::vector<float> Whole(Rig& rig, const Case& all) {
  Pool pool(all.heads, all.dtype, 2, 200, 1);
  AttentionCall call(pool, all.heads.group, kLayer, all.dtype, PartsOf(all, 0, 1 << 20, pool));
  call.args.window = all.window;
  return call.Run(rig);
}

// A call per range between two neighbours of `cuts`, the last range being open.
std::vector<float> InPasses(Rig& rig, const Case& all, const std::vector<std::size_t>& cuts) {
  std::vector<float> states;
  std::vector<float> out;
  for (std::size_t i = 0; i < cuts.size(); ++i) {
    const bool is_last = i + 1 == cuts.size();
    Pool pool(all.heads, all.dtype, 2, 200, 100 + i);
    AttentionCall call(pool, all.heads.group, kLayer, all.dtype,
                       PartsOf(all, cuts[i], is_last ? std::size_t{1} << 20 : cuts[i + 1], pool));
    std::vector<std::int32_t> begin;
    std::vector<std::int32_t> end;
    for (const Sequence& sequence : all.sequences) {
      const std::size_t sequence_end = std::max(sequence.num_tokens, cuts[i]);
      begin.push_back(static_cast<std::int32_t>(cuts[i]));
      end.push_back(static_cast<std::int32_t>(is_last ? sequence_end : std::min(cuts[i + 1], sequence_end)));
    }
    if (states.empty()) {
      states.resize(static_cast<std::size_t>(call.args.num_tokens * call.args.num_heads * (pool.layout().head_dim + 2)),
                    std::numeric_limits<float>::quiet_NaN());
    }
    call.args.pass = is_last ? AttentionPass::kLast : i == 0 ? AttentionPass::kFirst : AttentionPass::kMiddle;
    call.args.window = all.window;
    call.args.key_begin = begin.data();
    call.args.key_end = end.data();
    call.args.states = states.data();
    out = call.Run(rig);
  }
  return out;
}

class AttentionPassTest : public testing::TestWithParam<TargetAndDType> {
 protected:
  std::string target() const { return std::get<0>(GetParam()); }
  DType dtype() const { return std::get<1>(GetParam()); }
  // The reference carries its states in float between passes that it sums in double.
  void ExpectSame(const std::vector<float>& actual, const std::vector<float>& whole, const std::string& what) const {
    if (target() == "reference") {
      ExpectNear(actual, whole, 1e-5F, what);
    } else {
      ExpectSameBits(actual, whole, what);
    }
  }
};

TEST_P(AttentionPassTest, RandomCutsEqualOneCall) {
  Random random(21);
  Rig rig(target());
  for (const Heads heads : {Heads{2, 3, 12}, {1, 4, 64}, {1, 2, 80}, {1, 2, 128}}) {
    if (kEffort == 1 && heads.head_dim > 12) continue;
    // Decoding and prefilling sequences, shorter and longer than a segment.
    Case all = MakeCase(heads, dtype(), {{1030, 1}, {1, 1}, {600, 130}, {256, 2}, {513, 40}}, random);
    for (int i = 0; i < (kEffort > 1 ? 4 : 2); ++i) {
      all.window = i % 2 * 330;
      const std::vector<float> whole = Whole(rig, all);
      std::vector<std::size_t> cuts = {0};
      while (cuts.size() < 2 || random.Below(3) != 0) {
        cuts.push_back(cuts.back() + kSegmentTokens * static_cast<std::size_t>(random.Below(3)));
      }
      std::string what = "window " + std::to_string(all.window) + ", cuts";
      for (const std::size_t cut : cuts) what.append(" ").append(std::to_string(cut));
      ExpectSame(InPasses(rig, all, cuts), whole, what);
    }
  }
}

TEST_P(AttentionPassTest, RangesMayBeEmptyAtEitherEnd) {
  Random random(22);
  Rig rig(target(), 3);
  const Case all = MakeCase({2, 2, 16}, dtype(), {{700, 3}, {300, 300}}, random);
  const std::vector<float> whole = Whole(rig, all);
  ExpectSame(InPasses(rig, all, {0, 0}), whole, "nothing first");
  ExpectSame(InPasses(rig, all, {0, 1024}), whole, "nothing last");
  ExpectSame(InPasses(rig, all, {0, 256, 256, 512}), whole, "nothing in the middle");
}

TEST_P(AttentionPassTest, ALostPassShows) {
  Random random(23);
  Rig rig(target());
  const Case all = MakeCase({1, 2, 16}, dtype(), {{700, 1}}, random);
  Case other = all;
  other.sequences[0].rows[0] += 1;  // of the first key, which only the first pass reads
  EXPECT_NE(InPasses(rig, other, {0, 256, 512}), InPasses(rig, all, {0, 256, 512}));
}

INSTANTIATE_TEST_SUITE_P(Targets, AttentionPassTest,
                         testing::Combine(testing::ValuesIn(AllTargets()), testing::ValuesIn(AllDTypes())),
                         NameOfTargetAndDType);

}  // namespace
}  // namespace spillway
