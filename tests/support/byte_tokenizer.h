#pragma once

// Writes a tokenizer for tests in which every text round-trips: each byte is one token.

#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace spillway {

// What WriteByteTokenizer gives: ids 0..255 are the bytes, then these two, then filler words that no text encodes to.
inline constexpr std::int32_t kByteTokenizerBos = 256;
inline constexpr std::int32_t kByteTokenizerEos = 257;

inline absl::Status WriteTextFile(const std::string& path, std::string_view text) {
  // A new file, not the old one truncated: a checkpoint may have mapped that, and ext4 flushes it to the disk.
  ::unlink(path.c_str());
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  out.close();
  return out ? absl::OkStatus() : absl::InternalError(absl::StrCat("cannot write ", path));
}

// tokenizer.json and tokenizer_config.json: a byte-level BPE without merges, so that any text round-trips and each byte
// is one token. Ids from 258 to vocab - 1 decode to " w258" and so on: a random model's output is visible text.
inline absl::Status WriteByteTokenizer(const std::string& folder, int vocab) {
  if (vocab <= kByteTokenizerEos) return absl::InvalidArgumentError("a byte tokenizer needs a vocabulary of 258");
  ::mkdir(folder.c_str(), 0755);
  auto tokens = nlohmann::json::object();
  int next_extra = 256;
  for (int byte = 0; byte < 256; ++byte) {  // gpt2's alphabet: printable Latin-1 as itself, the rest from U+0100
    const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    const int code = printable ? byte : next_extra++;
    std::string spelling;
    if (code >= 0x80) spelling.push_back(static_cast<char>(0xc0 | (code >> 6)));
    spelling.push_back(static_cast<char>(code >= 0x80 ? 0x80 | (code & 0x3f) : code));
    tokens[spelling] = byte;
  }
  for (int id = kByteTokenizerEos + 1; id < vocab; ++id) tokens[absl::StrCat("\u0120w", id)] = id;
  auto added = nlohmann::json::array();
  for (const auto& [id, name] : {std::pair(kByteTokenizerBos, "<s>"), std::pair(kByteTokenizerEos, "</s>")}) {
    tokens[name] = id;
    added.push_back({{"id", id},
                     {"content", name},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const nlohmann::json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", false}};
  nlohmann::json processor = {{"type", "TemplateProcessing"}};
  processor["single"] = {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}},
                         {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}};
  processor["pair"] = processor["single"];
  processor["special_tokens"]["<s>"] = {{"id", "<s>"}, {"ids", {kByteTokenizerBos}}, {"tokens", {"<s>"}}};
  nlohmann::json model = {{"type", "BPE"}, {"byte_fallback", false}, {"ignore_merges", false}};
  model["vocab"] = std::move(tokens);
  model["merges"] = nlohmann::json::array();
  nlohmann::json tokenizer = {{"version", "1.0"},
                              {"added_tokens", added},
                              {"normalizer", nullptr},
                              {"pre_tokenizer", byte_level},
                              {"decoder", byte_level}};
  tokenizer["post_processor"] = std::move(processor);
  tokenizer["model"] = std::move(model);
  RETURN_IF_ERROR(WriteTextFile(folder + "/tokenizer.json", tokenizer.dump()));
  const nlohmann::json settings = {
      {"add_bos_token", true},
      {"bos_token", "<s>"},
      {"eos_token", "</s>"},
      {"model_max_length", 1 << 20},
      {"chat_template",
       "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
       "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"}};
  return WriteTextFile(folder + "/tokenizer_config.json", settings.dump(1));
}

}  // namespace spillway
