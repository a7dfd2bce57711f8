#include "kernels/cpu/kernels.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/argument_checks.h"
#include "kernels/cpu/attention.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/gemm_dot.h"
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
    const std::int32_t token = TokenAt(args, t);
    if (token < 0 || token >= args.table.rows) return TokenOutsideTable(args, t);
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
  // A null body of `dot`: BF16 is multiplied as F32 is, INT8 by the target's plain body.
  FastKernels(Target target, const DotBodies& dot, WorkerPool& pool)
      : target_(target),
        dot_(dot),
        pool_(pool),
        gemm_(GemmBodiesOf(target)),
        rows_(RowBodiesOf(target)),
        sample_(SampleBodiesOf(target)) {}

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const override {
    RETURN_IF_ERROR(RowsToPack(parts).status());
    if (parts[0].dtype == DType::kBF16 && dot_.bf16.multiply != nullptr)
      return PackDotBF16(dot_.bf16, gemm_, parts, pool_);
    return PackPanels(gemm_, parts, pool_);
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> PackInt8(std::span<const MatrixView> parts) const override {
    return PackDotInt8(dot_.int8.multiply != nullptr ? dot_.int8 : gemm_.int8, gemm_, parts, pool_);
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

  void GateUp(Stream& stream, const GateUpArgs& args) const override {
    if (!static_cast<const CpuMatrix&>(*args.weight).MultipliesGateUp()) {
      Kernels::GateUp(stream, args);
      return;
    }
    static_cast<CpuStream&>(stream).Enqueue([args](const WorkPlace& place) {
      return static_cast<const CpuMatrix&>(*args.weight).MultiplyGateUp(place, args);
    });
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
    Queue(stream, [this, args](const WorkPlace& place) { RunAttention(target_, place, args); });
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

  const Target target_;
  const DotBodies dot_;
  WorkerPool& pool_;
  const GemmBodies& gemm_;
  const RowBodies& rows_;
  const SampleBodies& sample_;
};

// The dot bodies that go by a name, or the best ones; null for "fma".
struct Choice {
  DotBodies bodies;
  std::string_view name = "fma";
};

absl::StatusOr<Choice> ChooseGemm(Target target, std::string_view gemm) {
  if (gemm == "fma") return Choice{};
  if (gemm != "auto" && gemm != "amx" && gemm != "avx512_bf16") {
    return absl::InvalidArgumentError(
        absl::StrCat("cpu device: gemm '", std::string(gemm), "' is none of auto, fma, avx512_bf16, amx"));
  }
  if (!HasAvx512(target)) {
    if (gemm == "auto") return Choice{};
    return absl::InvalidArgumentError(absl::StrCat("cpu device: gemm '", std::string(gemm),
                                                   "' goes with the avx512 targets, not with ",
                                                   std::string(NameOf(target))));
  }
  if (gemm == "amx" || (gemm == "auto" && target != Target::kAvx512Bf16)) {
    const absl::StatusOr<DotBodies> amx = AmxDotBodies();
    if (amx.ok()) return Choice{*amx, "amx"};
    if (gemm == "amx") return absl::InvalidArgumentError(absl::StrCat("cpu device: ", amx.status().message()));
  }
  const absl::StatusOr<DotBodies> dot = Avx512DotBodies();
  if (dot.ok()) return Choice{*dot, "avx512_bf16"};
  if (gemm == "auto") return Choice{};
  return absl::InvalidArgumentError(absl::StrCat("cpu device: ", dot.status().message()));
}

}  // namespace

absl::StatusOr<CpuKernels> MakeCpuKernels(Target target, std::string_view gemm, WorkerPool& pool) {
  ASSIGN_OR_RETURN(const Choice choice, ChooseGemm(target, gemm));
  return CpuKernels{std::make_unique<FastKernels>(target, choice.bodies, pool),
                    absl::StrCat(std::string(choice.name), "-gemm")};
}

}  // namespace spillway::cpu
