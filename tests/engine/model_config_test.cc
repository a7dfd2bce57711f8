#include "engine/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "tests/support/checkpoint_writer.h"
#include "tests/support/shared_data.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// The default random model's config with some members replaced; null removes one.
absl::StatusOr<ModelConfig> ReadWith(const nlohmann::json& changes) {
  nlohmann::json config = nlohmann::json::parse(RandomLlamaConfig(RandomLlamaOptions()));
  config.merge_patch(changes);
  const TempFolder folder;
  folder.Write("config.json", config.dump());
  return ReadModelConfig(folder.path());
}

absl::StatusOr<GenerationDefaults> ReadDefaults(const std::string& text) {
  const TempFolder folder;
  folder.Write("generation_config.json", text);
  return ReadGenerationDefaults(folder.path());
}

TEST(ModelConfig, ReadsEveryField) {
  const auto config = ReadWith({{"torch_dtype", "bfloat16"}, {"eos_token_id", {257, 3}}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->num_layers, 2);
  EXPECT_EQ(config->hidden, 64);
  EXPECT_EQ(config->inner, 160);
  EXPECT_EQ(config->num_heads, 4);
  EXPECT_EQ(config->num_kv_heads, 2);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->vocab, 288);
  EXPECT_EQ(config->max_positions, 512);
  EXPECT_EQ(config->norm_epsilon, 1e-5F);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_EQ(config->weight_dtype, DType::kBF16);
  EXPECT_EQ(config->bos_token, 256);
  EXPECT_THAT(config->eos_tokens, ElementsAre(257, 3));
}

TEST(ModelConfig, FillsInDefaults) {
  const auto config = ReadWith({{"num_key_value_heads", nullptr},
                                {"head_dim", nullptr},
                                {"rope_theta", nullptr},
                                {"bos_token_id", nullptr},
                                {"eos_token_id", nullptr},
                                {"tie_word_embeddings", nullptr},
                                {"hidden_act", nullptr}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->num_kv_heads, 4);
  EXPECT_EQ(config->head_dim, 16);
  EXPECT_EQ(config->rope_theta, 10000.0);
  EXPECT_EQ(config->bos_token, -1);
  EXPECT_THAT(config->eos_tokens, IsEmpty());
  EXPECT_FALSE(config->tied_embeddings);
}

TEST(ModelConfig, ReadsNewerSpellings) {
  const auto config = ReadWith({{"torch_dtype", nullptr},
                                {"dtype", "float16"},
                                {"rope_theta", nullptr},
                                {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500000.0}}}});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->weight_dtype, DType::kF16);
  EXPECT_EQ(config->rope_theta, 500000.0);
}

TEST(ModelConfig, TakesTheEmbeddingsTypeWhereNoneIsNamed) {
  const TempFolder folder;
  RandomLlamaOptions options;
  options.dtype = DType::kF16;
  nlohmann::json config = nlohmann::json::parse(RandomLlamaConfig(options));
  config.erase("torch_dtype");
  ASSERT_TRUE(WriteCheckpoint(folder.path(), config.dump(), RandomLlamaTensors(options)).ok());
  const auto read = ReadModelConfig(folder.path());
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->weight_dtype, DType::kF16);
}

TEST(ModelConfig, ReadsASlidingWindowWhereItHasAnEffect) {
  const nlohmann::json mistral = {"MistralForCausalLM"};
  EXPECT_EQ(ReadWith({{"architectures", mistral}, {"sliding_window", 40}})->sliding_window, 40);
  EXPECT_EQ(ReadWith({{"architectures", mistral}, {"sliding_window", nullptr}})->sliding_window, 0);
  EXPECT_EQ(ReadWith({{"architectures", mistral}, {"sliding_window", 512}})->sliding_window, 0);
  EXPECT_EQ(ReadWith({{"sliding_window", 40}})->sliding_window, 0);
  EXPECT_FALSE(ReadWith({{"architectures", mistral}, {"sliding_window", 0}}).ok());
}

TEST(ModelConfig, NamesWhatIsNotBuilt) {
  const std::pair<nlohmann::json, const char*> cases[] = {
      {{{"architectures", {"MambaForCausalLM"}}}, "MambaForCausalLM"},
      {{{"rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}}}, "llama3"},
      {{{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}}, "linear"},
      {{{"rope_scaling", {{"factor", 2.0}}}}, "rope_scaling"},
      {{{"rope_parameters", {{"rope_type", "yarn"}, {"rope_theta", 1e4}}}}, "yarn"},
      {{{"partial_rotary_factor", 0.5}}, "partial_rotary_factor"},
      {{{"attention_bias", true}}, "attention_bias"},
      {{{"mlp_bias", true}}, "mlp_bias"},
      {{{"hidden_act", "gelu"}}, "gelu"},
      {{{"quantization_config", {{"quant_method", "gptq"}}}}, "gptq"},
  };
  for (const auto& [changes, message] : cases) {
    const absl::Status status = ReadWith(changes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << changes;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message)) << changes;
  }
  EXPECT_TRUE(ReadWith({{"rope_scaling", {{"rope_type", "default"}}}}).ok());
}

TEST(ModelConfig, NamesFieldAndValueThatAreWrong) {
  const std::pair<nlohmann::json, const char*> cases[] = {
      {{{"architectures", nullptr}}, "architectures"},
      {{{"architectures", nlohmann::json::array()}}, "architectures"},
      {{{"architectures", "LlamaForCausalLM"}}, "architectures"},
      {{{"num_hidden_layers", nullptr}}, "num_hidden_layers is missing"},
      {{{"num_hidden_layers", 0}}, "num_hidden_layers is 0"},
      {{{"num_hidden_layers", 1e9}}, "num_hidden_layers is 1000000000.0"},
      {{{"hidden_size", -64}}, "hidden_size is -64"},
      {{{"hidden_size", "64"}}, "hidden_size is \"64\""},
      {{{"hidden_size", (1 << 20) + 1}}, "hidden_size is 1048577, wanted an integer from 1 to 1048576"},
      {{{"intermediate_size", UINT64_MAX}}, "intermediate_size is 18446744073709551615"},
      {{{"num_attention_heads", 64.5}}, "num_attention_heads is 64.5"},
      {{{"num_key_value_heads", 3}}, "not a multiple of num_key_value_heads 3"},
      {{{"num_key_value_heads", 8}}, "num_key_value_heads is 8"},
      {{{"head_dim", 15}}, "head_dim 15 is odd"},
      {{{"head_dim", 0}}, "head_dim is 0"},
      {{{"head_dim", nullptr}, {"hidden_size", 66}}, "not a multiple of num_attention_heads"},
      {{{"head_dim", 4096}, {"num_attention_heads", 512}, {"num_key_value_heads", 512}}, "exceeds the limit"},
      {{{"vocab_size", nullptr}}, "vocab_size is missing"},
      {{{"vocab_size", (1 << 24) + 1}}, "vocab_size"},
      {{{"max_position_embeddings", 0}}, "max_position_embeddings is 0"},
      {{{"rms_norm_eps", 0}}, "rms_norm_eps is 0"},
      {{{"rms_norm_eps", "1e-5"}}, "rms_norm_eps"},
      {{{"rope_theta", -1}}, "rope_theta is -1"},
      {{{"rope_scaling", "linear"}}, "rope_scaling is \"linear\", wanted an object"},
      {{{"torch_dtype", "int8"}}, "int8"},
      {{{"bos_token_id", 288}}, "bos_token_id is 288, wanted an integer from 0 to 287"},
      {{{"eos_token_id", {1, -1}}}, "eos_token_id is -1"},
      {{{"eos_token_id", {1, "x"}}}, "eos_token_id is \"x\""},
      {{{"tie_word_embeddings", 1}}, "tie_word_embeddings is 1, wanted true or false"},
  };
  for (const auto& [changes, message] : cases) {
    const absl::Status status = ReadWith(changes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << changes;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message)) << changes;
    EXPECT_THAT(std::string(status.message()), HasSubstr("config.json")) << changes;
  }
}

TEST(ModelConfig, RefusesFilesThatAreNoConfig) {
  const TempFolder folder;
  EXPECT_EQ(ReadModelConfig(folder.path()).status().code(), absl::StatusCode::kNotFound);
  for (const std::string& text :
       {std::string(), std::string("[]"), std::string("{\"a\":1"), std::string("{\"a\":1e999}"),
        std::string("{\"\xc3\":1}"), std::string(100000, '['), std::string(100000, '{')}) {
    folder.Write("config.json", text);
    EXPECT_EQ(ReadModelConfig(folder.path()).status().code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 20);
  }
  folder.Write("config.json", std::string(100000, '['));
  EXPECT_THAT(std::string(ReadModelConfig(folder.path()).status().message()), HasSubstr("nested 100000 levels deep"));
}

TEST(GenerationDefaults, AbsentFileSetsNothing) {
  const TempFolder folder;
  const auto defaults = ReadGenerationDefaults(folder.path());
  ASSERT_TRUE(defaults.ok());
  EXPECT_FALSE(defaults->temperature || defaults->top_p || defaults->top_k || defaults->min_p ||
               defaults->max_new_tokens);
  EXPECT_THAT(defaults->eos_tokens, IsEmpty());
}

TEST(GenerationDefaults, ReadsEveryField) {
  const auto defaults = ReadDefaults(
      R"({"temperature":0.6,"top_p":0.9,"top_k":20,"min_p":0.05,"repetition_penalty":1.0,"max_new_tokens":64,)"
      R"("eos_token_id":[7,8],"do_sample":true})");
  ASSERT_TRUE(defaults.ok()) << defaults.status();
  EXPECT_EQ(defaults->temperature, 0.6F);
  EXPECT_EQ(defaults->top_p, 0.9F);
  EXPECT_EQ(defaults->top_k, 20);
  EXPECT_EQ(defaults->min_p, 0.05F);
  EXPECT_EQ(defaults->repetition_penalty, 1.0F);
  EXPECT_EQ(defaults->max_new_tokens, 64);
  EXPECT_THAT(defaults->eos_tokens, ElementsAre(7, 8));
}

TEST(GenerationDefaults, NotSamplingIsTemperatureZero) {
  const auto defaults = ReadDefaults(R"({"do_sample":false,"temperature":0.6,"eos_token_id":5})");
  ASSERT_TRUE(defaults.ok()) << defaults.status();
  EXPECT_EQ(defaults->temperature, 0.0F);
  EXPECT_THAT(defaults->eos_tokens, ElementsAre(5));
}

TEST(GenerationDefaults, RefusesByName) {
  EXPECT_EQ(ReadDefaults(R"({"repetition_penalty":1.1})").status().code(), absl::StatusCode::kUnimplemented);
  for (const char* text : {R"({"temperature":-1})", R"({"top_p":1.5})", R"({"top_k":-2})", R"({"min_p":"a"})",
                           R"({"max_new_tokens":0})", R"({"do_sample":1})", R"({"eos_token_id":-4})", "[]"}) {
    EXPECT_EQ(ReadDefaults(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(ModelConfig, ReadsTheTrainedModels) {
  SPILLWAY_SHARED_OR_SKIP(models, "models/stories260K");
  const std::pair<const char*, int> folders[] = {{"hf", 8}, {"hf-bf16", 8}, {"hf-hd64", 64}, {"hf-hd128", 128}};
  for (const auto& [name, head_dim] : folders) {
    const auto config = ReadModelConfig(models + "/" + name);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->head_dim, head_dim);
    EXPECT_EQ(config->hidden, 64);
    EXPECT_EQ(config->bos_token, 1);
    EXPECT_THAT(config->eos_tokens, ElementsAre(2));
    const auto defaults = ReadGenerationDefaults(models + "/" + name);
    ASSERT_TRUE(defaults.ok()) << defaults.status();
    EXPECT_THAT(defaults->eos_tokens, ElementsAre(1, 2));
  }
}

}  // namespace
}  // namespace spillway
