#include "engine/model_config.h"

#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/json_file.h"
#include "engine/safetensors.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxConfigBytes = 16 << 20;
constexpr std::int64_t kMaxWidth = 1 << 20;  // of any matrix side but the vocabulary's

absl::StatusOr<int> Required(const json& config, const char* key, std::int64_t max, const std::string& where) {
  ASSIGN_OR_RETURN(const std::optional<std::int64_t> value, ReadInteger(config, key, 1, max, where));
  if (!value) return absl::InvalidArgumentError(absl::StrCat(where, ": ", key, " is missing"));
  return static_cast<int>(*value);
}

absl::Status RefuseIfTrue(const json& config, const char* key, const std::string& where) {
  ASSIGN_OR_RETURN(const std::optional<bool> value, ReadBool(config, key, where));
  if (value.value_or(false)) return absl::UnimplementedError(absl::StrCat(where, ": ", key, " true is not supported"));
  return absl::OkStatus();
}

absl::Status ReadArchitecture(const json& config, const std::string& where, ModelConfig& model) {
  const json* architectures = FindMember(config, "architectures");
  if (architectures == nullptr || !architectures->is_array() || architectures->size() != 1 ||
      !architectures->front().is_string()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": architectures is not a list of one name"));
  }
  model.architecture = architectures->front().get<std::string>();
  if (model.architecture != "LlamaForCausalLM" && model.architecture != "MistralForCausalLM") {
    return absl::UnimplementedError(absl::StrCat(where, ": architecture ", Excerpt(model.architecture),
                                                 " is not supported; supported: LlamaForCausalLM, MistralForCausalLM"));
  }
  if (const json* quantization = FindMember(config, "quantization_config")) {
    ASSIGN_OR_RETURN(const auto method, ReadString(*quantization, "quant_method", where));
    return absl::UnimplementedError(absl::StrCat(where, ": quantization_config (",
                                                 Excerpt(method.value_or("no quant_method")), ") is not supported"));
  }
  ASSIGN_OR_RETURN(const auto activation, ReadString(config, "hidden_act", where));
  if (activation.value_or("silu") != "silu") {
    return absl::UnimplementedError(
        absl::StrCat(where, ": hidden_act ", Excerpt(*activation), " is not supported; supported: silu"));
  }
  RETURN_IF_ERROR(RefuseIfTrue(config, "attention_bias", where));
  return RefuseIfTrue(config, "mlp_bias", where);
}

absl::Status ReadWidths(const json& config, const std::string& where, ModelConfig& model) {
  ASSIGN_OR_RETURN(model.num_layers, Required(config, "num_hidden_layers", 4096, where));
  ASSIGN_OR_RETURN(model.hidden, Required(config, "hidden_size", kMaxWidth, where));
  ASSIGN_OR_RETURN(model.inner, Required(config, "intermediate_size", kMaxWidth, where));
  ASSIGN_OR_RETURN(model.num_heads, Required(config, "num_attention_heads", 65536, where));
  ASSIGN_OR_RETURN(model.vocab, Required(config, "vocab_size", 1 << 24, where));
  ASSIGN_OR_RETURN(model.max_positions, Required(config, "max_position_embeddings", 1 << 28, where));
  ASSIGN_OR_RETURN(const auto kv_heads, ReadInteger(config, "num_key_value_heads", 1, model.num_heads, where));
  model.num_kv_heads = static_cast<int>(kv_heads.value_or(model.num_heads));
  if (model.num_heads % model.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": num_attention_heads ", model.num_heads,
                                                   " is not a multiple of num_key_value_heads ", model.num_kv_heads));
  }
  ASSIGN_OR_RETURN(const auto head_dim, ReadInteger(config, "head_dim", 2, 4096, where));
  if (!head_dim && model.hidden % model.num_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": head_dim is missing and hidden_size ", model.hidden,
                                                   " is not a multiple of num_attention_heads ", model.num_heads));
  }
  model.head_dim = static_cast<int>(head_dim.value_or(model.hidden / model.num_heads));
  if (model.head_dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": head_dim ", model.head_dim, " is odd, wanted even"));
  }
  if (std::int64_t{model.num_heads} * model.head_dim > kMaxWidth) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": num_attention_heads ", model.num_heads, " x head_dim ",
                                                   model.head_dim, " exceeds the limit ", kMaxWidth));
  }
  return absl::OkStatus();
}

// What Llama's configuration says of it has no effect.
absl::Status ReadWindow(const json& config, const std::string& where, ModelConfig& model) {
  if (model.architecture != "MistralForCausalLM") return absl::OkStatus();
  ASSIGN_OR_RETURN(const auto window,
                   ReadInteger(config, "sliding_window", 1, std::numeric_limits<std::int32_t>::max(), where));
  if (window && *window < model.max_positions) model.sliding_window = static_cast<int>(*window);
  return absl::OkStatus();
}

// `rope_scaling` of older and `rope_parameters` of newer transformers: the same object, with the base inside in the
// latter.
absl::Status ReadRope(const json& config, const std::string& where, ModelConfig& model) {
  const json* base_holder = &config;
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const json* rope = FindMember(config, key);
    if (rope == nullptr) continue;
    if (!rope->is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": ", key, " is ", Shown(*rope), ", wanted an object"));
    }
    const std::string inside = absl::StrCat(where, ": ", key);
    ASSIGN_OR_RETURN(std::optional<std::string> type, ReadString(*rope, "rope_type", inside));
    if (!type) {
      ASSIGN_OR_RETURN(type, ReadString(*rope, "type", inside));
    }
    // Without a type, only parameters without an effect on the angles are plain rope.
    if (type ? *type != "default" : FindMember(*rope, "factor") != nullptr) {
      return absl::UnimplementedError(
          absl::StrCat(inside, " of type ", Excerpt(type.value_or("(none)")), " is not supported"));
    }
    if (FindMember(*rope, "rope_theta") != nullptr) base_holder = rope;
  }
  ASSIGN_OR_RETURN(const auto theta, ReadNumber(*base_holder, "rope_theta", 1.0, 1e12, where));
  model.rope_theta = theta.value_or(10000.0);
  ASSIGN_OR_RETURN(const auto rotated, ReadNumber(config, "partial_rotary_factor", 0.0, 1.0, where));
  if (rotated.value_or(1.0) != 1.0) {
    return absl::UnimplementedError(absl::StrCat(where, ": partial_rotary_factor ", *rotated, " is not supported"));
  }
  return absl::OkStatus();
}

// An id, a list of ids, or nothing.
absl::StatusOr<std::vector<std::int32_t>> ReadTokens(const json& config, const char* key, std::int64_t vocab,
                                                     const std::string& where) {
  const json* value = FindMember(config, key);
  if (value == nullptr) return std::vector<std::int32_t>();
  std::vector<std::int32_t> tokens;
  const json list = value->is_array() ? *value : json::array({*value});
  for (const json& element : list) {
    ASSIGN_OR_RETURN(const auto token, ReadInteger(json{{key, element}}, key, 0, vocab - 1, where));
    if (!token) return absl::InvalidArgumentError(absl::StrCat(where, ": ", key, " holds null"));
    tokens.push_back(static_cast<std::int32_t>(*token));
  }
  return tokens;
}

absl::Status ReadTokenIds(const json& config, const std::string& where, ModelConfig& model) {
  ASSIGN_OR_RETURN(const auto bos, ReadInteger(config, "bos_token_id", 0, model.vocab - 1, where));
  model.bos_token = static_cast<std::int32_t>(bos.value_or(-1));
  ASSIGN_OR_RETURN(model.eos_tokens, ReadTokens(config, "eos_token_id", model.vocab, where));
  return absl::OkStatus();
}

absl::Status ReadWeightType(const json& config, const std::string& folder, const std::string& where,
                            ModelConfig& model) {
  std::optional<std::string> name;
  for (const char* key : {"dtype", "torch_dtype"}) {
    if (!name) {
      ASSIGN_OR_RETURN(name, ReadString(config, key, where));
    }
  }
  if (!name) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(folder));
    ASSIGN_OR_RETURN(const TensorView embedding, checkpoint->Find("model.embed_tokens.weight"));
    model.weight_dtype = embedding.dtype;
    return absl::OkStatus();
  }
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    if (*name == NameOf(dtype)) {
      model.weight_dtype = dtype;
      return absl::OkStatus();
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat(where, ": torch_dtype is ", Excerpt(*name), ", wanted float32, float16 or bfloat16"));
}

template <typename Value>
absl::Status ReadDefault(const json& config, const char* key, double min, double max, const std::string& where,
                         std::optional<Value>& value) {
  ASSIGN_OR_RETURN(const auto number, ReadNumber(config, key, min, max, where));
  if (number) value = static_cast<Value>(*number);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/config.json");
  ASSIGN_OR_RETURN(const json config, ReadJsonFile(path, kMaxConfigBytes));
  ModelConfig model;
  RETURN_IF_ERROR(ReadArchitecture(config, path, model));
  RETURN_IF_ERROR(ReadWidths(config, path, model));
  RETURN_IF_ERROR(ReadWindow(config, path, model));
  RETURN_IF_ERROR(ReadRope(config, path, model));
  ASSIGN_OR_RETURN(const auto epsilon, ReadNumber(config, "rms_norm_eps", 1e-12, 1.0, path));
  model.norm_epsilon = static_cast<float>(epsilon.value_or(1e-6));  // transformers' default
  ASSIGN_OR_RETURN(const auto tied, ReadBool(config, "tie_word_embeddings", path));
  model.tied_embeddings = tied.value_or(false);
  RETURN_IF_ERROR(ReadTokenIds(config, path, model));
  RETURN_IF_ERROR(ReadWeightType(config, folder, path, model));
  return model;
}

absl::StatusOr<GenerationDefaults> ReadGenerationDefaults(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/generation_config.json");
  absl::StatusOr<json> read = ReadJsonFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(read.status())) return GenerationDefaults();
  RETURN_IF_ERROR(read.status());
  const json& config = *read;
  constexpr std::int32_t kMaxInt = std::numeric_limits<std::int32_t>::max();
  GenerationDefaults defaults;
  RETURN_IF_ERROR(ReadDefault(config, "temperature", 0.0, 1000.0, path, defaults.temperature));
  RETURN_IF_ERROR(ReadDefault(config, "top_p", 0.0, 1.0, path, defaults.top_p));
  RETURN_IF_ERROR(ReadDefault(config, "min_p", 0.0, 1.0, path, defaults.min_p));
  RETURN_IF_ERROR(ReadDefault(config, "repetition_penalty", 0.0, 1000.0, path, defaults.repetition_penalty));
  if (defaults.repetition_penalty.value_or(1.0F) != 1.0F) {
    return absl::UnimplementedError(
        absl::StrCat(path, ": repetition_penalty ", *defaults.repetition_penalty, " is not supported; supported: 1"));
  }
  ASSIGN_OR_RETURN(const auto top_k, ReadInteger(config, "top_k", -1, kMaxInt, path));
  if (top_k) defaults.top_k = static_cast<std::int32_t>(*top_k);
  ASSIGN_OR_RETURN(const auto max_new, ReadInteger(config, "max_new_tokens", 1, kMaxInt, path));
  if (max_new) defaults.max_new_tokens = static_cast<std::int32_t>(*max_new);
  ASSIGN_OR_RETURN(const auto samples, ReadBool(config, "do_sample", path));
  if (samples && !*samples) defaults.temperature = 0.0F;
  ASSIGN_OR_RETURN(defaults.eos_tokens, ReadTokens(config, "eos_token_id", std::int64_t{1} << 24, path));
  return defaults;
}

}  // namespace spillway
