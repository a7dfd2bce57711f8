#include "engine/bpe.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace spillway {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::vector<std::int32_t> Encode(const Bpe& bpe, const std::string& piece) {
  Bpe::Workspace workspace;
  std::vector<std::int32_t> tokens;
  bpe.Encode(piece, workspace, tokens);
  return tokens;
}

Bpe Make(const json& model) {
  absl::StatusOr<Bpe> bpe = Bpe::FromJson(model, "model");
  EXPECT_TRUE(bpe.ok()) << bpe.status();
  return *std::move(bpe);
}

json AbModel() {
  return {{"type", "BPE"},
          {"vocab", {{"a", 0}, {"b", 1}, {"ab", 2}, {"aba", 3}, {"<unk>", 4}, {"ba", 5}}},
          {"merges", {"b a", "a b", "ab a"}}};
}

// The definition: merge the leftmost pair of the least rank until there is none.
std::vector<std::int32_t> ReferenceEncode(const json& model, const std::string& piece) {
  std::map<std::pair<std::string, std::string>, std::size_t> ranks;
  for (std::size_t rank = 0; rank < model["merges"].size(); ++rank) {
    ranks[{model["merges"][rank][0], model["merges"][rank][1]}] = rank;
  }
  std::vector<std::string> symbols;
  for (const char c : piece) symbols.emplace_back(1, c);
  while (true) {
    std::size_t best = ranks.size();
    std::size_t at = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks.find({symbols[i], symbols[i + 1]});
      if (found != ranks.end() && found->second < best) {
        best = found->second;
        at = i;
      }
    }
    if (best == ranks.size()) break;
    symbols[at] += symbols[at + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  std::vector<std::int32_t> tokens;
  for (const std::string& symbol : symbols) tokens.push_back(model["vocab"][symbol]);
  return tokens;
}

TEST(Bpe, MergesByRankThenFromTheLeft) {
  const Bpe bpe = Make(AbModel());
  EXPECT_THAT(Encode(bpe, "aba"), ElementsAre(0, 5));
  EXPECT_THAT(Encode(bpe, "abb"), ElementsAre(2, 1));
  EXPECT_THAT(Encode(bpe, ""), IsEmpty());
}

TEST(Bpe, EqualsTheDefinitionOnRandomVocabularies) {
  std::mt19937 random(11);
  for (int round = 0; round < 60; ++round) {
    json model = {{"vocab", {{"a", 0}, {"b", 1}, {"c", 2}}}, {"merges", json::array()}};
    std::vector<std::string> texts = {"a", "b", "c"};
    for (int i = 0; i < 40; ++i) {
      const std::string left = texts[random() % texts.size()];
      const std::string right = texts[random() % texts.size()];
      const std::string both = left + right;
      if (both.size() > 8) continue;
      if (!model["vocab"].contains(both)) {
        model["vocab"][both] = texts.size();
        texts.push_back(both);
      }
      const json merge = {left, right};
      if (std::find(model["merges"].begin(), model["merges"].end(), merge) == model["merges"].end()) {
        model["merges"].push_back(merge);
      }
    }
    const Bpe bpe = Make(model);
    for (int i = 0; i < 30; ++i) {
      std::string piece;
      for (std::size_t j = 0, size = random() % 40; j < size; ++j) piece += "abc"[random() % 3];
      ASSERT_EQ(Encode(bpe, piece), ReferenceEncode(model, piece)) << "round " << round << " " << piece;
    }
  }
}

TEST(Bpe, LongPiecesAreNotQuadratic) {
  json model = {{"vocab", {{"a", 0}}}, {"merges", json::array()}};
  std::string doubled = "a";
  for (int i = 1; i <= 10; ++i) {
    model["merges"].push_back({doubled, doubled});
    doubled += doubled;
    model["vocab"][doubled] = i;
  }
  const Bpe bpe = Make(model);
  // A million characters in the suite's time: ten thousand times the work of a quadratic merge would not end.
  EXPECT_EQ(Encode(bpe, std::string(1 << 20, 'a')), std::vector<std::int32_t>(1 << 10, 10));
}

TEST(Bpe, BothSpellingsOfMergesAreTheSame) {
  json model = AbModel();
  model["merges"] = json::array({json::array({"b", "a"}), json::array({"a", "b"}), json::array({"ab", "a"})});
  EXPECT_EQ(Encode(Make(model), "ababba"), Encode(Make(AbModel()), "ababba"));
}

TEST(Bpe, SeparatorsAmongSpacesAreFound) {
  const json model = {{"vocab", {{" ", 0}, {"  ", 1}, {"    ", 2}, {"x", 3}, {"x ", 4}}},
                      {"merges", {"   ", "     ", "x  "}}};
  EXPECT_THAT(Encode(Make(model), "     "), ElementsAre(2, 0));
  EXPECT_THAT(Encode(Make(model), "x "), ElementsAre(4));
}

TEST(Bpe, UnknownCharactersFuseOnlyIfAsked) {
  json model = AbModel();
  EXPECT_THAT(Encode(Make(model), "axyb"), ElementsAre(2));  // dropped, as in Hugging Face
  model["unk_token"] = "<unk>";
  EXPECT_THAT(Encode(Make(model), "axyb\u00e9"), ElementsAre(0, 4, 4, 1, 4));
  model["fuse_unk"] = true;
  EXPECT_THAT(Encode(Make(model), "axyb\u00e9"), ElementsAre(0, 4, 1, 4));
}

TEST(Bpe, BytesStandForUnknownCharactersWhereAllAreThere) {
  json model = AbModel();
  model["unk_token"] = "<unk>";
  model["byte_fallback"] = true;
  model["vocab"]["<0xC3>"] = 10;
  model["vocab"]["<0xA9>"] = 11;
  const Bpe bpe = Make(model);
  EXPECT_THAT(Encode(bpe, "a\u00e9b"), ElementsAre(0, 10, 11, 1));
  EXPECT_THAT(Encode(bpe, "a\u00e8b"), ElementsAre(0, 4, 1));
}

TEST(Bpe, IgnoreMergesTakesAWholePieceOfTheVocabulary) {
  json model = AbModel();
  EXPECT_THAT(Encode(Make(model), "aba"), ElementsAre(0, 5));
  model["ignore_merges"] = true;
  EXPECT_THAT(Encode(Make(model), "aba"), ElementsAre(3));
  EXPECT_THAT(Encode(Make(model), "abab"), ElementsAre(0, 5, 1));
}

TEST(Bpe, FindsAndSpells) {
  const Bpe bpe = Make({{"vocab", {{"a", 0}, {"b", 5}}}, {"merges", json::array()}});
  EXPECT_EQ(bpe.size(), 6);
  EXPECT_EQ(bpe.Find("b"), 5);
  EXPECT_EQ(bpe.Find("c"), std::nullopt);
  EXPECT_EQ(bpe.TextOf(5), "b");
  for (const std::int32_t unknown : {-1, 3, 6, INT32_MAX, INT32_MIN}) EXPECT_EQ(bpe.TextOf(unknown), "");
}

TEST(Bpe, RefusesBadModels) {
  const std::pair<json, const char*> cases[] = {
      {{{"type", "Unigram"}}, "Unigram"},
      {{{"vocab", nullptr}}, "vocab is missing"},
      {{{"vocab", json::array()}}, "vocab is missing"},
      {{{"vocab", {{"a", -1}}}}, "the id of 'a' is -1"},
      {{{"vocab", {{"a", 1.5}}}}, "the id of 'a' is 1.5"},
      {{{"vocab", {{"a", "0"}}}}, "the id of 'a' is \"0\""},
      {{{"vocab", {{"a", 1 << 22}}}}, "wanted an integer from 0 to 4194303"},
      {{{"vocab", {{"q", 1}}}}, "have the same id 1"},
      {{{"merges", nullptr}}, "merges is missing"},
      {{{"merges", {"ab"}}}, "merge 0 is \"ab\""},
      {{{"merges", {"a b", "b zz"}}}, "merge 1 is \"b zz\""},
      {{{"merges", {"b b"}}}, "in the vocabulary"},
      {{{"merges", {1}}}, "merge 0 is 1"},
      {{{"merges", json::array({json::array({"a"})})}}, "merge 0 is [\"a\"]"},
      {{{"merges", json::array({json::array({"a", 1})})}}, "merge 0"},
      {{{"unk_token", "nowhere"}}, "unk_token 'nowhere'"},
      {{{"dropout", 0.1}}, "dropout 0.1"},
      {{{"continuing_subword_prefix", "##"}}, "continuing_subword_prefix '##'"},
      {{{"end_of_word_suffix", "</w>"}}, "end_of_word_suffix '</w>'"},
      {{{"fuse_unk", 1}}, "fuse_unk is 1"},
  };
  for (const auto& [changes, message] : cases) {
    json model = AbModel();
    model.merge_patch(changes);
    const absl::Status status = Bpe::FromJson(model, "model").status();
    EXPECT_FALSE(status.ok()) << changes;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  }
}

}  // namespace
}  // namespace spillway
