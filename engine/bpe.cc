#include "engine/bpe.h"

#include <algorithm>
#include <array>
#include <functional>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/json_file.h"
#include "engine/utf8.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

constexpr char32_t kLowCharacters = 0x400;
constexpr int kMaxSeparators = 256;  // spaces of one merge that are tried

std::uint64_t PairKey(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
}

// The code point that is the whole text, if it is just one.
std::optional<char32_t> SingleCharacter(std::string_view text) {
  if (text.empty()) return std::nullopt;
  std::size_t offset = 0;
  const char32_t character = NextCodePoint(text, offset);
  if (offset != text.size()) return std::nullopt;
  return character;
}

}  // namespace

absl::StatusOr<Bpe> Bpe::FromJson(const json& model, const std::string& where) {
  ASSIGN_OR_RETURN(const auto type, ReadString(model, "type", where));
  if (type.value_or("BPE") != "BPE") {  // the oldest files do not say
    return absl::UnimplementedError(
        absl::StrCat(where, ": model type ", Excerpt(*type), " is not supported; supported: BPE"));
  }
  const json* vocab = FindMember(model, "vocab");
  const json* merges = FindMember(model, "merges");
  if (vocab == nullptr || !vocab->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": vocab is missing or not an object"));
  }
  if (merges == nullptr || !merges->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": merges is missing or not an array"));
  }
  Bpe bpe;
  RETURN_IF_ERROR(bpe.ReadVocabulary(*vocab, where));
  RETURN_IF_ERROR(bpe.ReadMerges(*merges, where));
  RETURN_IF_ERROR(bpe.ReadOptions(model, where));
  return bpe;
}

absl::Status Bpe::ReadVocabulary(const json& vocab, const std::string& where) {
  std::int64_t largest = -1;
  for (const auto& [text, id] : vocab.items()) {
    const std::optional<std::int64_t> token = IntegerWithin(id, 0, kMaxTokenId);
    if (!token) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": the id of '", Excerpt(text), "' is ", Shown(id),
                                                     ", wanted an integer from 0 to ", kMaxTokenId));
    }
    largest = std::max(largest, *token);
  }
  texts_.resize(static_cast<std::size_t>(largest + 1));
  ids_.reserve(vocab.size());
  token_of_low_character_.assign(kLowCharacters, kNone);
  std::vector<bool> is_taken(texts_.size());
  for (const auto& [text, id] : vocab.items()) {
    const auto token = id.get<std::int32_t>();
    if (is_taken[token]) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": '", Excerpt(text), "' and '", Excerpt(texts_[token]), "' have the same id ", token));
    }
    is_taken[token] = true;
    texts_[token] = text;
    ids_.emplace(texts_[token], token);
    if (const std::optional<char32_t> character = SingleCharacter(text)) {
      if (*character < kLowCharacters) {
        token_of_low_character_[*character] = token;
      } else {
        token_of_high_character_.emplace(*character, token);
      }
    }
  }
  return absl::OkStatus();
}

std::optional<Bpe::Merge> Bpe::FindMerge(std::string_view left, std::string_view right) const {
  const auto left_token = Find(left);
  const auto right_token = Find(right);
  if (!left_token || !right_token) return std::nullopt;
  const auto result = Find(std::string(left).append(right));
  if (!result) return std::nullopt;
  return Merge{*left_token, *right_token, *result};
}

std::optional<Bpe::Merge> Bpe::ReadMerge(const json& merge) const {
  if (merge.is_array()) {
    if (merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) return std::nullopt;
    return FindMerge(merge[0].get_ref<const std::string&>(), merge[1].get_ref<const std::string&>());
  }
  if (!merge.is_string()) return std::nullopt;
  // Tokens of spaces make the separator ambiguous ("   " is two spaces): the one between two tokens that make a third.
  const std::string_view text = merge.get_ref<const std::string&>();
  std::size_t space = text.find(' ');
  for (int i = 0; i < kMaxSeparators && space != std::string_view::npos; ++i, space = text.find(' ', space + 1)) {
    if (const auto found = FindMerge(text.substr(0, space), text.substr(space + 1))) return found;
  }
  return std::nullopt;
}

absl::Status Bpe::ReadMerges(const json& merges, const std::string& where) {
  ranks_.reserve(merges.size());
  merged_.reserve(merges.size());
  for (const json& line : merges) {
    const auto rank = static_cast<std::uint32_t>(merged_.size());
    const std::optional<Merge> merge = ReadMerge(line);
    if (!merge) {
      const std::string shown = line.is_array() ? Excerpt(line.dump(-1, ' ', /*ensure_ascii=*/true)) : Shown(line);
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": merge ", rank, " is ", shown,
                       ", wanted \"a b\" or [\"a\", \"b\"] with a, b and ab in the vocabulary"));
    }
    // Of two merges of a pair the later holds, as in Hugging Face.
    ranks_[PairKey(merge->left, merge->right)] = rank;
    merged_.push_back(merge->result);
  }
  return absl::OkStatus();
}

absl::Status Bpe::ReadOptions(const json& model, const std::string& where) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    ASSIGN_OR_RETURN(const auto affix, ReadString(model, key, where));
    if (!affix.value_or("").empty()) {
      return absl::UnimplementedError(absl::StrCat(where, ": ", key, " '", Excerpt(*affix), "' is not supported"));
    }
  }
  ASSIGN_OR_RETURN(const auto dropout, ReadNumber(model, "dropout", 0.0, 1.0, where));
  if (dropout.value_or(0.0) != 0.0) {
    return absl::UnimplementedError(absl::StrCat(where, ": dropout ", *dropout, " is not supported"));
  }
  ASSIGN_OR_RETURN(const auto ignore_merges, ReadBool(model, "ignore_merges", where));
  ignore_merges_ = ignore_merges.value_or(false);
  ASSIGN_OR_RETURN(const auto fuse_unknown, ReadBool(model, "fuse_unk", where));
  fuse_unknown_ = fuse_unknown.value_or(false);
  ASSIGN_OR_RETURN(const auto unknown, ReadString(model, "unk_token", where));
  if (unknown) {
    const auto token = Find(*unknown);
    if (!token) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": unk_token '", Excerpt(*unknown), "' is not in the vocabulary"));
    }
    unknown_ = *token;
  }
  ASSIGN_OR_RETURN(const auto byte_fallback, ReadBool(model, "byte_fallback", where));
  if (byte_fallback.value_or(false)) {
    for (int byte = 0; byte < 256; ++byte) {
      byte_tokens_.push_back(Find(absl::StrFormat("<0x%02X>", byte)).value_or(kNone));
    }
  }
  return absl::OkStatus();
}

std::optional<std::int32_t> Bpe::Find(std::string_view text) const {
  const auto found = ids_.find(text);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

std::string_view Bpe::TextOf(std::int32_t token) const {
  return token >= 0 && token < size() ? std::string_view(texts_[token]) : std::string_view();
}

std::int32_t Bpe::TokenOf(char32_t character) const {
  if (character < kLowCharacters) return token_of_low_character_[character];
  const auto found = token_of_high_character_.find(character);
  return found == token_of_high_character_.end() ? kNone : found->second;
}

std::uint32_t Bpe::RankOf(std::int32_t left, std::int32_t right) const {
  const auto found = ranks_.find(PairKey(left, right));
  return found == ranks_.end() ? kNoMerge : found->second;
}

// One symbol per character, or several byte tokens, or the unknown token.
void Bpe::Spell(std::string_view piece, Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  symbols.clear();
  const auto add = [&](std::int32_t token) {
    const auto at = static_cast<std::int32_t>(symbols.size());
    symbols.push_back({token, at - 1, at + 1, kNoMerge});
  };
  bool owes_unknown = false;  // not yet added: more unknown characters may fuse with it
  for (std::size_t offset = 0; offset < piece.size();) {
    const std::size_t begin = offset;
    const std::int32_t token = TokenOf(NextCodePoint(piece, offset));
    if (token != kNone) {
      if (owes_unknown) add(unknown_);
      owes_unknown = false;
      add(token);
      continue;
    }
    const std::string_view bytes = piece.substr(begin, offset - begin);
    const auto token_of_byte = [&](char byte) { return byte_tokens_[static_cast<unsigned char>(byte)]; };
    if (!byte_tokens_.empty() &&
        std::all_of(bytes.begin(), bytes.end(), [&](char byte) { return token_of_byte(byte) != kNone; })) {
      for (const char byte : bytes) add(token_of_byte(byte));
    } else if (unknown_ != kNone) {
      if (owes_unknown && !fuse_unknown_) add(unknown_);
      owes_unknown = true;
    }
  }
  if (owes_unknown) add(unknown_);
  if (!symbols.empty()) symbols.back().next = kNone;
}

void Bpe::Encode(std::string_view piece, Workspace& workspace, std::vector<std::int32_t>& tokens) const {
  if (ignore_merges_) {
    if (const std::optional<std::int32_t> whole = Find(piece)) {
      tokens.push_back(*whole);
      return;
    }
  }
  Spell(piece, workspace);
  auto& symbols = workspace.symbols;
  auto& candidates = workspace.candidates;
  candidates.clear();
  const auto candidate = [&](std::int32_t at) {
    return static_cast<std::uint64_t>(symbols[at].rank) << 32 | static_cast<std::uint32_t>(at);
  };
  for (std::size_t at = 0; at + 1 < symbols.size(); ++at) {
    symbols[at].rank = RankOf(symbols[at].token, symbols[at + 1].token);
    if (symbols[at].rank != kNoMerge) candidates.push_back(candidate(static_cast<std::int32_t>(at)));
  }
  std::make_heap(candidates.begin(), candidates.end(), std::greater<>());
  const auto rank_again = [&](std::int32_t at) {
    Workspace::Symbol& symbol = symbols[at];
    symbol.rank = symbol.next == kNone ? kNoMerge : RankOf(symbol.token, symbols[symbol.next].token);
    if (symbol.rank == kNoMerge) return;
    candidates.push_back(candidate(at));
    std::push_heap(candidates.begin(), candidates.end(), std::greater<>());
  };
  while (!candidates.empty()) {
    const std::uint64_t least = candidates.front();
    std::pop_heap(candidates.begin(), candidates.end(), std::greater<>());
    candidates.pop_back();
    const auto at = static_cast<std::int32_t>(least & UINT32_MAX);
    // Stale where a merge has changed the pair since (a symbol that was merged away has rank kNoMerge).
    Workspace::Symbol& left = symbols[at];
    if (left.rank != least >> 32) continue;
    Workspace::Symbol& right = symbols[left.next];
    left.token = merged_[left.rank];
    left.next = right.next;
    right.rank = kNoMerge;
    right.token = kNone;
    if (left.next != kNone) symbols[left.next].previous = at;
    rank_again(at);
    if (left.previous != kNone) rank_again(left.previous);
  }
  for (std::int32_t at = symbols.empty() ? kNone : 0; at != kNone; at = symbols[at].next)
    tokens.push_back(symbols[at].token);
}

}  // namespace spillway
