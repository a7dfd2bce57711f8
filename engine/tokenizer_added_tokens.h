#pragma once

// The "added_tokens" of tokenizer.json: strings that are one token wherever they stand in a text, before anything is
// merged.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/tokenizer_normalizer.h"

namespace spillway {

// Part [begin, end) of a text: an added token, or text between them.
struct Segment {
  static constexpr std::int32_t kText = -1;
  std::size_t begin = 0;
  std::size_t end = 0;
  std::int32_t token = kText;
};

// Immutable; any thread.
class AddedTokens {
 public:
  // What a special token is that stands in a text.
  enum class Written : std::uint8_t { kToken, kPlain };

  // `description` may be null: none. The normalizer respells the tokens that are looked for in normalized text.
  static absl::StatusOr<AddedTokens> FromJson(const nlohmann::json* description, const Normalizer& normalizer,
                                              const std::string& where);

  // Leftmost, then longest. Segments are in order; with lstrip and rstrip a token takes the whitespace beside it.
  std::vector<Segment> CutRaw(std::string_view text, Written written) const { return Cut(raw_, text, written); }
  std::vector<Segment> CutNormalized(std::string_view text, Written written) const {
    return Cut(normalized_, text, written);
  }

  std::optional<std::int32_t> Find(std::string_view text) const;
  std::string_view TextOf(std::int32_t token) const;  // empty for an id that is none of these
  bool IsSpecial(std::int32_t token) const;
  std::int32_t size() const { return size_; }  // largest id + 1
  std::vector<std::int32_t> ids() const;

 private:
  struct Token {
    std::string text;
    bool is_special = false;
    bool is_single_word = false;
    bool takes_left = false;
    bool takes_right = false;
  };
  // Node 0 is the root; an edge is node << 8 | byte.
  struct Trie {
    absl::flat_hash_map<std::uint64_t, std::uint32_t> edges;
    std::vector<std::int32_t> tokens = {Segment::kText};  // by node
    std::vector<bool> begins = std::vector<bool>(256);    // whether some token begins with this byte
    void Add(std::string_view text, std::int32_t token);
  };

  absl::Status Add(const nlohmann::json& description, const Normalizer& normalizer, const std::string& where);
  std::vector<Segment> Cut(const Trie& trie, std::string_view text, Written written) const;

  std::unordered_map<std::int32_t, Token> tokens_;
  std::unordered_map<std::string, std::int32_t> ids_;
  Trie raw_;
  Trie normalized_;
  std::int32_t size_ = 0;
};

}  // namespace spillway
