#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels/cpu/gemm_dot.h"
#include "kernels/sampler.h"
#include "tests/kernels/kernel_rig.h"

namespace spillway {
namespace {

struct Shape {
  std::int64_t columns;
  std::int64_t depth;
};

std::vector<float> RunGemm(Rig& rig, const Array& a, const PackedMatrix& weight, const std::vector<float>* bias,
                           const std::vector<float>* before) {
  const std::int64_t num_rows = static_cast<std::int64_t>(a.size()) / weight.cols();
  std::vector<float> out(static_cast<std::size_t>(num_rows * weight.rows()), -7.0F);
  if (before != nullptr) out.assign(before->begin(), before->begin() + static_cast<std::ptrdiff_t>(out.size()));
  GemmArgs args;
  args.a = a.data();
  args.a_dtype = a.dtype();
  args.num_rows = num_rows;
  args.weight = &weight;
  args.bias = bias != nullptr ? bias->data() : nullptr;
  args.output = before != nullptr ? GemmOutput::kAdd : GemmOutput::kStore;
  args.out = out.data();
  args.next = &weight;
  rig.kernels().Gemm(rig.stream(), args);
  rig.Finish();
  return out;
}

// The products in double.
std::vector<double> Oracle(const Array& a, const Array& w, Shape shape) {
  const std::vector<float> x = a.Values();
  const std::vector<float> y = w.Values();
  const auto depth = static_cast<std::size_t>(shape.depth);
  std::vector<double> out;
  for (std::size_t m = 0; m < x.size() / depth; ++m) {
    for (std::size_t n = 0; n < static_cast<std::size_t>(shape.columns); ++n) {
      double sum = 0;
      for (std::size_t k = 0; k < depth; ++k) sum += double{x[m * depth + k]} * y[n * depth + k];
      out.push_back(sum);
    }
  }
  return out;
}

std::vector<float> WithBiasAndSum(const std::vector<double>& products, const std::vector<float>* bias,
                                  const std::vector<float>* before) {
  std::vector<float> out;
  for (std::size_t i = 0; i < products.size(); ++i) {
    out.push_back(static_cast<float>(products[i] + (bias != nullptr ? (*bias)[i % bias->size()] : 0.0F) +
                                     (before != nullptr ? (*before)[i] : 0.0F)));
  }
  return out;
}

using Param = std::tuple<std::string, std::string, DType>;

std::string NameOfParam(const testing::TestParamInfo<Param>& info) {
  return std::get<0>(info.param) + "_" + std::get<1>(info.param) + "_" + std::string(NameOf(std::get<2>(info.param)));
}

class GemmTest : public testing::TestWithParam<Param> {
 protected:
  std::string target() const { return std::get<0>(GetParam()); }
  std::string gemm() const { return std::get<1>(GetParam()); }
  DType dtype() const { return std::get<2>(GetParam()); }
};

TEST_P(GemmTest, MatchesTheOracleForOddSizes) {
  Rig rig(target(), 2, gemm());
  Random random(1);
  std::vector<Shape> shapes = {{1, 1}, {3, 5}, {16, 16}, {31, 17}, {32, 32}, {33, 64}, {64, 33}, {40, 530}};
  if (kEffort > 1) shapes.insert(shapes.end(), {{100, 130}, {130, 700}, {257, 1030}});
  for (const Shape shape : shapes) {
    const Array w(dtype(), random.Normals(static_cast<std::size_t>(shape.columns * shape.depth)), 1);
    const auto weight = rig.kernels().Pack(std::vector<MatrixView>{ViewOf(w, shape.columns, shape.depth)}).value();
    EXPECT_EQ(weight->rows(), shape.columns);
    EXPECT_EQ(weight->cols(), shape.depth);
    const std::vector<float> bias = random.Normals(static_cast<std::size_t>(shape.columns));
    for (const std::int64_t num_rows : {1, 2, 3, 5, 8, 13, 29}) {
      const Array a(dtype(), random.Normals(static_cast<std::size_t>(num_rows * shape.depth)), 1);
      const std::vector<float> before = random.Normals(static_cast<std::size_t>(num_rows * shape.columns));
      const float tolerance = 1e-6F * static_cast<float>(shape.depth) + 1e-6F;
      const std::string what =
          std::to_string(num_rows) + " rows of " + std::to_string(shape.depth) + " to " + std::to_string(shape.columns);
      const std::vector<double> products = Oracle(a, w, shape);
      ExpectNear(RunGemm(rig, a, *weight, nullptr, nullptr), WithBiasAndSum(products, nullptr, nullptr), tolerance,
                 what);
      ExpectNear(RunGemm(rig, a, *weight, &bias, nullptr), WithBiasAndSum(products, &bias, nullptr), tolerance,
                 what + ", bias");
      ExpectNear(RunGemm(rig, a, *weight, &bias, &before), WithBiasAndSum(products, &bias, &before), tolerance,
                 what + ", bias, added");
    }
  }
}

TEST_P(GemmTest, NoRowsIsNoWork) {
  Rig rig(target(), 2, gemm());
  const Array w(dtype(), std::vector<float>(32, 1.0F));
  const auto weight = rig.kernels().Pack(std::vector<MatrixView>{ViewOf(w, 4, 8)}).value();
  EXPECT_TRUE(RunGemm(rig, Array(dtype(), 0), *weight, nullptr, nullptr).empty());
}

TEST_P(GemmTest, StackedPartsAreOneMatrixAndStridesAreHeeded) {
  Rig rig(target(), 2, gemm());
  Random random(2);
  constexpr std::int64_t kDepth = 40;
  constexpr std::int64_t kStride = 47;
  const Array first(dtype(), random.Normals(20 * kStride));
  const Array second(dtype(), random.Normals(17 * kDepth));
  const std::vector<MatrixView> parts = {{first.data(), dtype(), 20, kDepth, kStride}, ViewOf(second, 17, kDepth)};
  const auto weight = rig.kernels().Pack(parts).value();
  std::vector<float> stacked;
  for (std::size_t r = 0; r < 20; ++r) {
    for (std::size_t c = 0; c < kDepth; ++c) stacked.push_back(first.at(r * kStride + c));
  }
  for (const float value : second.Values()) stacked.push_back(value);
  const Array w(dtype(), stacked);
  const Array a(dtype(), random.Normals(3 * kDepth));
  ExpectNear(RunGemm(rig, a, *weight, nullptr, nullptr), WithBiasAndSum(Oracle(a, w, {37, kDepth}), nullptr, nullptr),
             1e-4F, "stacked");
}

TEST_P(GemmTest, PackRefusesWhatIsNoMatrix) {
  Rig rig(target(), 1, gemm());
  const Array w(dtype(), std::vector<float>(64, 1.0F));
  const MatrixView good = ViewOf(w, 4, 8);
  MatrixView half = good;
  half.dtype = DType::kF16;
  MatrixView narrow = good;
  narrow.cols = 7;
  MatrixView overlapping = good;
  overlapping.row_stride = 7;
  for (const auto& parts : std::vector<std::vector<MatrixView>>{{}, {half}, {good, narrow}, {overlapping}}) {
    EXPECT_EQ(rig.kernels().Pack(parts).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

// The promise of kernels.h: a row's bits do not depend on the rows beside it, nor on the number of workers.
TEST_P(GemmTest, BitsOfARowDoNotDependOnTheCall) {
  Random random(3);
  // Wide and deep enough to be cut into slices and into passes of k.
  std::vector<Shape> shapes = {{96, 64}, {40, 530}};
  if (kEffort > 1 && target() != "scalar" && target() != "reference") {
    shapes.insert(shapes.end(), {{330, 1000}, {64, 2816}});
  }
  for (const Shape shape : shapes) {
    const Array w(dtype(), random.Normals(static_cast<std::size_t>(shape.columns * shape.depth)));
    constexpr std::size_t kMaxRows = 100;
    const std::vector<float> values = random.Normals(kMaxRows * static_cast<std::size_t>(shape.depth));
    std::vector<float> expected;  // one row at a time
    for (const int num_workers : {1, 2, 3}) {
      Rig rig(target(), num_workers, gemm());
      const auto weight = rig.kernels().Pack(std::vector<MatrixView>{ViewOf(w, shape.columns, shape.depth)}).value();
      if (expected.empty()) {
        for (std::size_t m = 0; m < kMaxRows; ++m) {
          const auto row = values.begin() + static_cast<std::ptrdiff_t>(m) * shape.depth;
          const Array a(dtype(), std::vector<float>(row, row + shape.depth));
          for (const float value : RunGemm(rig, a, *weight, nullptr, nullptr)) expected.push_back(value);
        }
      }
      for (const std::int64_t num_rows : {1, 2, 3, 4, 7, 8, 16, 17, 31, 32, 64, 100}) {
        const Array a(dtype(), std::vector<float>(values.begin(), values.begin() + num_rows * shape.depth));
        ExpectSameBits(RunGemm(rig, a, *weight, nullptr, nullptr),
                       std::vector<float>(expected.begin(), expected.begin() + num_rows * shape.columns),
                       std::to_string(num_rows) + " rows, " + std::to_string(num_workers) + " workers");
      }
    }
  }
}

// Whether it is made in one pass or in two.
TEST_P(GemmTest, GateUpHasTheBitsOfGemmAndSiluMul) {
  Random random(8);
  constexpr std::int64_t kDepth = 72;
  for (const std::int64_t inner : {64, 48, 40}) {
    const Array gate(dtype(), random.Normals(static_cast<std::size_t>(inner * kDepth)));
    const Array up(dtype(), random.Normals(static_cast<std::size_t>(inner * kDepth)));
    const std::vector<MatrixView> parts = {ViewOf(gate, inner, kDepth), ViewOf(up, inner, kDepth)};
    for (const int num_workers : {1, 3}) {
      Rig rig(target(), num_workers, gemm());
      for (const bool is_int8 : {false, true}) {
        const auto weight = (is_int8 ? rig.kernels().PackInt8(parts) : rig.kernels().Pack(parts)).value();
        for (const std::int64_t num_rows : {0, 1, 16, 33, 70}) {
          const Array a(dtype(), random.Normals(static_cast<std::size_t>(num_rows * kDepth)));
          const auto size = static_cast<std::size_t>(num_rows * inner);
          std::vector<float> product(2 * size);
          Array out(dtype(), size);
          Array expected(dtype(), size);
          const GateUpArgs args{.a = a.data(),
                                .a_dtype = dtype(),
                                .num_rows = num_rows,
                                .weight = weight.get(),
                                .product = product.data(),
                                .out = out.data(),
                                .out_dtype = dtype()};
          rig.kernels().GateUp(rig.stream(), args);
          rig.kernels().Gemm(rig.stream(), GemmOf(args));
          SiluMulArgs silu = SiluMulOf(args);
          silu.out = expected.data();
          rig.kernels().SiluMul(rig.stream(), silu);
          rig.Finish();
          ExpectSameBits(out.Values(), expected.Values(),
                         std::to_string(num_rows) + " rows to " + std::to_string(inner) + (is_int8 ? ", int8" : ""));
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Fma, GemmTest,
                         testing::Combine(testing::ValuesIn(AllTargets()), testing::Values("fma"),
                                          testing::Values(DType::kF32, DType::kBF16)),
                         NameOfParam);

// Those that this machine has.
std::vector<std::string> DotGemms() {
  std::vector<std::string> names;
  if (cpu::Avx512DotBodies().ok()) names.emplace_back("avx512_bf16");
  if (cpu::AmxDotBodies().ok()) names.emplace_back("amx");
  return names;
}

INSTANTIATE_TEST_SUITE_P(Dot, GemmTest,
                         testing::Combine(testing::Values(FastTargets().back()), testing::ValuesIn(DotGemms()),
                                          testing::Values(DType::kBF16)),
                         NameOfParam);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GemmTest);

// Wide and deep as models are: cut into slices, into passes of rows and into cuts of k.
TEST(DotGemmTest, BitsOfARowDoNotDependOnTheCallForShapesOfModels) {
  const std::vector<Shape> shapes = {{576, 576}, {192, 576}, {1536, 576}, {576, 1536}, {2048, 64},
                                     {320, 960}, {96, 2560}, {64, 8192},  {1000, 300}, {33, 4100}};
  Random random(5);
  for (const Shape shape : shapes) {
    const Array w(DType::kBF16, random.Normals(static_cast<std::size_t>(shape.columns * shape.depth)));
    constexpr std::int64_t kMaxRows = kEffort > 1 ? 512 : 100;
    const Array all(DType::kBF16, random.Normals(static_cast<std::size_t>(kMaxRows * shape.depth)));
    const std::vector<float> values = all.Values();
    for (const std::string& gemm : DotGemms()) {
      Rig rig(FastTargets().back(), 2, gemm);
      const auto weight = rig.kernels().Pack(std::vector<MatrixView>{ViewOf(w, shape.columns, shape.depth)}).value();
      const std::vector<float> expected = RunGemm(rig, all, *weight, nullptr, nullptr);
      for (const std::int64_t num_rows : {1, 2, 3, 4, 7, 8, 13, 16, 17, 31, 32, 33, 64, 100, 200}) {
        const std::int64_t first = std::min<std::int64_t>(kMaxRows - num_rows, 5);
        if (first < 0) continue;
        const Array a(DType::kBF16, std::vector<float>(values.begin() + first * shape.depth,
                                                       values.begin() + (first + num_rows) * shape.depth));
        ExpectSameBits(RunGemm(rig, a, *weight, nullptr, nullptr),
                       std::vector<float>(expected.begin() + first * shape.columns,
                                          expected.begin() + (first + num_rows) * shape.columns),
                       gemm + ", " + std::to_string(num_rows) + " rows of " + std::to_string(shape.depth) + " to " +
                           std::to_string(shape.columns));
      }
    }
  }
}

// Sums of integers are exact, so every implementation gives the bits of the reference, whatever the call.
TEST(Int8GemmTest, EveryImplementationGivesTheBitsOfTheReference) {
  struct Implementation {
    std::string target;
    std::string gemm;
  };
  std::vector<Implementation> implementations;
  for (const std::string& target : FastTargets()) implementations.push_back({target, "fma"});
  for (const std::string& gemm : DotGemms()) implementations.push_back({FastTargets().back(), gemm});
  const std::vector<Shape> shapes = {{1, 1}, {3, 5}, {31, 17}, {32, 64}, {70, 333}, {200, 130}, {40, 2500}};
  constexpr std::int64_t kMaxRows = 65;
  Random random(6);
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const Shape shape : shapes) {
      const Array w(dtype, random.Normals(static_cast<std::size_t>(shape.columns * shape.depth)), 1);
      std::vector<float> values = random.Normals(static_cast<std::size_t>(kMaxRows * shape.depth));
      std::fill(values.begin() + shape.depth, values.begin() + 2 * shape.depth, 0.0F);
      const Array all(dtype, values);
      const std::vector<float> bias = random.Normals(static_cast<std::size_t>(shape.columns));
      const std::vector<float> before = random.Normals(static_cast<std::size_t>(kMaxRows * shape.columns));
      const std::vector<MatrixView> parts = {ViewOf(w, shape.columns, shape.depth)};
      Rig reference("reference");
      const auto plain = reference.kernels().PackInt8(parts).value();
      const std::vector<float> expected = RunGemm(reference, all, *plain, &bias, &before);
      for (const auto& [target, gemm] : implementations) {
        Rig rig(target, 2, gemm);
        const auto weight = rig.kernels().PackInt8(parts).value();
        for (const std::int64_t num_rows : {1, 2, 7, 16, 17, 40, 65}) {
          const Array a(dtype, std::vector<float>(values.begin(), values.begin() + num_rows * shape.depth));
          ExpectSameBits(RunGemm(rig, a, *weight, &bias, &before),
                         std::vector<float>(expected.begin(), expected.begin() + num_rows * shape.columns),
                         target + " " + gemm + ", " + std::to_string(num_rows) + " rows of " +
                             std::to_string(shape.depth) + " to " + std::to_string(shape.columns));
        }
      }
    }
  }
}

// The reference itself, against the products of what was not rounded.
TEST(Int8GemmTest, RoundingCostsAboutAPercent) {
  Random random(7);
  constexpr Shape kShape = {64, 512};
  const Array w(DType::kF32, random.Normals(kShape.columns * kShape.depth));
  const Array a(DType::kF32, random.Normals(20 * kShape.depth));
  Rig rig("reference");
  const auto weight = rig.kernels().PackInt8(std::vector<MatrixView>{ViewOf(w, kShape.columns, kShape.depth)}).value();
  const std::vector<float> out = RunGemm(rig, a, *weight, nullptr, nullptr);
  const std::vector<double> oracle = Oracle(a, w, kShape);
  double error = 0;
  double size = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    error += (out[i] - oracle[i]) * (out[i] - oracle[i]);
    size += oracle[i] * oracle[i];
  }
  EXPECT_LT(std::sqrt(error / size), 0.015);
  EXPECT_GT(std::sqrt(error / size), 0.001);
}

TEST(Int8GemmTest, RefusesMoreColumnsThanSumsCanHold) {
  for (const std::string& target : AllTargets()) {
    Rig rig(target);
    const Array w(DType::kF32, std::vector<float>(65537, 1.0F));
    const auto weight = rig.kernels().PackInt8(std::vector<MatrixView>{ViewOf(w, 1, 65537)});
    EXPECT_EQ(weight.status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST(ChooseGemmTest, WhatIsNamedIsUsedOrRefused) {
  const std::string best = FastTargets().back();
  const std::string plain = FastTargets().front();  // without dot products
  const auto make = [](const std::string& target, const std::string& gemm) {
    CpuDeviceOptions options;
    options.num_workers = 1;
    options.target = target;
    options.gemm = gemm;
    return MakeCpuDevice(options);
  };
  EXPECT_EQ(make(best, "fma").value()->description(), "cpu " + best + " fma-gemm");
  EXPECT_EQ(make(plain, "auto").value()->description(), "cpu " + plain + " fma-gemm");
  for (const std::string gemm : {"avx512_bf16", "amx"}) {
    const bool is_here = gemm == "amx" ? cpu::AmxDotBodies().ok() : cpu::Avx512DotBodies().ok();
    const auto device = make(best, gemm);
    EXPECT_EQ(device.ok(), is_here) << device.status();
    if (is_here) {
      EXPECT_EQ((*device)->description(), "cpu " + best + " " + gemm + "-gemm");
    }
    EXPECT_EQ(make(plain, gemm).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(make(best, "onednn").status().code(), absl::StatusCode::kInvalidArgument);
}

// It is one chain of fused multiply-adds per element on every SIMD target.
TEST(FmaGemmTest, AllSimdTargetsOfAllMachinesGiveTheSameBits) {
  Random random(4);
  constexpr Shape kShape = {70, 333};
  for (const auto& [dtype, hash] : {std::pair(DType::kF32, 0xf09395dfde745ab2U), {DType::kBF16, 0x14743a7c02176771U}}) {
    const Array w(dtype, random.Uniforms(kShape.columns * kShape.depth));
    const Array a(dtype, random.Uniforms(9 * kShape.depth));
    std::vector<float> expected;
    for (const std::string& target : FastTargets()) {
      Rig rig(target);
      const auto weight = rig.kernels().Pack(std::vector<MatrixView>{ViewOf(w, kShape.columns, kShape.depth)}).value();
      const std::vector<float> out = RunGemm(rig, a, *weight, nullptr, nullptr);
      if (expected.empty()) expected = out;
      ExpectSameBits(out, expected, target);
    }
    EXPECT_EQ(HashLogits(expected), hash);
  }
}

}  // namespace
}  // namespace spillway
