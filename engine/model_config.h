#pragma once

// What a model is: one description for the family of dense decoders (Llama, Mistral; Qwen2 and Qwen3 are further rows
// of the same table: biases, q/k norms). Read from a Hugging Face folder; unknown architectures and
// unknown settings that would change the output are refused by name.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace spillway {

struct ModelConfig {
  std::string architecture;  // "LlamaForCausalLM", "MistralForCausalLM"
  int num_layers = 0;
  int hidden = 0;
  int inner = 0;  // MLP width
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;  // independent of hidden / num_heads
  int vocab = 0;
  int max_positions = 0;
  int sliding_window = 0;  // tokens that a token attends to, itself included; 0: all before it
  float norm_epsilon = 1e-5F;
  double rope_theta = 10000.0;
  bool tied_embeddings = false;
  DType weight_dtype = DType::kF32;      // torch_dtype / dtype of config.json, else that of the embedding tensor
  std::int32_t bos_token = -1;           // -1: none
  std::vector<std::int32_t> eos_tokens;  // of a loaded model: generation_config.json's as well
};

// generation_config.json: defaults for sampling parameters that a request leaves unset. All optional.
struct GenerationDefaults {
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<std::int32_t> top_k;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;  // refused by name where not 1
  std::optional<std::int32_t> max_new_tokens;
  std::vector<std::int32_t> eos_tokens;  // beside the config's
};

// `folder`/config.json. INVALID_ARGUMENT names the field, its value and what is allowed; UNIMPLEMENTED an architecture
// or feature (rope_scaling, attention_bias ...) that is not built.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& folder);

// Absent file: all unset. `do_sample: false` means temperature 0.
absl::StatusOr<GenerationDefaults> ReadGenerationDefaults(const std::string& folder);

}  // namespace spillway
