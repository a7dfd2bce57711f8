#pragma once

// The "pre_tokenizer" of tokenizer.json: cuts a normalized text into the pieces that BPE merges within.

#include <cstddef>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spillway {

struct Piece {
  std::size_t begin = 0;
  std::size_t end = 0;
  bool begins_text = false;  // no text, not even a special token, stood before it
};

// Pieces are not empty, in order and disjoint; what lies between them was removed.
struct CutText {
  std::string text;
  std::vector<Piece> pieces;
};

// Immutable; any thread.
class Pretokenizer {
 public:
  // `description` may be null: the text is one piece. UNIMPLEMENTED names a type that is not built.
  static absl::StatusOr<Pretokenizer> FromJson(const nlohmann::json* description, const std::string& where);

  Pretokenizer(Pretokenizer&&) noexcept;
  Pretokenizer& operator=(Pretokenizer&&) noexcept;
  ~Pretokenizer();

  // May respell the text (bytes as letters, spaces as a visible sign).
  absl::Status Apply(CutText& cut) const;

 private:
  class Step;
  class Split;
  class ByteLevel;
  class Metaspace;

  Pretokenizer();
  absl::Status Add(const nlohmann::json& description, const std::string& where);
  absl::Status AddRegexSplit(const std::string& regex, const std::string& behavior, bool invert,
                             const std::string& where);

  std::vector<std::unique_ptr<Step>> steps_;
};

}  // namespace spillway
