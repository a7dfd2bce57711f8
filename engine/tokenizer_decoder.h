#pragma once

// The "decoder" of tokenizer.json: from the spelling of tokens to the bytes of a text, one token at a time.

#include <cstddef>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/utf8.h"

namespace spillway {

// Immutable; any thread. Streaming and decoding a whole are the same code, so they cannot differ.
class TokenDecoder {
 public:
  // How far one text is decoded.
  class Progress;

  // `description` may be null: spellings are joined with spaces. UNIMPLEMENTED names a type, or an order of types, that
  // is not built.
  static absl::StatusOr<TokenDecoder> FromJson(const nlohmann::json* description, const std::string& where);

  TokenDecoder(TokenDecoder&&) noexcept;
  TokenDecoder& operator=(TokenDecoder&&) noexcept;
  ~TokenDecoder();

  void Push(std::string_view spelling, Progress& progress, std::string& text) const;
  void Flush(Progress& progress, std::string& text) const;  // afterwards `progress` is as new

  // The bytes of a token in the middle of a text.
  std::string BytesOf(std::string_view spelling) const;

 private:
  enum class Position : bool { kFirst, kLater };
  class Step;
  class Replace;
  class ByteLevel;
  class ByteFallback;
  class StripEach;
  class Metaspace;
  // A Strip behind Fuse: up to `start` and `stop` times `content` at the two ends of the text.
  struct Strip {
    std::string content;
    std::size_t start = 0;
    std::size_t stop = 0;
  };

  TokenDecoder();
  absl::Status Add(const nlohmann::json& description, const std::string& where);
  absl::Status AddStrip(const nlohmann::json& description, const std::string& where);
  std::string Spell(std::string_view spelling, Position position) const;

  std::vector<std::unique_ptr<Step>> steps_;  // on each token
  std::vector<Strip> strips_;                 // on the text
  bool joins_with_spaces_ = false;
  bool makes_bytes_ = false;  // a step has turned spellings into bytes: no later step reads them as spellings
  bool is_fused_ = false;
};

class TokenDecoder::Progress {
 private:
  friend class TokenDecoder;
  struct StripProgress {
    std::size_t stripped = 0;
    bool has_begun = false;  // text came that is not stripped
    std::string held;        // may be the end, which is stripped
  };
  bool is_first_ = true;
  std::vector<StripProgress> strips_;
  Utf8Repair repair_;
};

}  // namespace spillway
