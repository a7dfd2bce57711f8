#include "server/openai_request.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/kernels.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

constexpr std::size_t kMaxPrompts = 1024;       // of one body
constexpr std::size_t kMaxChoices = 4096;       // of all its prompts
constexpr std::int64_t kDefaultMaxTokens = 16;  // of completions; a chat goes on up to max_model_len

// Parameters of OpenAI and vLLM that are not built: taken at their neutral values (null always is), else refused by
// name.
struct Unbuilt {
  const char* name;
  const char* neutral;  // JSON list; "*" = any value, it changes nothing here
};
constexpr Unbuilt kUnbuilt[] = {
    {"allowed_token_ids", "[[]]"},
    {"audio", "[]"},
    {"bad_words", "[[]]"},
    {"chat_template", "[]"},
    {"chat_template_kwargs", "[{}]"},
    {"continue_final_message", "[false]"},
    {"documents", "[[]]"},
    {"early_stopping", "[false]"},
    {"frequency_penalty", "[0]"},
    {"function_call", "[\"none\"]"},
    {"functions", "[[]]"},
    {"guided_choice", "[]"},
    {"guided_decoding_backend", "*"},
    {"guided_grammar", "[]"},
    {"guided_json", "[]"},
    {"guided_regex", "[]"},
    {"include_reasoning", "*"},
    {"kv_transfer_params", "[{}]"},
    {"length_penalty", "[1]"},
    {"logit_bias", "[{}]"},
    {"logits_processors", "[[]]"},
    {"metadata", "*"},
    {"mm_processor_kwargs", "[{}]"},
    {"modalities", "[[\"text\"]]"},
    {"parallel_tool_calls", "*"},
    {"prediction", "[]"},
    {"presence_penalty", "[0]"},
    {"prompt_cache_key", "*"},
    {"prompt_embeds", "[[]]"},
    {"prompt_logprobs", "[]"},
    {"reasoning_effort", "[\"none\"]"},
    {"repetition_detection", "[]"},
    {"repetition_penalty", "[1]"},
    {"response_format", "[{\"type\": \"text\"}]"},
    {"return_tokens_as_token_ids", "[false]"},
    {"safety_identifier", "*"},
    {"service_tier", "*"},
    {"spaces_between_special_tokens", "[true]"},
    {"store", "[false]"},
    {"structured_outputs", "[{}]"},
    {"suffix", "[\"\"]"},
    {"tool_choice", "[\"none\", \"auto\"]"},
    {"tools", "[[]]"},
    {"use_beam_search", "[false]"},
    {"user", "*"},
    {"verbosity", "[\"medium\"]"},
    {"vllm_xargs", "[{}]"},
    {"web_search_options", "[]"},
};

void CheckUnbuilt(FieldReader& fields) {
  for (const Unbuilt& row : kUnbuilt) {
    const Json* value = fields.Find(row.name);
    if (value == nullptr || row.neutral[0] == '*') continue;
    const Json neutral = Json::parse(row.neutral, nullptr, false);
    if (std::ranges::find(neutral, *value) != neutral.end()) continue;
    fields.Fail(row.name,
                absl::StrCat(row.name, " is not supported yet",
                             neutral.empty() ? "" : absl::StrCat("; leave it out or at ", neutral[0].dump())));
  }
}

absl::Status ReportUnread(const FieldReader& fields, const OnUnknownField& on_unknown) {
  RETURN_IF_ERROR(fields.status());
  for (const std::string& name : fields.Unread()) on_unknown(name);
  return absl::OkStatus();
}

absl::Status ExpectObject(const Json& body) {
  if (body.is_object()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("the body must be a JSON object, got ", body.type_name()));
}

// What completions and chats have in common.
void ReadCommon(FieldReader& fields, OpenAiRequest& request, GenerationRequest& generation) {
  request.model = fields.String("model").value_or("");
  request.request_id = fields.String("request_id").value_or("");
  request.stream = fields.Bool("stream").value_or(false);
  request.return_token_ids = fields.Bool("return_token_ids").value_or(false);
  if (const Json* options = fields.Find("stream_options"); options != nullptr) {
    if (!options->is_object()) {
      fields.Fail("stream_options", "stream_options must be an object");
    } else if (!request.stream) {
      fields.Fail("stream_options", "stream_options is only allowed when stream is true");
    } else {
      FieldReader inner(*options, "stream_options.");
      request.include_usage = inner.Bool("include_usage").value_or(false);
      request.continuous_usage = inner.Bool("continuous_usage_stats").value_or(false) && request.include_usage;
      if (!inner.status().ok()) fields.Fail("stream_options", std::string(inner.status().message()));
    }
  }
  generation.model = request.model;
  generation.temperature = fields.Number("temperature");
  generation.top_p = fields.Number("top_p");
  generation.min_p = fields.Number("min_p");
  generation.top_k = fields.Int("top_k");
  generation.seed = fields.Int("seed");
  generation.max_tokens = fields.Int("max_tokens");
  generation.min_tokens = fields.Int("min_tokens").value_or(0);
  generation.n = fields.Int("n").value_or(1);
  generation.stop = fields.StringOrStrings("stop");
  generation.stop_token_ids = fields.Ints("stop_token_ids");
  generation.include_stop_in_output = fields.Bool("include_stop_str_in_output").value_or(false);
  generation.ignore_eos = fields.Bool("ignore_eos").value_or(false);
  generation.skip_special_tokens = fields.Bool("skip_special_tokens").value_or(true);
  generation.truncate_prompt_tokens = fields.Int("truncate_prompt_tokens");
  generation.priority = fields.Int("priority").value_or(0);
  if (auto salt = fields.String("cache_salt")) {
    if (salt->empty()) fields.Fail("cache_salt", "cache_salt must not be empty");
    generation.cache_salt = *std::move(salt);
  }
  CheckUnbuilt(fields);
}

bool ReadTokenIds(const Json& list, std::vector<std::int32_t>& tokens) {
  for (const Json& item : list) {
    const auto id = AsInt(item);
    if (!id || *id < std::numeric_limits<std::int32_t>::min() || *id > std::numeric_limits<std::int32_t>::max())
      return false;
    tokens.push_back(static_cast<std::int32_t>(*id));
  }
  return true;
}

using Prompt = std::variant<std::string, std::vector<std::int32_t>>;

std::vector<Prompt> ReadPrompts(FieldReader& fields) {
  constexpr char kShapes[] =
      "prompt must be a string, a list of strings, a list of token ids or a list of lists of them";
  const Json* value = fields.Find("prompt");
  if (value == nullptr) {
    fields.Fail("prompt", "prompt is missing");
    return {};
  }
  if (value->is_string()) return {value->get<std::string>()};
  if (!value->is_array() || value->empty()) {
    fields.Fail("prompt", value->is_array() ? "prompt must not be empty" : kShapes);
    return {};
  }
  std::vector<Prompt> prompts;
  std::vector<std::int32_t> tokens;
  if (value->front().is_number()) {
    if (!ReadTokenIds(*value, tokens)) fields.Fail("prompt", kShapes);
    prompts.emplace_back(std::move(tokens));
    return prompts;
  }
  if (value->size() > kMaxPrompts) {
    fields.Fail("prompt",
                absl::StrCat("prompt holds ", value->size(), " prompts, at most ", kMaxPrompts, " are allowed"));
    return {};
  }
  for (const Json& item : *value) {
    tokens.clear();
    if (item.type() != value->front().type() || (!item.is_string() && !item.is_array()) ||
        (item.is_array() && !ReadTokenIds(item, tokens))) {
      fields.Fail("prompt", kShapes);
      return {};
    }
    if (item.is_string()) {
      prompts.emplace_back(item.get<std::string>());
    } else {
      prompts.emplace_back(std::move(tokens));
    }
  }
  return prompts;
}

// A string, or text parts.
absl::StatusOr<std::string> ReadContent(const Json& content) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) return InvalidField("messages", "a message's content must be a string or a list of parts");
  std::string text;
  for (const Json& part : content) {
    const auto type = part.is_object() ? part.find("type") : part.end();
    if (!part.is_object() || type == part.end() || !type->is_string()) {
      return InvalidField("messages", "a part of a message's content must be an object with a type");
    }
    if (*type != "text") {
      return InvalidField(
          "messages", absl::StrCat("content parts of type ", DumpJson(*type), " are not supported yet, only \"text\""));
    }
    const auto piece = part.find("text");
    if (piece == part.end() || !piece->is_string()) {
      return InvalidField("messages", "a part of type \"text\" needs a string named text");
    }
    if (&part != &content.front()) text.push_back('\n');
    text += piece->get_ref<const std::string&>();
  }
  return text;
}

absl::StatusOr<std::vector<ChatMessage>> ReadMessages(const Json& list) {
  if (!list.is_array() || list.empty())
    return InvalidField("messages", "messages must be a list of at least one message");
  std::vector<ChatMessage> messages;
  for (const Json& item : list) {
    if (!item.is_object()) return InvalidField("messages", "a message must be an object with role and content");
    const auto role = item.find("role");
    if (role == item.end() || !role->is_string()) return InvalidField("messages", "a message needs a role, a string");
    for (const char* name : {"tool_calls", "function_call", "audio", "refusal", "tool_call_id"}) {
      if (const auto found = item.find(name); found != item.end() && !found->is_null() && !found->empty()) {
        return InvalidField("messages", absl::StrCat(name, " in a message is not supported yet"));
      }
    }
    ChatMessage message{.role = role->get<std::string>(), .content = {}};
    if (message.role == "developer") message.role = "system";
    const auto content = item.find("content");
    if (content == item.end() || content->is_null()) return InvalidField("messages", "a message needs content");
    ASSIGN_OR_RETURN(message.content, ReadContent(*content));
    messages.push_back(std::move(message));
  }
  return messages;
}

// The conversation as prompt text; an empty one where a field was wrong.
std::string ReadChatPrompt(FieldReader& fields, const ChatTemplate& chat_template) {
  const bool add_generation_prompt = fields.Bool("add_generation_prompt").value_or(true);
  const Json* list = fields.Find("messages");
  if (list == nullptr) {
    fields.Fail("messages", "messages is missing");
    return {};
  }
  const auto messages = ReadMessages(*list);
  const auto text = messages.ok() ? chat_template.Render(*messages, add_generation_prompt) : messages.status();
  if (text.ok()) return *text;
  fields.Fail("messages", std::string(text.status().message()));
  return {};
}

void ReadCompletion(FieldReader& fields, OpenAiRequest& request, GenerationRequest generation) {
  request.echo = fields.Bool("echo").value_or(false);
  request.logprobs = fields.Int("logprobs");
  if (request.echo && request.logprobs) fields.Fail("echo", "echo together with logprobs is not supported yet");
  if (const auto best_of = fields.Int("best_of"); best_of && *best_of != generation.n) {
    fields.Fail("best_of",
                absl::StrCat("best_of is not supported: it must equal n (", generation.n, "), got ", *best_of));
  }
  generation.logprobs = request.logprobs;
  if (!generation.max_tokens) generation.max_tokens = kDefaultMaxTokens;
  generation.special_tokens =
      fields.Bool("add_special_tokens").value_or(true) ? SpecialTokens::kAdd : SpecialTokens::kNone;
  std::vector<Prompt> prompts = ReadPrompts(fields);
  if (generation.n > 1 && prompts.size() > 1 &&
      static_cast<std::uint64_t>(generation.n) > kMaxChoices / prompts.size()) {
    fields.Fail("n",
                absl::StrCat(prompts.size(), " prompts with n = ", generation.n, " exceed ", kMaxChoices, " choices"));
  }
  for (Prompt& prompt : prompts) {
    request.generations.push_back(generation);
    request.generations.back().prompt = std::move(prompt);
  }
}

void ReadChat(FieldReader& fields, const ChatTemplate& chat_template, OpenAiRequest& request,
              GenerationRequest generation) {
  const auto max_completion_tokens = fields.Int("max_completion_tokens");
  if (max_completion_tokens) generation.max_tokens = max_completion_tokens;
  const bool wants_logprobs = fields.Bool("logprobs").value_or(false);
  const auto top_logprobs = fields.Int("top_logprobs");
  if (top_logprobs && (*top_logprobs < 0 || *top_logprobs > kMaxLogprobs)) {
    fields.Fail("top_logprobs", absl::StrCat("top_logprobs must be in [0, ", kMaxLogprobs, "], got ", *top_logprobs));
  }
  if (top_logprobs.value_or(0) > 0 && !wants_logprobs) {
    fields.Fail("top_logprobs", "top_logprobs needs logprobs to be true");
  }
  if (wants_logprobs) request.logprobs = top_logprobs.value_or(0);
  generation.logprobs = request.logprobs;
  if (const auto echo = fields.Bool("echo"); echo.value_or(false))
    fields.Fail("echo", "echo is not supported yet in chats");
  // The template writes the special tokens itself.
  generation.special_tokens =
      fields.Bool("add_special_tokens").value_or(false) ? SpecialTokens::kAdd : SpecialTokens::kNone;
  generation.prompt = ReadChatPrompt(fields, chat_template);
  request.generations.push_back(std::move(generation));
}

}  // namespace

absl::StatusOr<OpenAiRequest> ReadOpenAiRequest(OpenAiKind kind, const Json& body, const ChatTemplate& chat_template,
                                                const OnUnknownField& on_unknown) {
  RETURN_IF_ERROR(ExpectObject(body));
  FieldReader fields(body);
  OpenAiRequest request{.kind = kind, .model = {}, .request_id = {}, .generations = {}, .logprobs = {}};
  GenerationRequest generation;
  ReadCommon(fields, request, generation);
  if (kind == OpenAiKind::kCompletion) {
    ReadCompletion(fields, request, std::move(generation));
  } else {
    ReadChat(fields, chat_template, request, std::move(generation));
  }
  RETURN_IF_ERROR(ReportUnread(fields, on_unknown));
  return request;
}

absl::StatusOr<TokenizeRequest> ReadTokenizeRequest(const Json& body, const ChatTemplate& chat_template,
                                                    const OnUnknownField& on_unknown) {
  RETURN_IF_ERROR(ExpectObject(body));
  FieldReader fields(body);
  const bool is_chat = body.contains("messages");
  TokenizeRequest request;
  request.model = fields.String("model").value_or("");
  request.special_tokens =
      fields.Bool("add_special_tokens").value_or(!is_chat) ? SpecialTokens::kAdd : SpecialTokens::kNone;
  request.return_token_strings = fields.Bool("return_token_strs").value_or(false);
  if (is_chat) {
    request.text = ReadChatPrompt(fields, chat_template);
  } else if (auto prompt = fields.String("prompt")) {
    request.text = *std::move(prompt);
  } else {
    fields.Fail("prompt", "prompt or messages is missing");
  }
  RETURN_IF_ERROR(ReportUnread(fields, on_unknown));
  return request;
}

absl::StatusOr<DetokenizeRequest> ReadDetokenizeRequest(const Json& body, const OnUnknownField& on_unknown) {
  RETURN_IF_ERROR(ExpectObject(body));
  FieldReader fields(body);
  DetokenizeRequest request{.model = fields.String("model").value_or(""), .tokens = fields.Ints("tokens")};
  if (fields.Find("tokens") == nullptr) fields.Fail("tokens", "tokens is missing");
  RETURN_IF_ERROR(ReportUnread(fields, on_unknown));
  return request;
}

}  // namespace spillway
