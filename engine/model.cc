#include "engine/model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/arena.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

// One tensor in host memory in the dtype that is wanted: the mapping itself where it fits, else a converted copy.
struct HostMatrix {
  MatrixView view;
  std::vector<std::byte> copy;
};

float ReadFloat(const std::byte* data, DType dtype) {
  if (dtype == DType::kF32) {
    float value = 0;
    std::memcpy(&value, data, sizeof(value));
    return value;
  }
  std::uint16_t bits = 0;
  std::memcpy(&bits, data, sizeof(bits));
  return dtype == DType::kBF16 ? FloatFromBF16(bits) : FloatFromF16(bits);
}

void WriteFloat(std::byte* data, DType dtype, float value) {
  if (dtype == DType::kF32) {
    std::memcpy(data, &value, sizeof(value));
  } else {
    const std::uint16_t bits = dtype == DType::kBF16 ? BF16FromFloat(value) : F16FromFloat(value);
    std::memcpy(data, &bits, sizeof(bits));
  }
}

class WeightReader {
 public:
  WeightReader(const Checkpoint& checkpoint, DType dtype) : checkpoint_(checkpoint), dtype_(dtype) {}

  absl::StatusOr<TensorView> Find(const std::string& name, const std::vector<std::int64_t>& shape) const {
    ASSIGN_OR_RETURN(TensorView tensor, checkpoint_.Find(name));
    if (tensor.shape != shape) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", name, " has shape [", absl::StrJoin(tensor.shape, ", "),
                                                     "], config.json implies [", absl::StrJoin(shape, ", "), "]"));
    }
    return tensor;
  }

  absl::StatusOr<HostMatrix> Matrix(const std::string& name, std::int64_t rows, std::int64_t cols) const {
    ASSIGN_OR_RETURN(const TensorView tensor, Find(name, {rows, cols}));
    HostMatrix matrix;
    matrix.view = {.data = tensor.data, .dtype = dtype_, .rows = rows, .cols = cols, .row_stride = cols};
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(tensor.data) % SizeOf(dtype_) == 0;
    if (tensor.dtype == dtype_ && is_aligned) return matrix;
    const auto count = static_cast<std::size_t>(rows * cols);
    matrix.copy.resize(count * SizeOf(dtype_));
    for (std::size_t i = 0; i < count; ++i) {
      WriteFloat(matrix.copy.data() + i * SizeOf(dtype_), dtype_,
                 ReadFloat(tensor.data + i * SizeOf(tensor.dtype), tensor.dtype));
    }
    matrix.view.data = matrix.copy.data();
    return matrix;
  }

  absl::StatusOr<std::vector<float>> Vector(const std::string& name, std::int64_t size) const {
    ASSIGN_OR_RETURN(const TensorView tensor, Find(name, {size}));
    std::vector<float> values(static_cast<std::size_t>(size));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = ReadFloat(tensor.data + i * SizeOf(tensor.dtype), tensor.dtype);
    }
    return values;
  }

  void Release(const std::string& name) const {
    if (const auto tensor = checkpoint_.Find(name); tensor.ok()) checkpoint_.Release(*tensor);
  }

 private:
  const Checkpoint& checkpoint_;
  const DType dtype_;
};

struct Layer {
  const float* input_norm = nullptr;
  const float* post_norm = nullptr;
  std::unique_ptr<PackedMatrix> qkv;  // q, k, v stacked
  std::unique_ptr<PackedMatrix> output;
  std::unique_ptr<PackedMatrix> gate_up;  // gate, up stacked
  std::unique_ptr<PackedMatrix> down;
};

class DenseDecoder : public Model {
 public:
  DenseDecoder(Device& device, ModelConfig config, GenerationDefaults defaults, DType dtype, Quantization quantization)
      : device_(device),
        config_(std::move(config)),
        defaults_(std::move(defaults)),
        dtype_(dtype),
        quantization_(quantization) {}

  absl::Status Load(const std::string& folder, const std::function<void(std::size_t, std::size_t)>& progress);

  const ModelConfig& config() const override { return config_; }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  DType dtype() const override { return dtype_; }
  KvLayout kv_layout() const override {
    return {.num_layers = config_.num_layers,
            .num_kv_heads = config_.num_kv_heads,
            .head_dim = config_.head_dim,
            .dtype = dtype_};
  }
  std::size_t weight_bytes() const override { return weight_bytes_; }

  absl::StatusOr<std::unique_ptr<KvProjector>> MakeKvProjector(std::int64_t max_positions) override;
  std::size_t WorkspaceBytes(std::int64_t max_tokens, std::int64_t max_sampled) const override;
  absl::Status Reserve(std::int64_t max_tokens, std::int64_t max_sampled) override;
  const float* Forward(Stream& stream, const StepArrays& arrays, const KvView& kv) override;

 private:
  // Activations of one step; see Forward for who writes what.
  struct Workspace {
    float* residual;    // [tokens, hidden]
    float* cos_sin;     // [tokens, head_dim]
    float* wide;        // [tokens, max(qkv width, 2 * inner)]
    std::byte* inner;   // [tokens, inner] of dtype
    std::byte* query;   // [tokens, heads * head_dim] of dtype
    std::byte* narrow;  // [tokens, max(hidden, heads * head_dim)] of dtype
    std::byte* last;    // [sampled, hidden] of dtype
    float* logits;      // [sampled, vocab]
  };
  Workspace LayOut(Arena& arena, std::int64_t max_tokens, std::int64_t max_sampled) const;
  void Attend(Stream& stream, const StepArrays& arrays, const KvView& kv, int layer) const;
  std::int64_t query_width() const { return std::int64_t{config_.num_heads} * config_.head_dim; }
  std::int64_t kv_width() const { return std::int64_t{config_.num_kv_heads} * config_.head_dim; }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(const WeightReader& reader,
                                                     const std::vector<std::pair<std::string, std::int64_t>>& parts,
                                                     std::int64_t cols);

  Device& device_;
  const ModelConfig config_;
  const GenerationDefaults defaults_;
  const DType dtype_;
  const Quantization quantization_;
  std::unique_ptr<Checkpoint> checkpoint_;  // the embedding may be a view of it
  HostMatrix embedding_source_;
  EmbeddingTable embedding_;
  Buffer constants_;  // norm weights and rotary frequencies
  const double* inverse_frequency_ = nullptr;
  const float* final_norm_ = nullptr;
  std::vector<Layer> layers_;
  std::unique_ptr<PackedMatrix> head_;
  std::size_t weight_bytes_ = 0;
  std::function<void(std::size_t)> packed_;  // hears source bytes as they are packed, while loading
  Buffer workspace_memory_;
  Workspace workspace_{};
};

absl::StatusOr<std::unique_ptr<PackedMatrix>> DenseDecoder::Pack(
    const WeightReader& reader, const std::vector<std::pair<std::string, std::int64_t>>& parts, std::int64_t cols) {
  std::vector<HostMatrix> matrices;
  std::vector<MatrixView> views;
  for (const auto& [name, rows] : parts) {
    ASSIGN_OR_RETURN(HostMatrix matrix, reader.Matrix(name, rows, cols));
    matrices.push_back(std::move(matrix));
    views.push_back(matrices.back().view);
  }
  const Kernels& kernels = device_.kernels();
  ASSIGN_OR_RETURN(std::unique_ptr<PackedMatrix> packed,
                   quantization_ == Quantization::kInt8 ? kernels.PackInt8(views) : kernels.Pack(views));
  for (const auto& [name, rows] : parts) {
    reader.Release(name);
    packed_(static_cast<std::size_t>(rows * cols) * SizeOf(dtype_));
  }
  weight_bytes_ += packed->size_bytes();
  return packed;
}

absl::Status DenseDecoder::Load(const std::string& folder,
                                const std::function<void(std::size_t, std::size_t)>& progress) {
  ASSIGN_OR_RETURN(checkpoint_, Checkpoint::Open(folder));
  const WeightReader reader(*checkpoint_, dtype_);
  std::size_t done = 0;
  packed_ = [&](std::size_t bytes) {
    done = std::min(done + bytes, checkpoint_->total_bytes());
    if (progress) progress(done, checkpoint_->total_bytes());
  };

  const std::int64_t hidden = config_.hidden;
  ASSIGN_OR_RETURN(embedding_source_, reader.Matrix("model.embed_tokens.weight", config_.vocab, hidden));
  ASSIGN_OR_RETURN(embedding_, device_.kernels().MakeEmbeddingTable(embedding_source_.view));

  const int half = config_.head_dim / 2;
  std::vector<double> frequencies(static_cast<std::size_t>(half));
  for (int i = 0; i < half; ++i) {
    frequencies[static_cast<std::size_t>(i)] = std::pow(config_.rope_theta, -2.0 * i / config_.head_dim);
  }

  // Vectors go to the device together.
  std::vector<std::vector<float>> norms;
  for (int i = 0; i < config_.num_layers; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    for (const char* name : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
      ASSIGN_OR_RETURN(std::vector<float> norm, reader.Vector(absl::StrCat(prefix, name), hidden));
      norms.push_back(std::move(norm));
    }
  }
  ASSIGN_OR_RETURN(std::vector<float> final_norm, reader.Vector("model.norm.weight", hidden));
  norms.push_back(std::move(final_norm));

  Arena count;
  count.Take<double>(frequencies.size());
  for (const auto& norm : norms) count.Take<float>(norm.size());
  ASSIGN_OR_RETURN(constants_, device_.Allocate(MemoryKind::kDevice, count.used()));
  ASSIGN_OR_RETURN(const Buffer staging, device_.Allocate(MemoryKind::kPinnedHost, count.used()));
  Arena host(staging.get(), staging.size_bytes);
  Arena device(constants_.get(), constants_.size_bytes);
  std::ranges::copy(frequencies, host.Take<double>(frequencies.size()));
  inverse_frequency_ = device.Take<double>(frequencies.size());
  std::vector<const float*> norm_pointers;
  for (const auto& norm : norms) {
    std::ranges::copy(norm, host.Take<float>(norm.size()));
    norm_pointers.push_back(device.Take<float>(norm.size()));
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device_.NewStream());
  stream->Copy(constants_.get(), staging.get(), staging.size_bytes);
  RETURN_IF_ERROR(stream->Record()->Await());
  final_norm_ = norm_pointers.back();

  for (int i = 0; i < config_.num_layers; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    const auto name = [&](const char* suffix) { return absl::StrCat(prefix, suffix); };
    Layer layer;
    layer.input_norm = norm_pointers[2 * static_cast<std::size_t>(i)];
    layer.post_norm = norm_pointers[2 * static_cast<std::size_t>(i) + 1];
    ASSIGN_OR_RETURN(layer.qkv, Pack(reader,
                                     {{name("self_attn.q_proj.weight"), query_width()},
                                      {name("self_attn.k_proj.weight"), kv_width()},
                                      {name("self_attn.v_proj.weight"), kv_width()}},
                                     hidden));
    ASSIGN_OR_RETURN(layer.output, Pack(reader, {{name("self_attn.o_proj.weight"), hidden}}, query_width()));
    ASSIGN_OR_RETURN(
        layer.gate_up,
        Pack(reader, {{name("mlp.gate_proj.weight"), config_.inner}, {name("mlp.up_proj.weight"), config_.inner}},
             hidden));
    ASSIGN_OR_RETURN(layer.down, Pack(reader, {{name("mlp.down_proj.weight"), hidden}}, config_.inner));
    layers_.push_back(std::move(layer));
  }
  const char* const head = config_.tied_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  ASSIGN_OR_RETURN(head_, Pack(reader, {{head, config_.vocab}}, hidden));
  if (progress) progress(checkpoint_->total_bytes(), checkpoint_->total_bytes());
  packed_ = nullptr;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<KvProjector>> DenseDecoder::MakeKvProjector(std::int64_t max_positions) {
  const WeightReader reader(*checkpoint_, dtype_);
  packed_ = [](std::size_t) {};  // nobody waits to hear of it
  KvProjector::Options options{.weights = {},
                               .inverse_frequency = inverse_frequency_,
                               .dtype = dtype_,
                               .max_positions = max_positions,
                               .head_dim = config_.head_dim};
  for (int i = 0; i < config_.num_layers; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".self_attn.");
    ASSIGN_OR_RETURN(std::unique_ptr<PackedMatrix> packed, Pack(reader,
                                                                {{absl::StrCat(prefix, "k_proj.weight"), kv_width()},
                                                                 {absl::StrCat(prefix, "v_proj.weight"), kv_width()}},
                                                                config_.hidden));
    options.weights.push_back(std::move(packed));
  }
  packed_ = nullptr;
  return KvProjector::Make(device_, std::move(options));
}

DenseDecoder::Workspace DenseDecoder::LayOut(Arena& arena, std::int64_t max_tokens, std::int64_t max_sampled) const {
  const auto floats = [&](std::int64_t rows, std::int64_t width) {
    return arena.Take<float>(static_cast<std::size_t>(rows * width));
  };
  const auto values = [&](std::int64_t rows, std::int64_t width) {
    return arena.Take<std::byte>(static_cast<std::size_t>(rows * width) * SizeOf(dtype_));
  };
  const std::int64_t inner = config_.inner;
  Workspace workspace{};
  workspace.residual = floats(max_tokens, config_.hidden);
  workspace.cos_sin = floats(max_tokens, config_.head_dim);
  workspace.wide = floats(max_tokens, std::max(query_width() + 2 * kv_width(), 2 * inner));
  workspace.query = values(max_tokens, query_width());
  workspace.inner = values(max_tokens, inner);
  workspace.narrow = values(max_tokens, std::max<std::int64_t>(config_.hidden, query_width()));
  workspace.last = values(max_sampled, config_.hidden);
  workspace.logits = floats(max_sampled, config_.vocab);
  return workspace;
}

std::size_t DenseDecoder::WorkspaceBytes(std::int64_t max_tokens, std::int64_t max_sampled) const {
  Arena count;
  LayOut(count, max_tokens, max_sampled);
  return count.used();
}

absl::Status DenseDecoder::Reserve(std::int64_t max_tokens, std::int64_t max_sampled) {
  ASSIGN_OR_RETURN(workspace_memory_, device_.Allocate(MemoryKind::kDevice, WorkspaceBytes(max_tokens, max_sampled)));
  Arena arena(workspace_memory_.get(), workspace_memory_.size_bytes);
  workspace_ = LayOut(arena, max_tokens, max_sampled);
  return absl::OkStatus();
}

void DenseDecoder::Attend(Stream& stream, const StepArrays& arrays, const KvView& kv, int layer) const {
  if (arrays.layer_loader != nullptr) arrays.layer_loader->Load(stream, layer);
  const std::int64_t num_resident = arrays.num_sequences - arrays.num_streamed;
  AttentionArgs args{.q = workspace_.query,
                     .q_dtype = dtype_,
                     .num_heads = config_.num_heads,
                     .layer = layer,
                     .scale = 1.0F / std::sqrt(static_cast<float>(config_.head_dim)),
                     .kv = kv,
                     .num_sequences = num_resident,
                     .num_tokens = arrays.num_tokens,
                     .query_begin = arrays.query_begin,
                     .first_position = arrays.first_position,
                     .block_begin = arrays.block_begin,
                     .block_table = arrays.block_table,
                     .out = workspace_.narrow,
                     .out_dtype = dtype_,
                     .window = config_.sliding_window};
  if (num_resident > 0) device_.kernels().Attention(stream, args);
  if (arrays.num_streamed == 0) return;
  args.num_sequences = arrays.num_streamed;
  args.query_begin += num_resident;
  args.first_position += num_resident;
  args.block_begin += num_resident;
  arrays.home_reader->Attend(stream, arrays.home, args);
}

const float* DenseDecoder::Forward(Stream& stream, const StepArrays& arrays, const KvView& kv) {
  const Kernels& kernels = device_.kernels();
  const Workspace& w = workspace_;
  const std::int64_t num_tokens = arrays.num_tokens;
  const auto gemm = [&](const std::byte* a, std::int64_t rows, const PackedMatrix& weight, GemmOutput output,
                        float* out, const PackedMatrix& next) {
    kernels.Gemm(
        stream,
        {.a = a, .a_dtype = dtype_, .num_rows = rows, .weight = &weight, .output = output, .out = out, .next = &next});
  };
  const auto norm = [&](const float* weight, const std::int32_t* rows, std::int64_t num_rows, std::byte* out) {
    kernels.RmsNorm(stream, {.x = w.residual,
                             .weight = weight,
                             .rows = rows,
                             .epsilon = config_.norm_epsilon,
                             .num_rows = num_rows,
                             .hidden = config_.hidden,
                             .out = out,
                             .out_dtype = dtype_});
  };

  kernels.Embed(stream, {.tokens = arrays.tokens,
                         .num_tokens = num_tokens,
                         .table = embedding_.view,
                         .out = w.residual,
                         .sampled = arrays.sampled});
  kernels.RopeAngles(stream, {.positions = arrays.positions,
                              .inverse_frequency = inverse_frequency_,
                              .num_tokens = num_tokens,
                              .half = config_.head_dim / 2,
                              .cos_sin = w.cos_sin});
  for (int i = 0; i < config_.num_layers; ++i) {
    const Layer& layer = layers_[static_cast<std::size_t>(i)];
    norm(layer.input_norm, nullptr, num_tokens, w.narrow);
    if (arrays.input_writer != nullptr) arrays.input_writer->Write(stream, i, w.narrow);
    gemm(w.narrow, num_tokens, *layer.qkv, GemmOutput::kStore, w.wide, *layer.output);
    kernels.RopeAppend(stream, {.qkv = w.wide,
                                .cos_sin = w.cos_sin,
                                .positions = arrays.positions,
                                .blocks = arrays.blocks,
                                .num_tokens = num_tokens,
                                .num_heads = config_.num_heads,
                                .layer = i,
                                .kv = kv,
                                .q = w.query,
                                .q_dtype = dtype_});
    Attend(stream, arrays, kv, i);
    gemm(w.narrow, num_tokens, *layer.output, GemmOutput::kAdd, w.residual, *layer.gate_up);
    norm(layer.post_norm, nullptr, num_tokens, w.narrow);
    kernels.GateUp(stream, {.a = w.narrow,
                            .a_dtype = dtype_,
                            .num_rows = num_tokens,
                            .weight = layer.gate_up.get(),
                            .product = w.wide,
                            .out = w.inner,
                            .out_dtype = dtype_,
                            .next = layer.down.get()});
    const bool is_last = i + 1 == config_.num_layers;
    gemm(w.inner, num_tokens, *layer.down, GemmOutput::kAdd, w.residual,
         is_last ? *head_ : *layers_[static_cast<std::size_t>(i) + 1].qkv);
  }
  if (arrays.num_sampled == 0) return w.logits;
  norm(final_norm_, arrays.sampled_rows, arrays.num_sampled, w.last);
  gemm(w.last, arrays.num_sampled, *head_, GemmOutput::kStore, w.logits, *layers_[0].qkv);
  return w.logits;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Model>> Model::Load(const std::string& folder, DTypeChoice choice,
                                                   Quantization quantization, Device& device,
                                                   const std::function<void(std::size_t, std::size_t)>& progress) {
  ASSIGN_OR_RETURN(ModelConfig config, ReadModelConfig(folder));
  ASSIGN_OR_RETURN(GenerationDefaults defaults, ReadGenerationDefaults(folder));
  for (const std::int32_t token : defaults.eos_tokens) {  // a chat model's turns may end otherwise than its documents
    const bool is_known = std::ranges::count(config.eos_tokens, token) > 0;
    if (!is_known && token < config.vocab) config.eos_tokens.push_back(token);
  }
  DType dtype = device.kernels().Computes(config.weight_dtype) ? config.weight_dtype : DType::kF32;
  if (choice == DTypeChoice::kFloat32) dtype = DType::kF32;
  if (choice == DTypeChoice::kBFloat16) dtype = DType::kBF16;
  auto model = std::make_unique<DenseDecoder>(device, std::move(config), std::move(defaults), dtype, quantization);
  RETURN_IF_ERROR(model->Load(folder, progress));
  return model;
}

}  // namespace spillway
