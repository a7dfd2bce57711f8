#pragma once

// The BPE model of tokenizer.json: a vocabulary and ranked merges. A piece of n characters costs O(n log n).

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

namespace spillway {

// Largest token id that a file may use; bounds what a small file can make us allocate.
inline constexpr std::int64_t kMaxTokenId = (1 << 22) - 1;

// Immutable; any thread.
class Bpe {
 public:
  Bpe(Bpe&&) noexcept = default;
  Bpe& operator=(Bpe&&) noexcept = default;

  static absl::StatusOr<Bpe> FromJson(const nlohmann::json& model, const std::string& where);

  // Memory that calls share, so that a short piece allocates nothing. One per thread.
  class Workspace;

  // Appends the tokens of a piece (valid UTF-8). A character without a token becomes byte tokens or the unknown token,
  // as the model says; without either it is dropped, as in Hugging Face.
  void Encode(std::string_view piece, Workspace& workspace, std::vector<std::int32_t>& tokens) const;

  std::optional<std::int32_t> Find(std::string_view text) const;
  std::string_view TextOf(std::int32_t token) const;                              // empty for an unknown id
  std::int32_t size() const { return static_cast<std::int32_t>(texts_.size()); }  // largest id + 1

 private:
  static constexpr std::int32_t kNone = -1;
  static constexpr std::uint32_t kNoMerge = UINT32_MAX;

  struct Merge {
    std::int32_t left;
    std::int32_t right;
    std::int32_t result;
  };

  Bpe() = default;
  absl::Status ReadVocabulary(const nlohmann::json& vocab, const std::string& where);
  std::optional<Merge> FindMerge(std::string_view left, std::string_view right) const;
  std::optional<Merge> ReadMerge(const nlohmann::json& merge) const;
  absl::Status ReadMerges(const nlohmann::json& merges, const std::string& where);
  absl::Status ReadOptions(const nlohmann::json& model, const std::string& where);
  std::int32_t TokenOf(char32_t character) const;
  void Spell(std::string_view piece, Workspace& workspace) const;
  std::uint32_t RankOf(std::int32_t left, std::int32_t right) const;

  std::vector<std::string> texts_;                          // by id; empty where the id is unused
  std::unordered_map<std::string_view, std::int32_t> ids_;  // views into texts_
  std::vector<std::int32_t> token_of_low_character_;        // by code point
  absl::flat_hash_map<char32_t, std::int32_t> token_of_high_character_;
  absl::flat_hash_map<std::uint64_t, std::uint32_t> ranks_;  // left << 32 | right -> rank
  std::vector<std::int32_t> merged_;                         // by rank
  std::vector<std::int32_t> byte_tokens_;                    // by byte, "<0x00>"...; empty without byte_fallback
  std::int32_t unknown_ = kNone;
  bool fuse_unknown_ = false;
  bool ignore_merges_ = false;
};

class Bpe::Workspace {
 private:
  friend class Bpe;
  struct Symbol {
    std::int32_t token;
    std::int32_t previous;
    std::int32_t next;
    std::uint32_t rank;  // of the merge with `next`
  };
  std::vector<Symbol> symbols;
  std::vector<std::uint64_t> candidates;  // rank << 32 | position, a heap with the least on top
};

}  // namespace spillway
