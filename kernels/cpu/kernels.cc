#include "kernels/cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/argument_checks.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_onednn.h"
#include "kernels/cpu/row_bodies.h"
#include "kernels/cpu/sample.h"
#include "kernels/cpu/stream.h"
#include "kernels/status_macros.h"

namespace spillway::cpu {
namespace {

// Calls body(begin, end) for slices of [0, num_rows). A row of `row_elements` is so little work that fewer than some
// thousand elements are not worth waking a worker for.
template <typename Body>
void ForRows(const WorkPlace& place, std::int64_t num_rows, std::int64_t row_elements, Body body) {
  constexpr std::int64_t kElementsPerSlice = 8192;
  const std::int64_t rows_per_slice =
      std::max<std::int64_t>(1, kElementsPerSlice / std::max<std::int64_t>(1, row_elements));
  const std::int64_t num_slices = (num_rows + rows_per_slice - 1) / rows_per_slice;
  place.pool.ParallelFor(num_slices, place.worker, [&](std::int64_t slice, Scratch&) {
    body(slice * rows_per_slice, std::min(num_rows, (slice + 1) * rows_per_slice));
  });
}

absl::Status RunEmbed(const RowBodies& bodies, const WorkPlace& place, const EmbedArgs& args) {
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    if (args.tokens[t] < 0 || args.tokens[t] >= args.table.rows) return TokenOutsideTable(args, t);
  }
  ForRows(place, args.num_tokens, args.table.cols,
          [&](std::int64_t begin, std::int64_t end) { bodies.embed(args, begin, end); });
  return absl::OkStatus();
}

void RunRopeAngles(const WorkPlace& place, const RopeAnglesArgs& args) {
  // A sine and a cosine cost as much as some fifty elements of other work.
  ForRows(place, args.num_tokens, 50 * args.half, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* const out = args.cos_sin + t * 2 * args.half;
      for (int i = 0; i < args.half; ++i) {
        const double angle = args.positions[t] * args.inverse_frequency[i];
        out[i] = static_cast<float>(std::cos(angle));
        out[args.half + i] = static_cast<float>(std::sin(angle));
      }
    }
  });
}

class FastKernels final : public Kernels {
 public:
  // A packer is null where our own GEMM is used.
  FastKernels(Target target, std::unique_ptr<OneDnnPacker> f32, std::unique_ptr<OneDnnPacker> bf16)
      : f32_packer_(std::move(f32)),
        bf16_packer_(std::move(bf16)),
        gemm_(GemmBodiesOf(target)),
        rows_(RowBodiesOf(target)),
        attention_(AttentionBodiesOf(target)),
        sample_(SampleBodiesOf(target)) {}

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const override {
    RETURN_IF_ERROR(RowsToPack(parts).status());
    const OneDnnPacker* const packer = (parts[0].dtype == DType::kF32 ? f32_packer_ : bf16_packer_).get();
    if (packer != nullptr) return packer->Pack(parts);
    return PackPanels(gemm_, parts);
  }

  absl::StatusOr<EmbeddingTable> MakeEmbeddingTable(const MatrixView& table) const override {
    RETURN_IF_ERROR(RowsToPack({&table, 1}).status());
    return EmbeddingTable{table, {}};
  }

  void Embed(Stream& stream, const EmbedArgs& args) const override {
    static_cast<CpuStream&>(stream).Enqueue(
        [this, args](const WorkPlace& place) { return RunEmbed(rows_, place, args); });
  }

  void RmsNorm(Stream& stream, const RmsNormArgs& args) const override {
    Queue(stream, [this, args](const WorkPlace& place) {
      ForRows(place, args.num_rows, args.hidden,
              [&](std::int64_t begin, std::int64_t end) { rows_.rms_norm(args, begin, end); });
    });
  }

  void Gemm(Stream& stream, const GemmArgs& args) const override {
    static_cast<CpuStream&>(stream).Enqueue(
        [args](const WorkPlace& place) { return static_cast<const CpuMatrix&>(*args.weight).Multiply(place, args); });
  }

  void RopeAngles(Stream& stream, const RopeAnglesArgs& args) const override {
    Queue(stream, [args](const WorkPlace& place) { RunRopeAngles(place, args); });
  }

  void RopeAppend(Stream& stream, const RopeAppendArgs& args) const override {
    Queue(stream, [this, args](const WorkPlace& place) {
      const KvLayout& layout = args.kv.layout;
      ForRows(place, args.num_tokens, (args.num_heads + 2 * layout.num_kv_heads) * layout.head_dim,
              [&](std::int64_t begin, std::int64_t end) { rows_.rope_append(args, begin, end); });
    });
  }

  void Attention(Stream& stream, const AttentionArgs& args) const override {
    Queue(stream, [this, args](const WorkPlace& place) { RunAttention(attention_, place, args); });
  }

  void SiluMul(Stream& stream, const SiluMulArgs& args) const override {
    Queue(stream, [this, args](const WorkPlace& place) {
      ForRows(place, args.num_tokens, 4 * args.inner,
              [&](std::int64_t begin, std::int64_t end) { rows_.silu_mul(args, begin, end); });
    });
  }

  void Sample(Stream& stream, const SampleArgs& args) const override {
    Queue(stream, [this, args](const WorkPlace& place) { RunSample(sample_, place, args); });
  }

 private:
  template <typename Work>
  static void Queue(Stream& stream, Work work) {
    static_cast<CpuStream&>(stream).Enqueue([work = std::move(work)](const WorkPlace& place) {
      work(place);
      return absl::OkStatus();
    });
  }

  const std::unique_ptr<OneDnnPacker> f32_packer_;
  const std::unique_ptr<OneDnnPacker> bf16_packer_;
  const GemmBodies& gemm_;
  const RowBodies& rows_;
  const AttentionBodies& attention_;
  const SampleBodies& sample_;
};

// oneDNN's packer for `dtype`, or null and why not.
struct Choice {
  std::unique_ptr<OneDnnPacker> packer;
  std::string name;
};

Choice ChooseGemm(DType dtype, Target target, std::string_view gemm) {
  if (gemm == "own") return {nullptr, "own-gemm"};
  if (target != Target::kAvx512) return {nullptr, "own-gemm"};
  // Measured on Ice Lake: ours is as fast as oneDNN's float GEMM, and needs no library.
  if (gemm == "auto" && dtype == DType::kF32) return {nullptr, "own-gemm"};
  auto packer = MakeOneDnnPacker(dtype);
  if (packer.ok()) return {std::move(packer).value(), absl::StrCat("onednn-", OneDnnVersion(), "-gemm")};
  return {nullptr, absl::StrCat("own-gemm (", packer.status().message(), ")")};
}

}  // namespace

absl::StatusOr<CpuKernels> MakeCpuKernels(Target target, std::string_view gemm) {
  if (gemm != "auto" && gemm != "own" && gemm != "onednn") {
    return absl::InvalidArgumentError(
        absl::StrCat("cpu device: gemm '", std::string(gemm), "' is none of auto, own, onednn"));
  }
  Choice f32 = ChooseGemm(DType::kF32, target, gemm);
  Choice bf16 = ChooseGemm(DType::kBF16, target, gemm);
  const std::string name =
      f32.name == bf16.name ? f32.name : absl::StrCat("float32 ", f32.name, ", bfloat16 ", bf16.name);
  return CpuKernels{std::make_unique<FastKernels>(target, std::move(f32.packer), std::move(bf16.packer)), name};
}

}  // namespace spillway::cpu
