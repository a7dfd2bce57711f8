#include "bench/gpu/random_llama.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/tensor.h"

namespace spillway::bench {
namespace {

using nlohmann::json;

// Repeats after a prime number of elements, so that rows of one matrix differ.
constexpr std::size_t kNoise = 8000009;

struct Tensor {
  std::string name;
  std::vector<std::int64_t> shape;
  std::int64_t size() const {
    std::int64_t product = 1;
    for (const std::int64_t each : shape) product *= each;
    return product;
  }
};

std::vector<Tensor> TensorsOf(const LlamaShape& s) {
  std::vector<Tensor> tensors = {{"model.embed_tokens.weight", {s.vocab, s.hidden}}};
  for (std::int64_t i = 0; i < s.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const auto add = [&](const char* name, std::vector<std::int64_t> shape) {
      tensors.push_back({prefix + name + ".weight", std::move(shape)});
    };
    add("input_layernorm", {s.hidden});
    add("self_attn.q_proj", {s.heads * s.head_dim, s.hidden});
    add("self_attn.k_proj", {s.kv_heads * s.head_dim, s.hidden});
    add("self_attn.v_proj", {s.kv_heads * s.head_dim, s.hidden});
    add("self_attn.o_proj", {s.hidden, s.heads * s.head_dim});
    add("post_attention_layernorm", {s.hidden});
    add("mlp.gate_proj", {s.inner, s.hidden});
    add("mlp.up_proj", {s.inner, s.hidden});
    add("mlp.down_proj", {s.hidden, s.inner});
  }
  tensors.push_back({"model.norm.weight", {s.hidden}});
  tensors.push_back({"lm_head.weight", {s.vocab, s.hidden}});
  return tensors;
}

void WriteConfig(const std::string& folder, const LlamaShape& s) {
  const json config = {{"architectures", {"LlamaForCausalLM"}},
                       {"model_type", "llama"},
                       {"hidden_size", s.hidden},
                       {"intermediate_size", s.inner},
                       {"num_hidden_layers", s.layers},
                       {"num_attention_heads", s.heads},
                       {"num_key_value_heads", s.kv_heads},
                       {"head_dim", s.head_dim},
                       {"vocab_size", s.vocab},
                       {"max_position_embeddings", s.max_positions},
                       {"rms_norm_eps", 1e-5},
                       {"rope_theta", 500000.0},
                       {"tie_word_embeddings", false},
                       {"hidden_act", "silu"},
                       {"bos_token_id", 0},
                       {"eos_token_id", 1},
                       {"torch_dtype", "bfloat16"}};
  std::ofstream(folder + "/config.json") << config.dump(1);
}

void WriteBytes(std::ofstream& file, const std::vector<std::uint16_t>& values, std::size_t begin, std::int64_t count) {
  while (count > 0) {
    const auto some = std::min<std::int64_t>(count, static_cast<std::int64_t>(values.size() - begin));
    file.write(reinterpret_cast<const char*>(values.data() + begin), some * 2);
    count -= some;
    begin = 0;
  }
}

}  // namespace

void WriteRandomLlama(const std::string& folder, const LlamaShape& shape) {
  std::filesystem::create_directories(folder);
  WriteConfig(folder, shape);
  const std::vector<Tensor> tensors = TensorsOf(shape);
  json header;
  std::int64_t at = 0;
  for (const Tensor& tensor : tensors) {
    header[tensor.name] = {{"dtype", "BF16"}, {"shape", tensor.shape}, {"data_offsets", {at, at + 2 * tensor.size()}}};
    at += 2 * tensor.size();
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');

  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 0.02F);
  std::vector<std::uint16_t> noise(kNoise);
  for (std::uint16_t& value : noise) value = BF16FromFloat(normal(random));
  const std::vector<std::uint16_t> ones(static_cast<std::size_t>(shape.hidden), BF16FromFloat(1));

  std::ofstream file(folder + "/model.safetensors", std::ios::binary);
  const std::uint64_t length = text.size();
  file.write(reinterpret_cast<const char*>(&length), sizeof(length));
  file.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const Tensor& tensor : tensors) {
    const bool is_norm = tensor.shape.size() == 1;
    WriteBytes(file, is_norm ? ones : noise, is_norm ? 0 : random() % kNoise, tensor.size());
  }
  SPILLWAY_CHECK(file.good()) << "cannot write " << folder << "/model.safetensors of " << at << " bytes";
}

}  // namespace spillway::bench
