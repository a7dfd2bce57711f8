#include "engine/tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/bpe.h"
#include "engine/json_file.h"
#include "engine/pretokenizer.h"
#include "engine/tokenizer_added_tokens.h"
#include "engine/tokenizer_decoder.h"
#include "engine/tokenizer_normalizer.h"
#include "engine/utf8.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxTokenizerBytes = 256 << 20;
constexpr std::size_t kMaxSettingsBytes = 64 << 20;
constexpr std::size_t kMaxTemplateBytes = 4 << 20;
constexpr std::size_t kMaxTextBytes = 256 << 20;

// What the post-processor puts before and behind a text.
struct Frame {
  std::vector<std::int32_t> prefix;
  std::vector<std::int32_t> suffix;
};

// One {"SpecialToken": {"id": name}} of a template: the ids that special_tokens lists under the name.
absl::Status AppendSpecial(const json& item, const json& processor, const std::string& where,
                           std::vector<std::int32_t>& tokens) {
  ASSIGN_OR_RETURN(const auto name, ReadString(item, "id", where));
  const json* specials = FindMember(processor, "special_tokens");
  const json* special = specials != nullptr && name ? FindMember(*specials, name->c_str()) : nullptr;
  const json* ids = special != nullptr ? FindMember(*special, "ids") : nullptr;
  if (ids == nullptr || !ids->is_array()) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": special_tokens has no ids for '", Excerpt(name.value_or("(no id)")), "'"));
  }
  for (const json& id : *ids) {
    const std::optional<std::int64_t> token = IntegerWithin(id, 0, kMaxTokenId);
    if (!token) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": the id ", Shown(id), " of '", Excerpt(*name),
                                                     "' is not an integer from 0 to ", kMaxTokenId));
    }
    tokens.push_back(static_cast<std::int32_t>(*token));
  }
  return absl::OkStatus();
}

// Wraps what `frame` already adds: processors of a Sequence apply from the inside outwards.
absl::Status AddTemplate(const json& processor, const std::string& where, Frame& frame) {
  const json* single = FindMember(processor, "single");
  if (single == nullptr || !single->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": a TemplateProcessing without its list single"));
  }
  Frame outer;
  int num_texts = 0;
  for (const json& item : *single) {
    const json* special = FindMember(item, "SpecialToken");
    const json* sequence = FindMember(item, "Sequence");
    if (special != nullptr) {
      RETURN_IF_ERROR(AppendSpecial(*special, processor, where, num_texts == 0 ? outer.prefix : outer.suffix));
      continue;
    }
    const json* name = sequence != nullptr ? FindMember(*sequence, "id") : nullptr;
    if (name == nullptr || *name != "A") {
      return absl::InvalidArgumentError(absl::StrCat(where, ": ", Shown(item), " in single is no template item"));
    }
    ++num_texts;
  }
  if (num_texts != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": single names the text ", num_texts, " times, wanted once"));
  }
  frame.prefix.insert(frame.prefix.begin(), outer.prefix.begin(), outer.prefix.end());
  frame.suffix.insert(frame.suffix.end(), outer.suffix.begin(), outer.suffix.end());
  return absl::OkStatus();
}

absl::Status ReadPostProcessor(const json& processor, const std::string& where, Frame& frame) {
  ASSIGN_OR_RETURN(const std::optional<std::string> named, ReadString(processor, "type", where));
  const std::string type = named.value_or("(none)");
  if (type == "ByteLevel") return absl::OkStatus();  // moves offsets, which we do not report
  if (type == "TemplateProcessing") return AddTemplate(processor, where, frame);
  if (type != "Sequence") {
    return absl::UnimplementedError(absl::StrCat(where, ": post_processor ", Excerpt(type), " is not supported"));
  }
  const json* parts = FindMember(processor, "processors");
  if (parts == nullptr || !parts->is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": a Sequence without its list processors"));
  }
  for (const json& part : *parts) RETURN_IF_ERROR(ReadPostProcessor(part, where, frame));
  return absl::OkStatus();
}

// "<s>" or {"content": "<s>", ...}.
absl::StatusOr<std::optional<std::string>> ReadTokenName(const json& settings, const char* key,
                                                         const std::string& where) {
  const json* value = FindMember(settings, key);
  if (value != nullptr && value->is_object()) return ReadString(*value, "content", absl::StrCat(where, ": ", key));
  return ReadString(settings, key, where);
}

// A string, or a list of {"name": .., "template": ..} of which "default" is taken.
absl::StatusOr<std::string> ReadChatTemplate(const json& settings, const std::string& where) {
  const json* value = FindMember(settings, "chat_template");
  if (value == nullptr || !value->is_array()) {
    ASSIGN_OR_RETURN(const auto source, ReadString(settings, "chat_template", where));
    return source.value_or("");
  }
  for (const json& entry : *value) {
    ASSIGN_OR_RETURN(const auto name, ReadString(entry, "name", where));
    ASSIGN_OR_RETURN(const auto source, ReadString(entry, "template", where));
    if (name == "default" && source) return *source;
  }
  return absl::InvalidArgumentError(absl::StrCat(where, ": chat_template is a list without an entry named default"));
}

class JsonTokenizer final : public Tokenizer {
 public:
  JsonTokenizer(Bpe bpe, AddedTokens added, Normalizer normalizer, Pretokenizer pretokenizer, TokenDecoder decoder,
                Frame frame)
      : bpe_(std::move(bpe)),
        added_(std::move(added)),
        normalizer_(std::move(normalizer)),
        pretokenizer_(std::move(pretokenizer)),
        decoder_(std::move(decoder)),
        frame_(std::move(frame)) {}

  // tokenizer_config.json. Before the tokenizer is shared.
  absl::Status ReadSettings(const json& settings, const std::string& where) {
    ASSIGN_OR_RETURN(bos_, FindNamed(settings, "bos_token", where));
    ASSIGN_OR_RETURN(eos_, FindNamed(settings, "eos_token", where));
    ASSIGN_OR_RETURN(const auto add_bos, ReadBool(settings, "add_bos_token", where));
    ASSIGN_OR_RETURN(const auto add_eos, ReadBool(settings, "add_eos_token", where));
    Override(add_bos, bos_, frame_.prefix, frame_.prefix.begin());
    Override(add_eos, eos_, frame_.suffix, frame_.suffix.end());
    ASSIGN_OR_RETURN(chat_template_, ReadChatTemplate(settings, where));
    return absl::OkStatus();
  }
  void SetChatTemplate(std::string source) { chat_template_ = std::move(source); }

  absl::StatusOr<std::vector<std::int32_t>> Encode(std::string_view text, SpecialTokens special) const override {
    if (text.size() > kMaxTextBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("a text of ", text.size(), " bytes, the limit is ", kMaxTextBytes));
    }
    if (const std::optional<std::size_t> invalid = FindInvalidUtf8(text)) {
      return absl::InvalidArgumentError(absl::StrCat("the text is not valid UTF-8 at byte ", *invalid));
    }
    std::vector<std::int32_t> tokens;
    tokens.reserve(text.size() / 3 + frame_.prefix.size() + frame_.suffix.size());
    if (special != SpecialTokens::kNone) tokens = frame_.prefix;
    const auto written =
        special == SpecialTokens::kAddToPlainText ? AddedTokens::Written::kPlain : AddedTokens::Written::kToken;
    Bpe::Workspace workspace;
    for (const Segment& segment : added_.CutRaw(text, written)) {
      if (segment.token != Segment::kText) {
        tokens.push_back(segment.token);
      } else {
        const std::string_view part = text.substr(segment.begin, segment.end - segment.begin);
        RETURN_IF_ERROR(EncodePart(part, segment.begin == 0, written, workspace, tokens));
      }
    }
    if (special != SpecialTokens::kNone) tokens.insert(tokens.end(), frame_.suffix.begin(), frame_.suffix.end());
    return tokens;
  }

  std::string Decode(std::span<const std::int32_t> tokens, SkipSpecial skip) const override {
    std::string text;
    TokenDecoder::Progress progress;
    for (const std::int32_t token : tokens) {
      if (skip == SkipSpecial::kYes && IsSpecial(token)) continue;
      const std::string_view spelling = TokenText(token);
      if (!spelling.empty()) decoder_.Push(spelling, progress, text);
    }
    decoder_.Flush(progress, text);
    return text;
  }

  std::string TokenBytes(std::int32_t token) const override {
    const std::string_view spelling = TokenText(token);
    return spelling.empty() ? std::string() : decoder_.BytesOf(spelling);
  }

  std::string_view TokenText(std::int32_t token) const override {
    const std::string_view text = bpe_.TextOf(token);
    return text.empty() ? added_.TextOf(token) : text;
  }

  bool IsSpecial(std::int32_t token) const override { return added_.IsSpecial(token); }

  std::optional<std::int32_t> Find(std::string_view token) const override {
    const std::optional<std::int32_t> found = added_.Find(token);
    return found ? found : bpe_.Find(token);
  }

  std::int32_t vocab_size() const override { return std::max(bpe_.size(), added_.size()); }
  std::optional<std::int32_t> bos_token() const override { return bos_; }
  std::optional<std::int32_t> eos_token() const override { return eos_; }
  std::string_view chat_template() const override { return chat_template_; }
  const TokenDecoder* decoder() const override { return &decoder_; }

 private:
  absl::StatusOr<std::optional<std::int32_t>> FindNamed(const json& settings, const char* key,
                                                        const std::string& where) {
    ASSIGN_OR_RETURN(const std::optional<std::string> name, ReadTokenName(settings, key, where));
    if (!name) return std::nullopt;
    const std::optional<std::int32_t> token = Find(*name);
    if (!token) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": ", key, " '", Excerpt(*name), "' is not in the vocabulary"));
    }
    return token;
  }

  // add_bos_token and add_eos_token, where they are written, have the last word over the template of tokenizer.json.
  static void Override(std::optional<bool> adds, std::optional<std::int32_t> token, std::vector<std::int32_t>& side,
                       std::vector<std::int32_t>::iterator place) {
    if (!adds || !token) return;
    const bool is_there = std::find(side.begin(), side.end(), *token) != side.end();
    if (*adds && !is_there) side.insert(place, *token);
    if (!*adds) std::erase(side, *token);
  }

  absl::Status EncodePart(std::string_view part, bool begins_text, AddedTokens::Written written,
                          Bpe::Workspace& workspace, std::vector<std::int32_t>& tokens) const {
    std::string normalized(part);
    RETURN_IF_ERROR(normalizer_.Apply(normalized));
    for (const Segment& segment : added_.CutNormalized(normalized, written)) {
      if (segment.token != Segment::kText) {
        tokens.push_back(segment.token);
        continue;
      }
      CutText cut;
      cut.text = normalized.substr(segment.begin, segment.end - segment.begin);
      cut.pieces = {{0, cut.text.size(), begins_text && segment.begin == 0}};
      RETURN_IF_ERROR(pretokenizer_.Apply(cut));
      for (const Piece& piece : cut.pieces) {
        bpe_.Encode(std::string_view(cut.text).substr(piece.begin, piece.end - piece.begin), workspace, tokens);
      }
    }
    return absl::OkStatus();
  }

  Bpe bpe_;
  AddedTokens added_;
  Normalizer normalizer_;
  Pretokenizer pretokenizer_;
  TokenDecoder decoder_;
  Frame frame_;
  std::optional<std::int32_t> bos_;
  std::optional<std::int32_t> eos_;
  std::string chat_template_;
};

// An added token may repeat the vocabulary, not contradict it.
absl::Status CheckAgreement(const Bpe& bpe, const AddedTokens& added, const std::string& where) {
  for (const std::int32_t id : added.ids()) {
    const std::string_view text = added.TextOf(id);
    const std::string_view in_vocab = bpe.TextOf(id);
    const std::optional<std::int32_t> vocab_id = bpe.Find(text);
    if ((!in_vocab.empty() && in_vocab != text) || vocab_id.value_or(id) != id) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": added token '", Excerpt(text), "', id ", id, ", contradicts the vocabulary: there id ",
                       id, " is '", Excerpt(in_vocab), "' and the token has id ", vocab_id.value_or(-1)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<JsonTokenizer>> ReadTokenizer(const json& file, const std::string& path) {
  const json* model = FindMember(file, "model");
  if (model == nullptr || !model->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": model is missing or not an object"));
  }
  ASSIGN_OR_RETURN(Bpe bpe, Bpe::FromJson(*model, absl::StrCat(path, ": model")));
  ASSIGN_OR_RETURN(Normalizer normalizer,
                   Normalizer::FromJson(FindMember(file, "normalizer"), absl::StrCat(path, ": normalizer")));
  ASSIGN_OR_RETURN(Pretokenizer pretokenizer,
                   Pretokenizer::FromJson(FindMember(file, "pre_tokenizer"), absl::StrCat(path, ": pre_tokenizer")));
  ASSIGN_OR_RETURN(TokenDecoder decoder,
                   TokenDecoder::FromJson(FindMember(file, "decoder"), absl::StrCat(path, ": decoder")));
  ASSIGN_OR_RETURN(AddedTokens added, AddedTokens::FromJson(FindMember(file, "added_tokens"), normalizer,
                                                            absl::StrCat(path, ": added_tokens")));
  RETURN_IF_ERROR(CheckAgreement(bpe, added, path));
  Frame frame;
  if (const json* processor = FindMember(file, "post_processor")) {
    RETURN_IF_ERROR(ReadPostProcessor(*processor, absl::StrCat(path, ": post_processor"), frame));
  }
  return std::make_unique<JsonTokenizer>(std::move(bpe), std::move(added), std::move(normalizer),
                                         std::move(pretokenizer), std::move(decoder), std::move(frame));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/tokenizer.json");
  ASSIGN_OR_RETURN(const json file, ReadJsonFile(path, kMaxTokenizerBytes));
  ASSIGN_OR_RETURN(std::unique_ptr<JsonTokenizer> tokenizer, ReadTokenizer(file, path));

  const std::string settings_path = absl::StrCat(folder, "/tokenizer_config.json");
  const absl::StatusOr<json> settings = ReadJsonFile(settings_path, kMaxSettingsBytes);
  if (settings.ok()) RETURN_IF_ERROR(tokenizer->ReadSettings(*settings, settings_path));
  if (!settings.ok() && !absl::IsNotFound(settings.status())) return settings.status();

  // Newer folders keep the template beside the settings.
  absl::StatusOr<std::string> source = ReadWholeFile(absl::StrCat(folder, "/chat_template.jinja"), kMaxTemplateBytes);
  if (!source.ok() && !absl::IsNotFound(source.status())) return source.status();
  if (source.ok()) tokenizer->SetChatTemplate(*std::move(source));
  return tokenizer;
}

struct StreamDecoder::State {
  const Tokenizer* tokenizer;
  SkipSpecial skip;
  TokenDecoder::Progress progress;
  Utf8Repair repair;  // for a tokenizer without a decoder
};

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, SkipSpecial skip)
    : state_(std::make_unique<State>(State{&tokenizer, skip, {}, {}})) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::Push(std::int32_t token) {
  std::string text;
  const Tokenizer& tokenizer = *state_->tokenizer;
  if (state_->skip == SkipSpecial::kYes && tokenizer.IsSpecial(token)) return text;
  if (tokenizer.decoder() == nullptr) {
    state_->repair.Push(tokenizer.TokenBytes(token), text);
    return text;
  }
  const std::string_view spelling = tokenizer.TokenText(token);
  if (!spelling.empty()) tokenizer.decoder()->Push(spelling, state_->progress, text);
  return text;
}

std::string StreamDecoder::Flush() {
  std::string text;
  if (const TokenDecoder* decoder = state_->tokenizer->decoder()) {
    decoder->Flush(state_->progress, text);
  } else {
    state_->repair.Flush(text);
  }
  return text;
}

}  // namespace spillway
