#include "engine/tokenizer_added_tokens.h"

#include <unicode/uchar.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/bpe.h"
#include "engine/json_file.h"
#include "engine/utf8.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

// \w of the library that Hugging Face uses here.
bool IsWordCharacter(char32_t character) {
  const auto c = static_cast<UChar32>(character);
  return u_isUAlphabetic(c) != 0 || (U_MASK(u_charType(c)) & (U_GC_M_MASK | U_GC_ND_MASK | U_GC_PC_MASK)) != 0 ||
         c == 0x200c || c == 0x200d;
}

bool IsWhitespace(char32_t character) { return u_isUWhiteSpace(static_cast<UChar32>(character)) != 0; }

// Begin of the code point that ends at `end` > 0.
std::size_t PreviousBegin(std::string_view text, std::size_t end) {
  do --end;
  while (end > 0 && (text[end] & 0xc0) == 0x80);
  return end;
}

std::size_t SkipWhitespaceBackwards(std::string_view text, std::size_t end, std::size_t limit) {
  while (end > limit) {
    const std::size_t begin = PreviousBegin(text, end);
    std::size_t offset = begin;
    if (!IsWhitespace(NextCodePoint(text, offset))) break;
    end = begin;
  }
  return end;
}

std::size_t SkipWhitespace(std::string_view text, std::size_t begin) {
  while (begin < text.size()) {
    std::size_t offset = begin;
    if (!IsWhitespace(NextCodePoint(text, offset))) break;
    begin = offset;
  }
  return begin;
}

bool StandsAlone(std::string_view text, std::size_t begin, std::size_t end) {
  if (begin > 0) {
    std::size_t offset = PreviousBegin(text, begin);
    if (IsWordCharacter(NextCodePoint(text, offset))) return false;
  }
  if (end < text.size()) {
    std::size_t offset = end;
    if (IsWordCharacter(NextCodePoint(text, offset))) return false;
  }
  return true;
}

}  // namespace

void AddedTokens::Trie::Add(std::string_view text, std::int32_t token) {
  std::uint64_t node = 0;
  begins[static_cast<unsigned char>(text[0])] = true;
  for (const char byte : text) {
    const auto [edge, is_new] =
        edges.emplace(node << 8 | static_cast<unsigned char>(byte), static_cast<std::uint32_t>(tokens.size()));
    if (is_new) tokens.push_back(Segment::kText);
    node = edge->second;
  }
  tokens[node] = token;
}

absl::StatusOr<AddedTokens> AddedTokens::FromJson(const json* description, const Normalizer& normalizer,
                                                  const std::string& where) {
  AddedTokens added;
  if (description == nullptr) return added;
  if (!description->is_array()) return absl::InvalidArgumentError(absl::StrCat(where, ": not an array"));
  for (const json& token : *description) RETURN_IF_ERROR(added.Add(token, normalizer, where));
  return added;
}

absl::Status AddedTokens::Add(const json& description, const Normalizer& normalizer, const std::string& where) {
  ASSIGN_OR_RETURN(const auto id, ReadInteger(description, "id", 0, kMaxTokenId, where));
  ASSIGN_OR_RETURN(const auto content, ReadString(description, "content", where));
  if (!id || !content) return absl::InvalidArgumentError(absl::StrCat(where, ": a token without id or content"));
  if (content->empty()) return absl::OkStatus();  // nowhere in a text
  Token token{.text = *content};
  bool is_normalized = true;
  for (const auto& [key, flag] :
       {std::pair("special", &token.is_special), std::pair("single_word", &token.is_single_word),
        std::pair("lstrip", &token.takes_left), std::pair("rstrip", &token.takes_right),
        std::pair("normalized", &is_normalized)}) {
    ASSIGN_OR_RETURN(const std::optional<bool> value, ReadBool(description, key, where));
    if (value) *flag = *value;
  }
  const auto number = static_cast<std::int32_t>(*id);
  const auto [by_id, id_is_new] = tokens_.emplace(number, std::move(token));
  if (!id_is_new || !ids_.emplace(*content, number).second) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": '", Excerpt(*content), "', id ", number, ": this id or content was there before"));
  }
  size_ = std::max(size_, number + 1);
  if (!is_normalized) {
    raw_.Add(*content, number);
    return absl::OkStatus();
  }
  std::string respelled = *content;
  RETURN_IF_ERROR(normalizer.Apply(respelled));
  if (!respelled.empty()) normalized_.Add(respelled, number);
  return absl::OkStatus();
}

std::vector<Segment> AddedTokens::Cut(const Trie& trie, std::string_view text, Written written) const {
  std::vector<Segment> segments;
  std::size_t uncut = 0;  // [uncut, ...) is in no segment yet
  std::size_t at = 0;
  while (at < text.size()) {
    if (!trie.begins[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    std::int32_t longest = Segment::kText;
    std::size_t end = at;
    std::uint64_t node = 0;
    for (std::size_t i = at; i < text.size(); ++i) {
      const auto edge = trie.edges.find(node << 8 | static_cast<unsigned char>(text[i]));
      if (edge == trie.edges.end()) break;
      node = edge->second;
      if (trie.tokens[node] == Segment::kText) continue;
      longest = trie.tokens[node];
      end = i + 1;
    }
    if (longest == Segment::kText) {
      ++at;
      continue;
    }
    std::size_t begin = at;
    at = end;
    const Token& token = tokens_.at(longest);
    if (token.is_special && written == Written::kPlain) continue;
    if (token.is_single_word && !StandsAlone(text, begin, end)) continue;
    if (token.takes_left) begin = SkipWhitespaceBackwards(text, begin, uncut);
    if (token.takes_right) end = SkipWhitespace(text, end);
    if (end <= uncut) continue;  // whitespace that the token before took
    begin = std::max(begin, uncut);
    if (uncut < begin) segments.push_back({uncut, begin, Segment::kText});
    segments.push_back({begin, end, longest});
    uncut = end;
  }
  if (uncut < text.size()) segments.push_back({uncut, text.size(), Segment::kText});
  return segments;
}

std::optional<std::int32_t> AddedTokens::Find(std::string_view text) const {
  const auto found = ids_.find(std::string(text));
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

std::string_view AddedTokens::TextOf(std::int32_t token) const {
  const auto found = tokens_.find(token);
  return found == tokens_.end() ? std::string_view() : std::string_view(found->second.text);
}

bool AddedTokens::IsSpecial(std::int32_t token) const {
  const auto found = tokens_.find(token);
  return found != tokens_.end() && found->second.is_special;
}

std::vector<std::int32_t> AddedTokens::ids() const {
  std::vector<std::int32_t> ids;
  for (const auto& [id, token] : tokens_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  return ids;
}

}  // namespace spillway
