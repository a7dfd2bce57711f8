#include "kernels/cuda/kernels.h"

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/argument_checks.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/gather.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/stream.h"
#include "kernels/status_macros.h"

namespace spillway::cuda {
namespace {

// launch.h mirrors these for nvcc.
static_assert(sizeof(SampleRowParams) == sizeof(SampleRow));
static_assert(offsetof(SampleRowParams, top_k) == offsetof(SampleRow, top_k));
static_assert(offsetof(SampleRowParams, seed) == offsetof(SampleRow, seed));
static_assert(offsetof(SampleRowParams, output_index) == offsetof(SampleRow, output_index));
static_assert(offsetof(SampleRowParams, num_logprobs) == offsetof(SampleRow, num_logprobs));
static_assert(kMaxReportedLogprobs == kMaxLogprobs && sizeof(SampleRowResult) == sizeof(SampleResult));
static_assert(offsetof(SampleRowResult, num_top) == offsetof(SampleResult, num_top));
static_assert(offsetof(SampleRowResult, top_logprobs) == offsetof(SampleResult, top_logprobs));
static_assert(offsetof(SampleRowResult, logits_hash) == offsetof(SampleResult, logits_hash));

constexpr int kMaxHeadDim = 256;

class CudaMatrix final : public PackedMatrix {
 public:
  CudaMatrix(std::int64_t rows, std::int64_t cols, DType dtype, Buffer values)
      : PackedMatrix(rows, cols, values.size_bytes), dtype_(dtype), values_(std::move(values)) {}
  DType dtype() const { return dtype_; }
  const std::byte* values() const { return values_.get(); }  // row-major, no padding

 private:
  const DType dtype_;
  const Buffer values_;
};

KvLayer LayerOf(const KvView& kv, int layer) {
  const KvLayout& layout = kv.layout;
  return {.pool = kv.pool + layout.strip_offset(layer, 0),
          .block_bytes = static_cast<std::int64_t>(layout.block_bytes()),
          .strip_bytes = static_cast<std::int64_t>(layout.strip_bytes()),
          .row_bytes = static_cast<std::int64_t>(layout.row_bytes()),
          .num_kv_heads = layout.num_kv_heads,
          .head_dim = layout.head_dim,
          .dtype = layout.dtype};
}

class CudaKernels final : public Kernels {
 public:
  CudaKernels(std::shared_ptr<Slab> slab, CudaKernelsOptions options)
      : slab_(std::move(slab)), options_(std::move(options)) {}

  bool Computes(DType /*dtype*/) const override { return true; }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const override {
    ASSIGN_OR_RETURN(const std::int64_t rows, StackedRows(parts));
    ASSIGN_OR_RETURN(Buffer values, Upload(parts, rows));
    return std::make_unique<CudaMatrix>(rows, parts[0].cols, parts[0].dtype, std::move(values));
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> PackInt8(std::span<const MatrixView> /*parts*/) const override {
    return absl::UnimplementedError("cuda device: int8 matrices are not built");
  }

  absl::StatusOr<EmbeddingTable> MakeEmbeddingTable(const MatrixView& table) const override {
    ASSIGN_OR_RETURN(const std::int64_t rows, StackedRows({&table, 1}));
    ASSIGN_OR_RETURN(Buffer values, Upload({&table, 1}, rows));
    MatrixView view = table;
    view.data = values.get();
    view.row_stride = table.cols;
    return EmbeddingTable{view, std::move(values)};
  }

  void Embed(Stream& stream, const EmbedArgs& args) const override {
    auto& cuda = static_cast<CudaStream&>(stream);
    cuda.Queue("embed", [&](cudaStream_t handle) {
      return LaunchEmbed({.tokens = args.tokens,
                          .num_tokens = args.num_tokens,
                          .table = args.table.data,
                          .dtype = args.table.dtype,
                          .vocab = args.table.rows,
                          .hidden = args.table.cols,
                          .row_stride = args.table.row_stride,
                          .out = args.out,
                          .sampled = reinterpret_cast<const SampleRowResult*>(args.sampled),
                          .fault = cuda.fault()},
                         handle);
    });
  }

  void RmsNorm(Stream& stream, const RmsNormArgs& args) const override {
    Queue(stream, "rms_norm", [&](cudaStream_t handle) {
      return LaunchRmsNorm({.x = args.x,
                            .weight = args.weight,
                            .rows = args.rows,
                            .epsilon = args.epsilon,
                            .num_rows = args.num_rows,
                            .hidden = args.hidden,
                            .out = args.out,
                            .out_dtype = args.out_dtype},
                           handle);
    });
  }

  void Gemm(Stream& stream, const GemmArgs& args) const override {
    if (args.num_rows == 0) return;
    const auto& weight = static_cast<const CudaMatrix&>(*args.weight);
    if (args.a_dtype != weight.dtype()) {
      Fail(stream, ActivationsUnlikeWeight(args, weight.dtype()));
      return;
    }
    const bool add = args.output == GemmOutput::kAdd;
    if (options_.blas != nullptr && options_.blas->Gemm(static_cast<CudaStream&>(stream), {.a = args.a,
                                                                                           .weight = weight.values(),
                                                                                           .dtype = weight.dtype(),
                                                                                           .m = args.num_rows,
                                                                                           .n = weight.rows(),
                                                                                           .k = weight.cols(),
                                                                                           .bias = args.bias,
                                                                                           .add = add,
                                                                                           .out = args.out})) {
      return;
    }
    Queue(stream, "gemm", [&](cudaStream_t handle) {
      return LaunchPlainGemm({.a = args.a,
                              .weight = weight.values(),
                              .dtype = weight.dtype(),
                              .num_rows = args.num_rows,
                              .rows = weight.rows(),
                              .cols = weight.cols(),
                              .bias = args.bias,
                              .add = add,
                              .out = args.out},
                             handle);
    });
  }

  void RopeAngles(Stream& stream, const RopeAnglesArgs& args) const override {
    Queue(stream, "rope_angles", [&](cudaStream_t handle) {
      return LaunchRopeAngles({.positions = args.positions,
                               .inverse_frequency = args.inverse_frequency,
                               .num_tokens = args.num_tokens,
                               .half = args.half,
                               .cos_sin = args.cos_sin},
                              handle);
    });
  }

  void RopeAppend(Stream& stream, const RopeAppendArgs& args) const override {
    Queue(stream, "rope_append", [&](cudaStream_t handle) {
      return LaunchRopeAppend({.qkv = args.qkv,
                               .cos_sin = args.cos_sin,
                               .positions = args.positions,
                               .blocks = args.blocks,
                               .num_tokens = args.num_tokens,
                               .num_heads = args.num_heads,
                               .kv = LayerOf(args.kv, args.layer),
                               .q = args.q,
                               .q_dtype = args.q_dtype},
                              handle);
    });
  }

  void Attention(Stream& stream, const AttentionArgs& args) const override {
    if (args.num_tokens == 0 || args.num_sequences == 0) return;
    const KvLayout& layout = args.kv.layout;
    if (layout.head_dim > kMaxHeadDim) {
      Fail(stream, absl::UnimplementedError(
                       absl::StrCat("attention: head_dim ", layout.head_dim, ", only up to ", kMaxHeadDim)));
      return;
    }
    auto& cuda = static_cast<CudaStream&>(stream);
    // The tickets come first, where a new workspace is zeros; then the plan.
    const auto plan_bytes = CudaStream::kWorkspaceZeros + static_cast<std::size_t>(args.num_tokens) * sizeof(TokenPlan);
    std::byte* const workspace = cuda.Workspace(CudaStream::Purpose::kAttention, options_.attention_workspace_bytes);
    if (workspace == nullptr) return;
    const std::size_t bytes = options_.attention_workspace_bytes;
    if (plan_bytes > bytes) {
      Fail(stream, absl::ResourceExhaustedError(
                       absl::StrCat("attention: a workspace of ", bytes, " bytes for ", args.num_tokens, " tokens")));
      return;
    }
    // Whole states in what the plan leaves: [max, sum] of all, then their outputs, 16-byte aligned.
    const std::size_t state_bytes = sizeof(float2) + static_cast<std::size_t>(layout.head_dim) * sizeof(float);
    const std::size_t capacity = (bytes - plan_bytes) / state_bytes / 2 * 2;
    std::byte* const states = workspace + plan_bytes;
    const bool is_whole = args.pass == AttentionPass::kWhole;
    cuda.Queue("attention", [&](cudaStream_t handle) {
      return LaunchAttention({.q = args.q,
                              .q_dtype = args.q_dtype,
                              .num_heads = args.num_heads,
                              .scale = args.scale,
                              .kv = LayerOf(args.kv, args.layer),
                              .num_sequences = static_cast<std::int32_t>(args.num_sequences),
                              .num_tokens = static_cast<std::int32_t>(args.num_tokens),
                              .query_begin = args.query_begin,
                              .first_position = args.first_position,
                              .block_begin = args.block_begin,
                              .block_table = args.block_table,
                              .out = args.out,
                              .out_dtype = args.out_dtype,
                              .window = args.window > 0 ? args.window : kNoWindow,
                              .row_bias = args.row_bias,
                              .row_bias_stride = args.row_bias_stride,
                              .row_bias_unit = 1 / args.scale,
                              .key_begin = is_whole ? nullptr : args.key_begin,
                              .key_end = is_whole ? nullptr : args.key_end,
                              .carried = is_whole ? nullptr : args.states,
                              .starts_empty = is_whole || args.pass == AttentionPass::kFirst,
                              .finishes = is_whole || args.pass == AttentionPass::kLast,
                              .state_capacity = static_cast<std::int64_t>(capacity),
                              .state_out = reinterpret_cast<float*>(states + capacity * sizeof(float2)),
                              .state_max_sum = reinterpret_cast<float2*>(states),
                              .plan = reinterpret_cast<TokenPlan*>(workspace + CudaStream::kWorkspaceZeros),
                              .num_multiprocessors = options_.num_multiprocessors,
                              .has_copy_engine = options_.has_copy_engine,
                              .may_use_wgmma = options_.may_use_wgmma,
                              .tickets = reinterpret_cast<unsigned*>(workspace)},
                             handle);
    });
  }

  void SiluMul(Stream& stream, const SiluMulArgs& args) const override {
    Queue(stream, "silu_mul", [&](cudaStream_t handle) {
      return LaunchSiluMul({.gate_up = args.gate_up,
                            .num_tokens = args.num_tokens,
                            .inner = args.inner,
                            .out = args.out,
                            .out_dtype = args.out_dtype},
                           handle);
    });
  }

  void Sample(Stream& stream, const SampleArgs& args) const override {
    Queue(stream, "sample", [&](cudaStream_t handle) {
      return LaunchSample({.logits = args.logits,
                           .num_rows = args.num_rows,
                           .vocab = static_cast<std::int32_t>(args.vocab),
                           .rows = reinterpret_cast<const SampleRowParams*>(args.rows),
                           .banned_begin = args.banned_begin,
                           .banned = args.banned,
                           .hash_logits = args.hash_logits,
                           .results = reinterpret_cast<SampleRowResult*>(args.results)},
                          handle);
    });
  }

 private:
  template <typename Launch>
  static void Queue(Stream& stream, const char* what, Launch launch) {
    static_cast<CudaStream&>(stream).Queue(what, launch);
  }
  static void Fail(Stream& stream, absl::Status status) { static_cast<CudaStream&>(stream).Fail(std::move(status)); }

  // The parts below each other, without padding between rows.
  absl::StatusOr<Buffer> Upload(std::span<const MatrixView> parts, std::int64_t rows) const {
    RETURN_IF_ERROR(ToStatus(cudaSetDevice(options_.device), "choosing the device"));
    const std::size_t element = SizeOf(parts[0].dtype);
    const std::size_t row_bytes = static_cast<std::size_t>(parts[0].cols) * element;
    ASSIGN_OR_RETURN(Buffer values, slab_->Take(static_cast<std::size_t>(rows) * row_bytes));
    std::byte* to = values.get();
    for (const MatrixView& part : parts) {
      const std::size_t part_bytes = static_cast<std::size_t>(part.rows) * row_bytes;
      const cudaError_t error =
          part.row_stride == part.cols
              ? cudaMemcpy(to, part.data, part_bytes, cudaMemcpyHostToDevice)
              : cudaMemcpy2D(to, row_bytes, part.data, static_cast<std::size_t>(part.row_stride) * element, row_bytes,
                             static_cast<std::size_t>(part.rows), cudaMemcpyHostToDevice);
      RETURN_IF_ERROR(ToStatus(error, absl::StrCat("uploading ", part.rows, " x ", part.cols, " weights")));
      to += part_bytes;
    }
    RETURN_IF_ERROR(ToStatus(cudaDeviceSynchronize(), "uploading weights"));
    return values;
  }

  const std::shared_ptr<Slab> slab_;
  const CudaKernelsOptions options_;
};

}  // namespace

std::unique_ptr<Kernels> MakeCudaKernels(std::shared_ptr<Slab> slab, CudaKernelsOptions options) {
  return std::make_unique<CudaKernels>(std::move(slab), std::move(options));
}

void GatherRows(Stream& stream, const GatherParams& params) {
  static_cast<CudaStream&>(stream).Queue("gather_rows",
                                         [&](cudaStream_t handle) { return LaunchGatherRows(params, handle); });
}

}  // namespace spillway::cuda
