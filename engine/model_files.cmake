# Readers of a model folder: config.json, safetensors, tokenizer.json.
# Global: whatever links this static library, and the tests, must see the targets.
find_package(ICU REQUIRED COMPONENTS uc GLOBAL)
find_package(nlohmann_json REQUIRED GLOBAL)
find_library(SPILLWAY_PCRE2_LIBRARY pcre2-8 REQUIRED)

target_sources(spillway_engine PRIVATE
  ${CMAKE_CURRENT_LIST_DIR}/bpe.cc
  ${CMAKE_CURRENT_LIST_DIR}/json_file.cc
  ${CMAKE_CURRENT_LIST_DIR}/model_config.cc
  ${CMAKE_CURRENT_LIST_DIR}/pretokenizer.cc
  ${CMAKE_CURRENT_LIST_DIR}/safetensors.cc
  ${CMAKE_CURRENT_LIST_DIR}/tokenizer.cc
  ${CMAKE_CURRENT_LIST_DIR}/tokenizer_added_tokens.cc
  ${CMAKE_CURRENT_LIST_DIR}/tokenizer_decoder.cc
  ${CMAKE_CURRENT_LIST_DIR}/tokenizer_normalizer.cc
  ${CMAKE_CURRENT_LIST_DIR}/tokenizer_pattern.cc
  ${CMAKE_CURRENT_LIST_DIR}/utf8.cc)
target_link_libraries(spillway_engine PRIVATE nlohmann_json::nlohmann_json ICU::uc ${SPILLWAY_PCRE2_LIBRARY}
                                              absl::flat_hash_map absl::status absl::statusor absl::strings)
