#pragma once

// Chat messages -> prompt text. A minimal built-in renderer: it does not read the checkpoint's Jinja template, it
// recognises which of the common formats the checkpoint's special tokens belong to. The Jinja renderer replaces it
// behind this interface.

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/tokenizer.h"

namespace spillway {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

// Immutable; any thread.
class ChatTemplate {
 public:
  virtual ~ChatTemplate() = default;
  // INVALID_ARGUMENT for roles or orders that the format cannot express.
  virtual absl::StatusOr<std::string> Render(const std::vector<ChatMessage>& messages,
                                             bool add_generation_prompt) const = 0;
  virtual std::string name() const = 0;  // "llama3", "chatml", "llama2", "role-tokens", "plain"
};

// Chosen by the special tokens in the vocabulary: <|start_header_id|> llama3, <|im_start|> chatml, [INST] pieces
// llama2, <|bos|> with one token for each role role-tokens (the demo models), else plain ("role: content" lines).
std::unique_ptr<ChatTemplate> MakeChatTemplate(const Tokenizer& tokenizer);

}  // namespace spillway
