// Prefill by wgmma (kernels/cuda/attention_hopper.cu), which serves where the device need not be batch-invariant:
// against the plain oracle, row by row.

#include "tests/kernels/cuda_device.h"

#define Rig CpuRig
#include "tests/kernels/kernel_rig.h"
#undef Rig

namespace spillway {

// A cuda device that is batch-invariant or not.
class Rig {
 public:
  explicit Rig(Device& device) : device_(device), kernels_(device), stream_(device.NewStream().value()) {}
  const Kernels& kernels() const { return kernels_; }
  Stream& stream() { return *stream_; }
  void Finish() { ASSERT_TRUE(stream_->Record()->Await().ok()) << stream_->status(); }
  bool has_wgmma() const { return device_.description().find("wgmma-prefill") != std::string::npos; }

 private:
  Device& device_;
  HostFacingKernels kernels_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace spillway

#include "tests/kernels/attention_rig.h"

namespace spillway {
namespace {

// Weights of bf16 in the product with V, of f16, and results rounded to these.
double ToleranceOf(DType dtype) { return dtype == DType::kBF16 ? 8e-3 : 1e-3; }

CudaDeviceOptions Options(bool batch_invariant) {
  CudaDeviceOptions options = CudaTestOptions();
  options.batch_invariant = batch_invariant;
  return options;
}

struct Sequence {
  std::size_t num_tokens;
  std::size_t num_new;
};

struct Problem {
  Heads heads;
  DType dtype;
  DType out_dtype;
  std::size_t window;
  std::vector<Sequence> sequences;
};

std::string NameOf(const Problem& problem) {
  return std::to_string(problem.heads.num_kv_heads) + " kv heads of " + std::to_string(problem.heads.group) +
         ", head_dim " + std::to_string(problem.heads.head_dim) + ", " + std::string(NameOf(problem.dtype)) +
         ", window " + std::to_string(problem.window);
}

class PrefillTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    auto found = MakeCudaDeviceForTest(Options(/*batch_invariant=*/false), &reason);
    if (!found.has_value()) GTEST_SKIP() << reason;
    device_ = *std::move(found);
    rig_.emplace(*device_);
    if (!rig_->has_wgmma()) GTEST_SKIP() << "no wgmma: " << device_->description();
  }

  // Several calls with the same arrays, as layers make them.
  void Check(const Problem& problem) {
    const std::string what = NameOf(problem);
    Random random(17);
    Pool pool(problem.heads, problem.dtype, 2, 300, 5);
    std::vector<Part> parts;
    std::vector<float> oracle;
    const auto num_heads =
        static_cast<std::size_t>(problem.heads.num_kv_heads) * static_cast<std::size_t>(problem.heads.group);
    const auto head_dim = static_cast<std::size_t>(problem.heads.head_dim);
    for (const Sequence& sequence : problem.sequences) {
      const std::vector<float> rows = random.Normals(RowsSize(pool, sequence.num_tokens));
      Part part;
      part.blocks = pool.Add(rows, 1);
      part.first_position = static_cast<std::int32_t>(sequence.num_tokens - sequence.num_new);
      part.q = random.Normals(sequence.num_new * num_heads * head_dim, 2);
      const std::vector<float> expected = Oracle(pool, problem.heads.group, problem.dtype, rows, part, problem.window);
      oracle.insert(oracle.end(), expected.begin(), expected.end());
      parts.push_back(part);
    }
    AttentionCall call(pool, problem.heads.group, 1, problem.dtype, parts);
    call.args.window = static_cast<std::int32_t>(problem.window);
    Array out(problem.out_dtype, oracle.size());
    call.args.out = out.data();
    call.args.out_dtype = problem.out_dtype;
    for (int run = 0; run < 2; ++run) {
      rig_->kernels().Attention(rig_->stream(), call.args);
      rig_->Finish();
      const std::vector<float> actual = out.Values();
      for (std::size_t row = 0; row < oracle.size() / head_dim; ++row) {
        const auto slice = [&](const std::vector<float>& values) {
          return std::vector<float>(values.begin() + static_cast<std::ptrdiff_t>(row * head_dim),
                                    values.begin() + static_cast<std::ptrdiff_t>((row + 1) * head_dim));
        };
        ExpectNearByNorm(
            slice(actual), slice(oracle), ToleranceOf(problem.dtype),
            what + ": token " + std::to_string(row / num_heads) + ", head " + std::to_string(row % num_heads));
        if (HasFatalFailure()) return;
      }
    }
  }

  std::unique_ptr<Device> device_;
  std::optional<Rig> rig_;
};

TEST_F(PrefillTest, MatchesTheOracle) {
  Check({{2, 4, 128}, DType::kBF16, DType::kBF16, 0, {{100, 100}, {17, 17}, {290, 33}, {40, 1}, {400, 128}}});
  Check({{1, 8, 128}, DType::kF16, DType::kF32, 0, {{513, 20}}});
}

TEST_F(PrefillTest, MatchesTheOracleWithHeadsOfSixtyFour) {
  Check({{3, 2, 64}, DType::kBF16, DType::kF32, 0, {{130, 130}, {300, 47}}});
  Check({{2, 1, 64}, DType::kF16, DType::kF16, 0, {{260, 150}, {66, 66}}});
}

// A tile has whole tokens only: 189 rows of its 192, and 105.
TEST_F(PrefillTest, MatchesTheOracleWithGroupsThatDivideNoTile) {
  Check({{1, 7, 128}, DType::kBF16, DType::kF32, 0, {{61, 61}, {190, 21}}});
  Check({{1, 105, 64}, DType::kBF16, DType::kBF16, 0, {{35, 3}}});
}

TEST_F(PrefillTest, MatchesTheOracleWithinAWindow) {
  for (const std::size_t window : {1, 40, 128, 300}) {
    Check({{1, 4, 128}, DType::kBF16, DType::kF32, window, {{450, 70}, {35, 35}}});
  }
}

// More keys than its shared memory holds at once, and items in all its states.
TEST_F(PrefillTest, MatchesTheOracleOverManyTiles) {
  Check({{1, 4, 128}, DType::kBF16, DType::kF32, 0, {{1100, 200}, {700, 64}}});
}

// Were the kernel not taken, these would be the same.
TEST_F(PrefillTest, ItsBitsAreNotTheBatchInvariantOnes) {
  SPILLWAY_CUDA_OR_SKIP(invariant, Options(/*batch_invariant=*/true));
  Rig invariant_rig(*invariant);
  EXPECT_FALSE(invariant_rig.has_wgmma());
  Random random(3);
  Pool pool({1, 4, 128}, DType::kBF16, 1, 40, 9);
  Part part;
  part.blocks = pool.Add(random.Normals(RowsSize(pool, 300)), 0);
  part.first_position = 200;
  part.q = random.Normals(100 * 4 * 128, 2);
  const std::vector<float> out = RunAttention(*rig_, pool, 4, 0, DType::kBF16, {part});
  const std::vector<float> invariant_out = RunAttention(invariant_rig, pool, 4, 0, DType::kBF16, {part});
  EXPECT_NE(out, invariant_out);
  // Decoding is served by the same kernel on both.
  part.first_position = 299;
  part.q.resize(4 * 128);
  ExpectSameBits(RunAttention(*rig_, pool, 4, 0, DType::kBF16, {part}),
                 RunAttention(invariant_rig, pool, 4, 0, DType::kBF16, {part}), "decode");
}

}  // namespace
}  // namespace spillway
