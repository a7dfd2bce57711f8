#pragma once

// Writes valid Hugging Face folders for tests: the same arguments give the same bytes on every machine.

#include <sys/stat.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/status_macros.h"
#include "kernels/tensor.h"
#include "tests/support/byte_tokenizer.h"

namespace spillway {

struct NamedTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<std::int64_t> shape;
  std::vector<float> values;  // row-major, product(shape) of them; rounded to dtype when written
};

struct RandomLlamaOptions {
  std::uint64_t seed = 1;
  int layers = 2;
  int hidden = 64;
  int inner = 160;
  int heads = 4;
  int kv_heads = 2;
  int head_dim = 16;
  int vocab = 288;
  int max_positions = 512;
  DType dtype = DType::kF32;
  bool tied = true;
  double rope_theta = 10000.0;
  int sliding_window = 0;  // above 0: a Mistral
  int shards = 1;
};

inline std::string EncodeValues(const NamedTensor& tensor) {
  std::string bytes(tensor.values.size() * SizeOf(tensor.dtype), '\0');
  char* out = bytes.data();
  for (const float value : tensor.values) {
    if (tensor.dtype == DType::kF32) {
      std::memcpy(out, &value, sizeof(value));
    } else {
      const std::uint16_t half = tensor.dtype == DType::kBF16 ? BF16FromFloat(value) : F16FromFloat(value);
      std::memcpy(out, &half, sizeof(half));
    }
    out += SizeOf(tensor.dtype);
  }
  return bytes;
}

inline std::string SafetensorsBytes(const std::vector<NamedTensor>& tensors) {
  auto header = nlohmann::json::object();
  header["__metadata__"] = {{"format", "pt"}};
  std::string data;
  for (const NamedTensor& tensor : tensors) {
    const std::size_t begin = data.size();
    data += EncodeValues(tensor);
    const std::string_view dtype = tensor.dtype == DType::kF32 ? "F32" : tensor.dtype == DType::kF16 ? "F16" : "BF16";
    header[tensor.name] = {{"dtype", dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string bytes(8, '\0');
  for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(static_cast<std::uint64_t>(text.size()) >> (8 * i));
  return bytes + text + data;
}

// config.json plus model.safetensors, or `shards` files dealt round robin and their index. Creates the folder (not its
// parents).
inline absl::Status WriteCheckpoint(const std::string& folder, std::string_view config_json,
                                    const std::vector<NamedTensor>& tensors, int shards = 1) {
  ::mkdir(folder.c_str(), 0755);
  RETURN_IF_ERROR(WriteTextFile(folder + "/config.json", config_json));
  if (shards <= 1) return WriteTextFile(folder + "/model.safetensors", SafetensorsBytes(tensors));
  std::vector<std::vector<NamedTensor>> parts(shards);
  auto weight_map = nlohmann::json::object();
  std::size_t total_bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::size_t part = i % parts.size();
    weight_map[tensors[i].name] = absl::StrFormat("model-%05d-of-%05d.safetensors", part + 1, parts.size());
    total_bytes += tensors[i].values.size() * SizeOf(tensors[i].dtype);
    parts[part].push_back(tensors[i]);
  }
  for (std::size_t part = 0; part < parts.size(); ++part) {
    const std::string name = absl::StrFormat("/model-%05d-of-%05d.safetensors", part + 1, parts.size());
    RETURN_IF_ERROR(WriteTextFile(folder + name, SafetensorsBytes(parts[part])));
  }
  const nlohmann::json index = {{"metadata", {{"total_size", total_bytes}}}, {"weight_map", weight_map}};
  return WriteTextFile(folder + "/model.safetensors.index.json", index.dump(1));
}

// Nearly normal with unit variance and exact on every platform: the sum of four uniform 16-bit numbers.
class SeededNormal {
 public:
  explicit SeededNormal(std::uint64_t seed) : state_(seed) {}

  float Next() {  // splitmix64
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    z ^= z >> 31;
    const auto sum = static_cast<std::int64_t>((z & 0xffff) + ((z >> 16) & 0xffff) + ((z >> 32) & 0xffff) + (z >> 48));
    return static_cast<float>(sum - 2 * 0xffff) * (1.7320508F / 65536.0F);
  }

 private:
  std::uint64_t state_;
};

inline std::vector<NamedTensor> RandomLlamaTensors(const RandomLlamaOptions& options) {
  SeededNormal normal(options.seed);
  std::vector<NamedTensor> tensors;
  const auto add = [&](std::string name, std::vector<std::int64_t> shape) {
    // Matrices have deviation 1 / sqrt(fan-in), norm weights lie around 1.
    const bool is_norm = shape.size() == 1;
    const float scale = is_norm ? 0.1F : 1.0F / std::sqrt(static_cast<float>(shape.back()));
    const auto count = static_cast<std::size_t>(is_norm ? shape[0] : shape[0] * shape[1]);
    NamedTensor tensor{std::move(name), options.dtype, std::move(shape), std::vector<float>(count)};
    for (float& value : tensor.values) value = (is_norm ? 1.0F : 0.0F) + scale * normal.Next();
    tensors.push_back(std::move(tensor));
  };
  const int q_width = options.heads * options.head_dim;
  const int kv_width = options.kv_heads * options.head_dim;
  add("model.embed_tokens.weight", {options.vocab, options.hidden});
  for (int layer = 0; layer < options.layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    add(prefix + "input_layernorm.weight", {options.hidden});
    add(prefix + "self_attn.q_proj.weight", {q_width, options.hidden});
    add(prefix + "self_attn.k_proj.weight", {kv_width, options.hidden});
    add(prefix + "self_attn.v_proj.weight", {kv_width, options.hidden});
    add(prefix + "self_attn.o_proj.weight", {options.hidden, q_width});
    add(prefix + "post_attention_layernorm.weight", {options.hidden});
    add(prefix + "mlp.gate_proj.weight", {options.inner, options.hidden});
    add(prefix + "mlp.up_proj.weight", {options.inner, options.hidden});
    add(prefix + "mlp.down_proj.weight", {options.hidden, options.inner});
  }
  add("model.norm.weight", {options.hidden});
  if (!options.tied) add("lm_head.weight", {options.vocab, options.hidden});
  return tensors;
}

inline std::string RandomLlamaConfig(const RandomLlamaOptions& options) {
  const bool is_mistral = options.sliding_window > 0;
  nlohmann::json config = {{"architectures", {is_mistral ? "MistralForCausalLM" : "LlamaForCausalLM"}},
                           {"model_type", is_mistral ? "mistral" : "llama"},
                           {"attention_bias", false},
                           {"head_dim", options.head_dim},
                           {"hidden_act", "silu"},
                           {"hidden_size", options.hidden},
                           {"intermediate_size", options.inner},
                           {"max_position_embeddings", options.max_positions},
                           {"mlp_bias", false},
                           {"num_attention_heads", options.heads},
                           {"num_hidden_layers", options.layers},
                           {"num_key_value_heads", options.kv_heads},
                           {"rms_norm_eps", 1e-5},
                           {"rope_scaling", nullptr},
                           {"rope_theta", options.rope_theta},
                           {"tie_word_embeddings", options.tied},
                           {"torch_dtype", NameOf(options.dtype)},
                           {"vocab_size", options.vocab}};
  if (is_mistral) config["sliding_window"] = options.sliding_window;
  if (options.vocab > kByteTokenizerEos) {
    config["bos_token_id"] = kByteTokenizerBos;
    config["eos_token_id"] = kByteTokenizerEos;
  }
  return config.dump(1);
}

// Model only; the tokenizer that fits its bos and eos is WriteByteTokenizer(folder, options.vocab).
inline absl::Status WriteRandomLlama(const std::string& folder, const RandomLlamaOptions& options) {
  return WriteCheckpoint(folder, RandomLlamaConfig(options), RandomLlamaTensors(options), options.shards);
}

}  // namespace spillway
