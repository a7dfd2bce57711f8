#include "server/chat_template.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"

namespace spillway {
namespace {

bool IsKnownRole(const std::string& role) { return role == "system" || role == "user" || role == "assistant"; }

absl::Status UnknownRole(const std::string& role) {
  return absl::InvalidArgumentError(
      absl::StrCat("the role '", role, "' is not supported, only system, user and assistant are"));
}

std::string Trim(const std::string& text) { return std::string(absl::StripAsciiWhitespace(text)); }

// Every message alike: an opening, the role, a separator, the content, an end.
struct MessageFormat {
  std::string name;
  std::string start;
  std::string before_role;
  std::string after_role;
  std::string after_content;
  std::string generation_prompt;
  bool trims_content = false;
};

class UniformTemplate : public ChatTemplate {
 public:
  explicit UniformTemplate(MessageFormat format) : format_(std::move(format)) {}
  std::string name() const override { return format_.name; }
  absl::StatusOr<std::string> Render(const std::vector<ChatMessage>& messages,
                                     bool add_generation_prompt) const override {
    std::string text = format_.start;
    for (const ChatMessage& message : messages) {
      if (!IsKnownRole(message.role)) return UnknownRole(message.role);
      absl::StrAppend(&text, format_.before_role, message.role, format_.after_role,
                      format_.trims_content ? Trim(message.content) : message.content, format_.after_content);
    }
    if (add_generation_prompt) text += format_.generation_prompt;
    return text;
  }

 private:
  const MessageFormat format_;
};

// [INST] ... [/INST] around what the user says, the system prompt inside the first one; roles must alternate.
class Llama2Template : public ChatTemplate {
 public:
  Llama2Template(std::string bos, std::string eos) : bos_(std::move(bos)), eos_(std::move(eos)) {}
  std::string name() const override { return "llama2"; }
  absl::StatusOr<std::string> Render(const std::vector<ChatMessage>& messages, bool) const override {
    std::string text;
    std::string system;
    bool expects_user = true;
    for (const ChatMessage& message : messages) {
      if (!IsKnownRole(message.role)) return UnknownRole(message.role);
      if (message.role == "system") {
        if (&message != &messages.front()) {
          return absl::InvalidArgumentError("a system message is only supported as the first one");
        }
        system = absl::StrCat("<<SYS>>\n", message.content, "\n<</SYS>>\n\n");
        continue;
      }
      if ((message.role == "user") != expects_user) {
        return absl::InvalidArgumentError("the roles user and assistant must alternate, user first");
      }
      if (expects_user) {
        absl::StrAppend(&text, bos_, "[INST] ", std::exchange(system, {}), Trim(message.content), " [/INST]");
      } else {
        absl::StrAppend(&text, " ", Trim(message.content), " ", eos_);
      }
      expects_user = !expects_user;
    }
    if (text.empty()) return absl::InvalidArgumentError("a chat needs a message of the user");
    return text;
  }

 private:
  const std::string bos_;
  const std::string eos_;
};

}  // namespace

std::unique_ptr<ChatTemplate> MakeChatTemplate(const Tokenizer& tokenizer) {
  const auto text_of = [&](const std::optional<std::int32_t>& token) {
    return token ? std::string(tokenizer.TokenText(*token)) : std::string();
  };
  const std::string bos = text_of(tokenizer.bos_token());
  if (tokenizer.Find("<|start_header_id|>")) {
    return std::make_unique<UniformTemplate>(
        MessageFormat{.name = "llama3",
                      .start = bos,
                      .before_role = "<|start_header_id|>",
                      .after_role = "<|end_header_id|>\n\n",
                      .after_content = "<|eot_id|>",
                      .generation_prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n",
                      .trims_content = true});
  }
  if (tokenizer.Find("<|im_start|>")) {
    return std::make_unique<UniformTemplate>(MessageFormat{.name = "chatml",
                                                           .start = "",
                                                           .before_role = "<|im_start|>",
                                                           .after_role = "\n",
                                                           .after_content = "<|im_end|>\n",
                                                           .generation_prompt = "<|im_start|>assistant\n"});
  }
  if (tokenizer.Find("[INST]") || tokenizer.chat_template().find("[INST]") != std::string_view::npos) {
    return std::make_unique<Llama2Template>(bos, text_of(tokenizer.eos_token()));
  }
  if (tokenizer.Find("<|user|>") && tokenizer.Find("<|assistant|>") && tokenizer.Find("<|end|>") && bos == "<|bos|>") {
    return std::make_unique<UniformTemplate>(MessageFormat{.name = "role-tokens",
                                                           .start = bos,
                                                           .before_role = "<|",
                                                           .after_role = "|>",
                                                           .after_content = "<|end|>",
                                                           .generation_prompt = "<|assistant|>"});
  }
  // Where the tokenizer begins texts with bos, so does the chat: its text is tokenized without that.
  const auto empty = tokenizer.Encode("", SpecialTokens::kAdd);
  const bool starts_with_bos = empty.ok() && !empty->empty() && empty->front() == tokenizer.bos_token();
  return std::make_unique<UniformTemplate>(MessageFormat{.name = "plain",
                                                         .start = starts_with_bos ? bos : "",
                                                         .before_role = "",
                                                         .after_role = ": ",
                                                         .after_content = "\n",
                                                         .generation_prompt = "assistant:"});
}

}  // namespace spillway
