#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "kernels/sampler.h"
#include "tests/kernels/kernel_rig.h"

namespace spillway {
namespace {

// A rounding of the result to BF16 costs half a unit of its 8 bits.
float ToleranceOf(DType dtype) { return dtype == DType::kF32 ? 2e-6F : dtype == DType::kBF16 ? 4.1e-3F : 5.2e-4F; }

class RowKernelsTest : public testing::TestWithParam<std::string> {
 protected:
  Rig rig_{GetParam()};
};

TEST_P(RowKernelsTest, EmbedGathersRows) {
  Random random(1);
  for (const DType dtype : AllDTypes()) {
    for (std::int64_t hidden = 1; hidden <= 40; ++hidden) {
      const std::int64_t stride = hidden + 3;
      const Array table(dtype, random.Normals(static_cast<std::size_t>(9 * stride)), 1);
      const EmbeddingTable made = rig_.kernels().MakeEmbeddingTable({table.data(), dtype, 9, hidden, stride}).value();
      const std::vector<std::int32_t> tokens = {8, 0, 3, 3};
      std::vector<float> out(tokens.size() * static_cast<std::size_t>(hidden) + 1, -5);
      rig_.kernels().Embed(rig_.stream(), {tokens.data(), 4, made.view, out.data()});
      rig_.Finish();
      for (std::size_t i = 0; i + 1 < out.size(); ++i) {
        const auto column = i % static_cast<std::size_t>(hidden);
        const auto row = static_cast<std::size_t>(tokens[i / static_cast<std::size_t>(hidden)]);
        ASSERT_EQ(out[i], table.at(row * static_cast<std::size_t>(stride) + column));
      }
      ASSERT_EQ(out.back(), -5);
    }
  }
}

TEST_P(RowKernelsTest, EmbedReadsTokensThatWereSampled) {
  const Array table(DType::kF32, {0, 1, 2, 3, 4, 5, 6, 7});
  const std::vector<std::int32_t> tokens = {SampledFrom(1), 3, SampledFrom(0), SampledFrom(1)};
  std::vector<SampleResult> sampled(2);
  sampled[0].token = 2;
  sampled[1].token = 1;
  std::vector<float> out(8);
  rig_.kernels().Embed(rig_.stream(), {.tokens = tokens.data(),
                                       .num_tokens = 4,
                                       .table = ViewOf(table, 4, 2),
                                       .out = out.data(),
                                       .sampled = sampled.data()});
  rig_.Finish();
  EXPECT_EQ(out, (std::vector<float>{2, 3, 6, 7, 4, 5, 2, 3}));
  sampled[1].token = 4;
  rig_.kernels().Embed(rig_.stream(), {tokens.data(), 4, ViewOf(table, 4, 2), out.data(), sampled.data()});
  const absl::Status status = rig_.stream().Record()->Await();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  // Rows 0 and 3 both have it; which one is named is open.
  EXPECT_THAT(std::string(status.message()), ::testing::ContainsRegex("token 4 at row [03] "));
}

TEST_P(RowKernelsTest, SampledTokenWithoutItsSourceFailsTheStream) {
  const Array table(DType::kF32, std::vector<float>(8, 1));
  const std::vector<std::int32_t> tokens = {SampledFrom(0)};
  std::vector<float> out(4);
  rig_.kernels().Embed(rig_.stream(), {tokens.data(), 1, ViewOf(table, 2, 4), out.data()});
  EXPECT_EQ(rig_.stream().Record()->Await().code(), absl::StatusCode::kInternal);
}

TEST_P(RowKernelsTest, EmbedOutsideTheTableFailsTheStream) {
  const Array table(DType::kF32, std::vector<float>(8, 1));
  const std::vector<std::int32_t> tokens = {0, 2};
  std::vector<float> out(8);
  rig_.kernels().Embed(rig_.stream(), {tokens.data(), 2, ViewOf(table, 2, 4), out.data()});
  EXPECT_EQ(rig_.stream().Record()->Await().code(), absl::StatusCode::kInternal);
}

TEST_P(RowKernelsTest, RmsNormMatchesTheFormula) {
  Random random(2);
  for (const DType dtype : AllDTypes()) {
    for (const std::int64_t hidden : {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 100, 1024, 1030}) {
      for (const float scale : {1.0F, 1e4F, 1e-4F}) {
        const auto size = static_cast<std::size_t>(hidden);
        const std::vector<float> x = random.Normals(5 * size, scale);
        const std::vector<float> weight = random.Normals(size);
        const std::vector<std::int32_t> rows = {4, 0, 4};
        for (const bool is_gathered : {false, true}) {
          const std::int64_t num_rows = is_gathered ? 3 : 5;
          const Array out(dtype, static_cast<std::size_t>(num_rows) * size, 1);
          RmsNormArgs args;
          args.x = x.data();
          args.weight = weight.data();
          args.rows = is_gathered ? rows.data() : nullptr;
          args.epsilon = 1e-5F;
          args.num_rows = num_rows;
          args.hidden = hidden;
          args.out = out.data();
          args.out_dtype = dtype;
          rig_.kernels().RmsNorm(rig_.stream(), args);
          rig_.Finish();
          std::vector<float> oracle;
          for (std::size_t t = 0; t < static_cast<std::size_t>(num_rows); ++t) {
            const float* const row = x.data() + (is_gathered ? static_cast<std::size_t>(rows[t]) : t) * size;
            double sum = 0;
            for (std::size_t i = 0; i < size; ++i) sum += double{row[i]} * row[i];
            const double norm = std::sqrt(sum / static_cast<double>(size) + 1e-5);
            for (std::size_t i = 0; i < size; ++i) oracle.push_back(static_cast<float>(row[i] / norm * weight[i]));
          }
          ExpectNear(out.Values(), oracle, ToleranceOf(dtype), "hidden " + std::to_string(hidden));
        }
      }
    }
  }
}

TEST_P(RowKernelsTest, SiluMulMatchesTheFormula) {
  Random random(3);
  for (const DType dtype : AllDTypes()) {
    for (std::int64_t inner = 1; inner <= 70; ++inner) {
      std::vector<float> gate_up = random.Normals(static_cast<std::size_t>(3 * 2 * inner), 8);
      gate_up[0] = 200;
      gate_up.back() = dtype == DType::kF16 ? 1e3F : 1e20F;
      if (inner > 2) gate_up[1] = -200;
      const Array out(dtype, static_cast<std::size_t>(3 * inner), 1);
      rig_.kernels().SiluMul(rig_.stream(), {gate_up.data(), 3, inner, out.data(), dtype});
      rig_.Finish();
      std::vector<float> oracle;
      for (std::int64_t t = 0; t < 3; ++t) {
        for (std::int64_t i = 0; i < inner; ++i) {
          const double gate = gate_up[static_cast<std::size_t>(t * 2 * inner + i)];
          const double up = gate_up[static_cast<std::size_t>(t * 2 * inner + inner + i)];
          oracle.push_back(static_cast<float>(gate / (1 + std::exp(-gate)) * up));
        }
      }
      ExpectNear(out.Values(), oracle, ToleranceOf(dtype), "inner " + std::to_string(inner));
    }
  }
}

TEST_P(RowKernelsTest, RopeAnglesAreComputedInDouble) {
  const std::vector<std::int32_t> positions = {0, 1, 17, 131071};
  const std::vector<double> inverse_frequency = {1, 0.1, 1e-3, 1.0 / 3};
  std::vector<float> out(4 * 8);
  rig_.kernels().RopeAngles(rig_.stream(), {positions.data(), inverse_frequency.data(), 4, 4, out.data()});
  rig_.Finish();
  for (std::size_t t = 0; t < 4; ++t) {
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_EQ(out[t * 8 + i], static_cast<float>(std::cos(positions[t] * inverse_frequency[i])));
      EXPECT_EQ(out[t * 8 + 4 + i], static_cast<float>(std::sin(positions[t] * inverse_frequency[i])));
    }
  }
}

TEST_P(RowKernelsTest, RopeAppendWritesQueriesAndBlocks) {
  Random random(4);
  for (const DType dtype : AllDTypes()) {
    for (const int head_dim : {2, 8, 12, 64, 80, 128}) {
      for (const auto& [num_heads, num_kv_heads] : {std::pair{1, 1}, {6, 2}, {8, 1}}) {
        KvLayout layout{2, num_kv_heads, head_dim, dtype};
        const Array pool(dtype, std::vector<float>(4 * layout.block_bytes() / SizeOf(dtype), -9));
        const std::vector<std::int32_t> positions = {14, 15, 16, 5};
        const std::vector<std::int32_t> blocks = {2, kNoBlock, 0, 3};
        const auto dim = static_cast<std::size_t>(head_dim);
        const auto row_size = static_cast<std::size_t>(num_heads + 2 * num_kv_heads) * dim;
        const std::vector<float> qkv = random.Normals(4 * row_size);
        const std::vector<float> cos_sin = random.Normals(4 * dim);
        const Array q(dtype, 4 * static_cast<std::size_t>(num_heads) * dim, 1);
        RopeAppendArgs args;
        args.qkv = qkv.data();
        args.cos_sin = cos_sin.data();
        args.positions = positions.data();
        args.blocks = blocks.data();
        args.num_tokens = 4;
        args.num_heads = num_heads;
        args.layer = 1;
        args.kv = {pool.data(), layout};
        args.q = q.data();
        args.q_dtype = dtype;
        rig_.kernels().RopeAppend(rig_.stream(), args);
        rig_.Finish();

        std::vector<float> expected_q;
        std::vector<float> expected_pool(pool.size(), -9);
        for (std::size_t t = 0; t < 4; ++t) {
          const auto rotated = [&](std::size_t head, std::size_t i) {
            const float* const x = qkv.data() + t * row_size + head * dim;
            const std::size_t half = dim / 2;
            const double cos = cos_sin[t * dim + i % half];
            const double sin = cos_sin[t * dim + half + i % half];
            return static_cast<float>(i < half ? x[i] * cos - x[half + i] * sin : x[i] * cos + x[i - half] * sin);
          };
          for (std::size_t h = 0; h < static_cast<std::size_t>(num_heads); ++h) {
            for (std::size_t i = 0; i < dim; ++i) expected_q.push_back(rotated(h, i));
          }
          for (int h = 0; blocks[t] != kNoBlock && h < num_kv_heads; ++h) {
            const std::size_t at =
                (static_cast<std::size_t>(blocks[t]) * layout.block_bytes() + layout.strip_offset(1, h) +
                 static_cast<std::size_t>(positions[t] % 16) * layout.row_bytes()) /
                SizeOf(dtype);
            for (std::size_t i = 0; i < dim; ++i) {
              expected_pool[at + i] = rotated(static_cast<std::size_t>(num_heads + h), i);
              const std::size_t v = static_cast<std::size_t>(num_heads + num_kv_heads + h) * dim + i;
              expected_pool[at + dim + i] = qkv[t * row_size + v];
            }
          }
        }
        const std::string what = "head_dim " + std::to_string(head_dim);
        ExpectNear(q.Values(), expected_q, ToleranceOf(dtype), what + ", q");
        ExpectNear(pool.Values(), expected_pool, ToleranceOf(dtype), what + ", pool");
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Targets, RowKernelsTest, testing::ValuesIn(AllTargets()),
                         [](const auto& target) { return target.param; });

TEST(RowKernelsTargetsTest, AllSimdTargetsOfAllMachinesGiveTheSameBits) {
  Random random(5);
  const std::vector<float> x = random.Uniforms(3 * 333, 3);
  const std::vector<float> weight = random.Uniforms(333);
  const std::vector<float> gate_up = random.Uniforms(2 * 333, 20);
  std::vector<float> expected_norm;
  std::vector<float> expected_silu;
  for (const std::string& target : FastTargets()) {
    Rig rig(target);
    const Array norm(DType::kF32, x.size());
    const Array silu(DType::kF32, 333);
    rig.kernels().RmsNorm(rig.stream(), {x.data(), weight.data(), nullptr, 1e-6F, 3, 333, norm.data(), DType::kF32});
    rig.kernels().SiluMul(rig.stream(), {gate_up.data(), 1, 333, silu.data(), DType::kF32});
    rig.Finish();
    if (expected_norm.empty()) {
      expected_norm = norm.Values();
      expected_silu = silu.Values();
    }
    ExpectSameBits(norm.Values(), expected_norm, target);
    ExpectSameBits(silu.Values(), expected_silu, target);
  }
  EXPECT_EQ(HashLogits(expected_norm), 0xd6176fa1e2ed4d86U);
  EXPECT_EQ(HashLogits(expected_silu), 0x67ed6131fa789e7cU);
}

}  // namespace
}  // namespace spillway
