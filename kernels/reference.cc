#include "kernels/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numbers>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/argument_checks.h"
#include "kernels/cpu/stream.h"
#include "kernels/element.h"
#include "kernels/int8.h"
#include "kernels/sampler.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

class ReferenceMatrix final : public PackedMatrix {
 public:
  ReferenceMatrix(std::int64_t rows, std::int64_t cols, std::vector<float> values)
      : PackedMatrix(rows, cols, values.size() * sizeof(float)), values_(std::move(values)) {}
  const float* row(std::int64_t index) const { return values_.data() + index * cols(); }

 private:
  std::vector<float> values_;
};

struct Int8Row {
  std::vector<std::int32_t> values;
  float scale = 0;
};

Int8Row RoundToInt8(const std::byte* array, DType dtype, std::int64_t begin, std::int64_t size) {
  float max = 0;
  for (std::int64_t i = begin; i < begin + size; ++i) max = std::max(max, std::abs(LoadElement(array, dtype, i)));
  const Int8Scale scale = Int8ScaleOf(max);
  Int8Row row{{}, scale.scale};
  for (std::int64_t i = begin; i < begin + size; ++i) {
    row.values.push_back(static_cast<std::int32_t>(std::nearbyint(LoadElement(array, dtype, i) * scale.inverse)));
  }
  return row;
}

class ReferenceInt8Matrix final : public PackedMatrix {
 public:
  ReferenceInt8Matrix(std::int64_t cols, std::vector<Int8Row> rows)
      : PackedMatrix(static_cast<std::int64_t>(rows.size()), cols, rows.size() * static_cast<std::size_t>(cols) * 4),
        rows_(std::move(rows)) {}
  const Int8Row& row(std::int64_t index) const { return rows_[static_cast<std::size_t>(index)]; }

 private:
  std::vector<Int8Row> rows_;
};

void Gemm(const GemmArgs& args, const ReferenceInt8Matrix& weight) {
  for (std::int64_t m = 0; m < args.num_rows; ++m) {
    const Int8Row a = RoundToInt8(args.a, args.a_dtype, m * weight.cols(), weight.cols());
    for (std::int64_t n = 0; n < weight.rows(); ++n) {
      const Int8Row& w = weight.row(n);
      std::int32_t sum = 0;
      for (std::size_t k = 0; k < a.values.size(); ++k) sum += a.values[k] * w.values[k];
      float product = static_cast<float>(sum) * a.scale * w.scale;
      if (args.bias != nullptr) product += args.bias[n];
      float& out = args.out[m * weight.rows() + n];
      out = args.output == GemmOutput::kAdd ? out + product : product;
    }
  }
}

absl::Status Embed(const EmbedArgs& args) {
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const std::int64_t token = TokenAt(args, t);
    if (token < 0 || token >= args.table.rows) return TokenOutsideTable(args, t);
    for (std::int64_t i = 0; i < args.table.cols; ++i) {
      args.out[t * args.table.cols + i] =
          LoadElement(args.table.data, args.table.dtype, token * args.table.row_stride + i);
    }
  }
  return absl::OkStatus();
}

void RmsNorm(const RmsNormArgs& args) {
  for (std::int64_t t = 0; t < args.num_rows; ++t) {
    const float* const x = args.x + (args.rows != nullptr ? args.rows[t] : t) * args.hidden;
    double sum = 0;
    for (std::int64_t i = 0; i < args.hidden; ++i) sum += double{x[i]} * x[i];
    const double scale = 1.0 / std::sqrt(sum / static_cast<double>(args.hidden) + args.epsilon);
    for (std::int64_t i = 0; i < args.hidden; ++i) {
      StoreElement(args.out, args.out_dtype, t * args.hidden + i, static_cast<float>(x[i] * scale * args.weight[i]));
    }
  }
}

void Gemm(const GemmArgs& args) {
  if (const auto* int8 = dynamic_cast<const ReferenceInt8Matrix*>(args.weight)) return Gemm(args, *int8);
  const auto& weight = static_cast<const ReferenceMatrix&>(*args.weight);
  for (std::int64_t m = 0; m < args.num_rows; ++m) {
    for (std::int64_t n = 0; n < weight.rows(); ++n) {
      const float* const row = weight.row(n);
      double sum = args.bias != nullptr ? args.bias[n] : 0.0F;
      for (std::int64_t k = 0; k < weight.cols(); ++k) {
        sum += double{LoadElement(args.a, args.a_dtype, m * weight.cols() + k)} * row[k];
      }
      float& out = args.out[m * weight.rows() + n];
      out = static_cast<float>(args.output == GemmOutput::kAdd ? out + sum : sum);
    }
  }
}

void RopeAngles(const RopeAnglesArgs& args) {
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    float* const out = args.cos_sin + t * 2 * args.half;
    for (int i = 0; i < args.half; ++i) {
      const double angle = args.positions[t] * args.inverse_frequency[i];
      out[i] = static_cast<float>(std::cos(angle));
      out[args.half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void Rotate(const float* x, const float* cos_sin, int head_dim, DType dtype, std::byte* out) {
  const int half = head_dim / 2;
  for (int i = 0; i < half; ++i) {
    const double cos = cos_sin[i];
    const double sin = cos_sin[half + i];
    StoreElement(out, dtype, i, static_cast<float>(x[i] * cos - x[half + i] * sin));
    StoreElement(out, dtype, half + i, static_cast<float>(x[half + i] * cos + x[i] * sin));
  }
}

void RopeAppend(const RopeAppendArgs& args) {
  const KvLayout& layout = args.kv.layout;
  const std::int64_t dim = layout.head_dim;
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const float* const qkv = args.qkv + t * (args.num_heads + 2 * layout.num_kv_heads) * dim;
    const float* const cos_sin = args.cos_sin + t * dim;
    for (std::int64_t h = 0; h < args.num_heads; ++h) {
      Rotate(qkv + h * dim, cos_sin, layout.head_dim, args.q_dtype,
             args.q + (t * args.num_heads + h) * dim * static_cast<std::int64_t>(SizeOf(args.q_dtype)));
    }
    if (args.blocks[t] == kNoBlock) continue;
    for (int h = 0; h < layout.num_kv_heads; ++h) {
      std::byte* const row = args.kv.pool + static_cast<std::size_t>(args.blocks[t]) * layout.block_bytes() +
                             layout.strip_offset(args.layer, h) +
                             static_cast<std::size_t>(args.positions[t] % kBlockTokens) * layout.row_bytes();
      Rotate(qkv + (args.num_heads + h) * dim, cos_sin, layout.head_dim, layout.dtype, row);
      const float* const v = qkv + (args.num_heads + layout.num_kv_heads + h) * dim;
      for (std::int64_t i = 0; i < dim; ++i) StoreElement(row, layout.dtype, dim + i, v[i]);
    }
  }
}

// As AttentionState.
struct RowState {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
  std::vector<double> out;
};

// The keys that one query row reads: positions [begin, end) of the blocks listed from `begin` on.
struct KeyRange {
  const std::int32_t* blocks = nullptr;
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t seen_from = 0;  // what lies before is not in the row's window
};

// One query row over a range of keys, merged into `state`.
void AttendRange(const AttentionArgs& args, const KeyRange& keys, int kv_head, std::int64_t row, RowState& state) {
  if (keys.seen_from >= keys.end) return;
  const KvLayout& layout = args.kv.layout;
  const std::int64_t dim = layout.head_dim;
  const auto kv_row = [&](std::int64_t p) {
    const std::int64_t i = p - keys.begin;
    return args.kv.pool + static_cast<std::size_t>(keys.blocks[i / kBlockTokens]) * layout.block_bytes() +
           layout.strip_offset(args.layer, kv_head) + static_cast<std::size_t>(i % kBlockTokens) * layout.row_bytes();
  };
  const auto bias = [&](std::int64_t p) {
    const std::int64_t i = p - keys.begin;
    return args.row_bias == nullptr ? 0.0
                                    : double{args.row_bias[keys.blocks[i / kBlockTokens] * args.row_bias_stride +
                                                           kv_head * kBlockTokens + i % kBlockTokens]};
  };
  std::vector<double> weights;
  for (std::int64_t p = keys.seen_from; p < keys.end; ++p) {
    double dot = 0;
    for (std::int64_t i = 0; i < dim; ++i) {
      dot += double{LoadElement(args.q, args.q_dtype, row * dim + i)} * LoadElement(kv_row(p), layout.dtype, i);
    }
    weights.push_back((dot * args.scale + bias(p)) / std::numbers::ln2);
  }
  // Nothing that the row sees.
  if (std::ranges::all_of(weights, [](double w) { return w == -std::numeric_limits<double>::infinity(); })) return;
  const double max = std::max(state.max, *std::max_element(weights.begin(), weights.end()));
  for (double& weight : weights) weight = std::exp2(weight - max);
  const double kept = std::exp2(state.max - max);
  state.max = max;
  state.sum *= kept;
  for (const double weight : weights) state.sum += weight;
  for (std::int64_t i = 0; i < dim; ++i) {
    double& out = state.out[static_cast<std::size_t>(i)];
    out *= kept;
    for (std::int64_t p = keys.seen_from; p < keys.end; ++p) {
      out += weights[static_cast<std::size_t>(p - keys.seen_from)] * LoadElement(kv_row(p), layout.dtype, dim + i);
    }
  }
}

void Attend(const AttentionArgs& args, const KeyRange& keys, int kv_head, std::int64_t row) {
  const auto dim = static_cast<std::size_t>(args.kv.layout.head_dim);
  const bool is_whole = args.pass == AttentionPass::kWhole;
  float* const carried = is_whole ? nullptr : args.states + row * static_cast<std::int64_t>(dim + 2);
  RowState state;
  state.out.resize(dim);
  if (args.pass == AttentionPass::kMiddle || args.pass == AttentionPass::kLast) {
    std::copy_n(carried, dim, state.out.begin());
    state.max = carried[dim];
    state.sum = carried[dim + 1];
  }
  AttendRange(args, keys, kv_head, row, state);
  if (args.pass == AttentionPass::kFirst || args.pass == AttentionPass::kMiddle) {
    for (std::size_t i = 0; i < dim; ++i) carried[i] = static_cast<float>(state.out[i]);
    carried[dim] = static_cast<float>(state.max);
    carried[dim + 1] = static_cast<float>(state.sum);
    return;
  }
  for (std::size_t i = 0; i < dim; ++i) {
    StoreElement(args.out, args.out_dtype, row * static_cast<std::int64_t>(dim) + static_cast<std::int64_t>(i),
                 state.sum == 0 ? 0.0F : static_cast<float>(state.out[i] / state.sum));
  }
}

void Attention(const AttentionArgs& args) {
  const int group = args.num_heads / args.kv.layout.num_kv_heads;
  const bool is_whole = args.pass == AttentionPass::kWhole;
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    for (std::int64_t t = args.query_begin[s]; t < args.query_begin[s + 1]; ++t) {
      const std::int64_t position = args.first_position[s] + (t - args.query_begin[s]);
      KeyRange keys = {args.block_table + args.block_begin[s], 0, position + 1, 0};
      if (!is_whole) keys.begin = args.key_begin[s];
      if (!is_whole) keys.end = std::min<std::int64_t>(keys.end, args.key_end[s]);
      keys.seen_from = args.window > 0 ? std::max(keys.begin, position + 1 - args.window) : keys.begin;
      for (int h = 0; h < args.num_heads; ++h) Attend(args, keys, h / group, t * args.num_heads + h);
    }
  }
}

void SiluMul(const SiluMulArgs& args) {
  for (std::int64_t t = 0; t < args.num_tokens; ++t) {
    const float* const gate = args.gate_up + t * 2 * args.inner;
    for (std::int64_t i = 0; i < args.inner; ++i) {
      const double silu = gate[i] / (1.0 + std::exp(-double{gate[i]}));
      StoreElement(args.out, args.out_dtype, t * args.inner + i, static_cast<float>(silu * gate[args.inner + i]));
    }
  }
}

// A candidate of the selection. NaN is replaced before.
struct Candidate {
  std::int32_t id = 0;
  float logit = 0;
  float distance = 0;
  std::uint64_t weight = 0;
};

bool Likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Largest logit first.
std::vector<Candidate> Ranked(std::span<const float> logits, std::span<const std::int32_t> banned) {
  std::vector<Candidate> ranked;
  for (std::int32_t id = 0; id < static_cast<std::int32_t>(logits.size()); ++id) {
    const float logit = logits[static_cast<std::size_t>(id)];
    if (std::find(banned.begin(), banned.end(), id) != banned.end()) continue;
    ranked.push_back({id, std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit, 0, 0});
  }
  std::sort(ranked.begin(), ranked.end(), Likelier);
  return ranked;
}

std::int32_t Choose(const SampleRow& row, std::vector<Candidate> kept) {
  if (IsGreedy(row)) return kept.front().id;
  for (Candidate& candidate : kept) {
    candidate.distance = ScaledDistance(candidate.logit, kept.front().logit, DistanceScale(row));
    candidate.weight = WeightOf(candidate.distance);
  }
  if (row.min_p > 0) {
    std::erase_if(kept, [&](const Candidate& candidate) { return !(candidate.distance >= LowestDistance(row.min_p)); });
  }
  if (row.top_k > 0 && static_cast<std::size_t>(row.top_k) < kept.size())
    kept.resize(static_cast<std::size_t>(row.top_k));
  std::uint64_t total = 0;
  for (const Candidate& candidate : kept) total += candidate.weight;
  if (row.top_p < 1) {
    const std::uint64_t wanted = PrefixWeight(row.top_p, total);
    std::size_t size = 0;
    std::uint64_t sum = 0;
    do {
      sum += kept[size++].weight;
    } while (sum < wanted);
    kept.resize(size);
    total = sum;
  }
  std::sort(kept.begin(), kept.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  const std::uint64_t target = DrawTarget(row, total);
  std::uint64_t sum = 0;
  for (const Candidate& candidate : kept) {
    sum += candidate.weight;
    if (sum > target) return candidate.id;
  }
  return kept.back().id;
}

void ReportLogprobs(std::span<const float> logits, int num_top, SampleResult& result) {
  const std::vector<Candidate> ranked = Ranked(logits, {});
  double sum = 0;
  for (const Candidate& candidate : ranked) sum += std::exp(double{candidate.logit} - ranked.front().logit);
  const double log_sum = ranked.front().logit + std::log(sum);
  for (std::size_t i = 0; i < ranked.size(); ++i) {
    const auto logprob = static_cast<float>(ranked[i].logit - log_sum);
    if (ranked[i].id == result.token) {
      result.logprob = logprob;
      result.rank = static_cast<std::int32_t>(i) + 1;
    }
    if (static_cast<int>(i) < std::min(num_top, kMaxLogprobs)) {
      result.top_tokens[i] = ranked[i].id;
      result.top_logprobs[i] = logprob;
      result.num_top = static_cast<std::int32_t>(i) + 1;
    }
  }
}

void Sample(const SampleArgs& args) {
  for (std::int64_t r = 0; r < args.num_rows; ++r) {
    const std::span<const float> logits(args.logits + r * args.vocab, static_cast<std::size_t>(args.vocab));
    std::span<const std::int32_t> banned;
    if (args.banned_begin != nullptr)
      banned = {args.banned + args.banned_begin[r], args.banned + args.banned_begin[r + 1]};
    std::vector<Candidate> ranked = Ranked(logits, banned);
    if (ranked.empty()) ranked = Ranked(logits, {});
    SampleResult result;
    result.token = Choose(args.rows[r], std::move(ranked));
    if (args.rows[r].num_logprobs >= 0) ReportLogprobs(logits, args.rows[r].num_logprobs, result);
    if (args.hash_logits) result.logits_hash = HashLogits(logits);
    args.results[r] = result;
  }
}

class ReferenceKernels final : public Kernels {
 public:
  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const override {
    ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
    std::vector<float> values;
    for (const MatrixView& part : parts) {
      for (std::int64_t r = 0; r < part.rows; ++r) {
        for (std::int64_t c = 0; c < part.cols; ++c) {
          values.push_back(LoadElement(part.data, part.dtype, r * part.row_stride + c));
        }
      }
    }
    return std::make_unique<ReferenceMatrix>(rows, parts[0].cols, std::move(values));
  }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> PackInt8(std::span<const MatrixView> parts) const override {
    RETURN_IF_ERROR(RowsToPackInt8(parts).status());
    std::vector<Int8Row> rows;
    for (const MatrixView& part : parts) {
      for (std::int64_t r = 0; r < part.rows; ++r) {
        rows.push_back(RoundToInt8(part.data, part.dtype, r * part.row_stride, part.cols));
      }
    }
    return std::make_unique<ReferenceInt8Matrix>(parts[0].cols, std::move(rows));
  }

  absl::StatusOr<EmbeddingTable> MakeEmbeddingTable(const MatrixView& table) const override {
    RETURN_IF_ERROR(RowsToPack({&table, 1}).status());
    return EmbeddingTable{table, {}};
  }

  void Embed(Stream& stream, const EmbedArgs& args) const override {
    Queue(stream, [args] { return spillway::Embed(args); });
  }
  void RmsNorm(Stream& stream, const RmsNormArgs& args) const override { Queue(stream, args, spillway::RmsNorm); }
  void Gemm(Stream& stream, const GemmArgs& args) const override { Queue(stream, args, spillway::Gemm); }
  void RopeAngles(Stream& stream, const RopeAnglesArgs& args) const override {
    Queue(stream, args, spillway::RopeAngles);
  }
  void RopeAppend(Stream& stream, const RopeAppendArgs& args) const override {
    Queue(stream, args, spillway::RopeAppend);
  }
  void Attention(Stream& stream, const AttentionArgs& args) const override { Queue(stream, args, spillway::Attention); }
  void SiluMul(Stream& stream, const SiluMulArgs& args) const override { Queue(stream, args, spillway::SiluMul); }
  void Sample(Stream& stream, const SampleArgs& args) const override { Queue(stream, args, spillway::Sample); }

 private:
  static void Queue(Stream& stream, std::function<absl::Status()> work) {
    static_cast<cpu::CpuStream&>(stream).Enqueue([work = std::move(work)](const cpu::WorkPlace&) { return work(); });
  }
  template <typename Args>
  static void Queue(Stream& stream, const Args& args, void (*kernel)(const Args&)) {
    Queue(stream, [args, kernel] {
      kernel(args);
      return absl::OkStatus();
    });
  }
};

}  // namespace

std::unique_ptr<Kernels> MakeReferenceKernels() { return std::make_unique<ReferenceKernels>(); }

}  // namespace spillway
