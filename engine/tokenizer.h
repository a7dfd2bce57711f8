#pragma once

// Text <-> token ids, from a Hugging Face tokenizer.json: byte-level BPE (gpt2, llama3, qwen2) and SentencePiece-style
// BPE with byte_fallback (llama2, stories260K). Unsupported components are refused by name when loading.

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spillway {

enum class SpecialTokens : std::uint8_t {
  kAdd,             // what the post-processor adds (bos)
  kNone,            // nothing is added
  kAddToPlainText,  // as kAdd, but special tokens written in the text are ordinary characters
};
enum class SkipSpecial : std::uint8_t { kYes, kNo };

class TokenDecoder;

// Immutable after loading; any thread.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Reads tokenizer.json (and tokenizer_config.json for add_bos_token, chat_template, where present).
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& folder);

  // Text must be valid UTF-8 (INVALID_ARGUMENT names the byte offset). Special tokens written in the text are
  // recognised.
  virtual absl::StatusOr<std::vector<std::int32_t>> Encode(std::string_view text, SpecialTokens special) const = 0;

  // The whole sequence decoded at once. Ids outside the vocabulary decode to nothing. Bytes that do not form a code
  // point become U+FFFD.
  virtual std::string Decode(std::span<const std::int32_t> tokens, SkipSpecial skip) const = 0;

  // The raw bytes one token stands for in the middle of a text (for logprobs and streaming); may be half a code point.
  virtual std::string TokenBytes(std::int32_t token) const = 0;
  // The vocabulary's own spelling, as in tokenizer.json; empty for an unknown id.
  virtual std::string_view TokenText(std::int32_t token) const = 0;
  virtual bool IsSpecial(std::int32_t token) const = 0;
  virtual std::optional<std::int32_t> Find(std::string_view token) const = 0;
  virtual std::int32_t vocab_size() const = 0;  // largest id + 1
  virtual std::optional<std::int32_t> bos_token() const = 0;
  virtual std::optional<std::int32_t> eos_token() const = 0;
  // Jinja source of the checkpoint's chat template, empty if none.
  virtual std::string_view chat_template() const = 0;
  // How spellings become text; nullptr: each token is its TokenBytes. For StreamDecoder.
  virtual const TokenDecoder* decoder() const { return nullptr; }
};

// Decodes token by token for streaming. Concatenated pieces equal Tokenizer::Decode of the whole sequence, whatever the
// split; an unfinished code point is held back and Flush turns it into U+FFFD. One per generated sequence; not
// thread-safe.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, SkipSpecial skip);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  std::string Push(std::int32_t token);
  std::string Flush();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace spillway
