#include "server/openai_answer.h"

#include <mutex>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/openai_format.h"
#include "server/openai_json.h"

namespace spillway {
namespace {

class Answer : public std::enable_shared_from_this<Answer> {
 public:
  Answer(const Tokenizer& tokenizer, OpenAiRequest request, AnswerOptions options,
         std::shared_ptr<HttpExchange> exchange)
      : tokenizer_(tokenizer),
        request_(std::move(request)),
        options_(std::move(options)),
        exchange_(std::move(exchange)),
        is_chat_(request_.kind == OpenAiKind::kChat),
        num_unprompted_(request_.generations.size()),
        num_unfinished_(request_.generations.size()),
        prompts_(request_.generations.size()) {
    const char* object = is_chat_ ? (request_.stream ? "chat.completion.chunk" : "chat.completion") : "text_completion";
    head_ = R"({"id":)";
    AppendJsonString(head_, options_.id);
    absl::StrAppend(&head_, R"(,"object":")", object, R"(","created":)", absl::ToUnixSeconds(absl::Now()),
                    R"(,"model":)");
    AppendJsonString(head_, options_.model);
    head_ += R"(,"choices":[)";
  }

  void Start(Service& service) {
    exchange_->OnClosed([weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->CancelAll();
    });
    const std::lock_guard lock(mutex_);  // listeners wait until all have been started
    const std::size_t count = request_.generations.size();
    for (std::size_t prompt = 0; prompt < count; ++prompt) {
      GenerationRequest& generation = request_.generations[prompt];
      if (!request_.request_id.empty()) {
        generation.request_id = count == 1 ? options_.id : absl::StrCat(options_.id, "-", prompt);
      }
      AddChoices(prompt, generation, service.options().max_choices);
      generations_.push_back(
          service.Start(std::move(generation), std::make_shared<PromptListener>(shared_from_this(), prompt)));
    }
    if (is_cancelled_) CancelStarted();
  }

 private:
  // Hears one of the request's prompts.
  class PromptListener : public GenerationListener {
   public:
    PromptListener(std::shared_ptr<Answer> answer, std::size_t prompt) : answer_(std::move(answer)), prompt_(prompt) {}
    void OnPrompt(const PromptInfo& prompt) override { answer_->OnPrompt(prompt_, prompt); }
    void OnChunk(OutputChunk chunk) override { answer_->OnChunk(prompt_, std::move(chunk)); }
    void OnDone(const absl::Status& status) override { answer_->OnDone(status); }

   private:
    const std::shared_ptr<Answer> answer_;
    const std::size_t prompt_;
  };

  struct Prompt {
    std::size_t first_choice = 0;
    std::size_t num_choices = 0;
    std::string echo;
    bool echoes_tokens = false;
    std::vector<std::int32_t> tokens;  // kept where the client wants them
    std::int64_t num_tokens = 0;
    std::int64_t num_cached = 0;
  };

  struct Choice {
    Choice(OpenAiKind kind, std::int64_t num_top) : logprobs(kind, num_top) {}
    LogprobsFormat logprobs;
    std::string text;  // streaming: not yet sent
    std::vector<std::int32_t> tokens;
    std::optional<OutputFinish> finish;
    bool is_begun = false;  // streaming: its first chunk was sent
  };

  void AddChoices(std::size_t prompt, const GenerationRequest& generation, int max_choices) {
    prompts_[prompt].first_choice = choices_.size();
    // A number out of range is refused by the Service.
    const bool is_sane = generation.n >= 1 && generation.n <= max_choices;
    prompts_[prompt].num_choices = is_sane ? static_cast<std::size_t>(generation.n) : 0;
    if (request_.echo) {
      const auto* text = std::get_if<std::string>(&generation.prompt);
      prompts_[prompt].echoes_tokens = text == nullptr;
      if (text != nullptr) prompts_[prompt].echo = *text;
    }
    for (std::size_t i = 0; i < prompts_[prompt].num_choices; ++i) {
      choices_.emplace_back(request_.kind, request_.logprobs.value_or(0));
    }
  }

  void CancelAll() {
    const std::lock_guard lock(mutex_);
    is_cancelled_ = true;
    CancelStarted();
  }
  void CancelStarted() {
    for (const auto& generation : generations_) generation->Cancel();
  }

  void OnPrompt(std::size_t index, const PromptInfo& info) {
    const std::lock_guard lock(mutex_);
    Prompt& prompt = prompts_[index];
    prompt.num_tokens = static_cast<std::int64_t>(info.tokens.size());
    if (request_.return_token_ids) prompt.tokens = info.tokens;
    if (prompt.echoes_tokens) prompt.echo = tokenizer_.Decode(info.tokens, SkipSpecial::kYes);
    for (std::size_t i = 0; i < prompt.num_choices; ++i) choices_[prompt.first_choice + i].text = prompt.echo;
    if (--num_unprompted_ > 0 || is_ended_ || !request_.stream) return;
    // Every prompt was taken: from here on, errors are events.
    HttpHeaders headers = options_.headers;
    headers.emplace_back("Cache-Control", "no-cache");
    exchange_->BeginStream("text/event-stream; charset=utf-8", headers);
    is_streaming_ = true;
    std::string events;
    for (std::size_t each = 0; each < prompts_.size(); ++each) {
      for (std::size_t i = 0; i < prompts_[each].num_choices; ++i)
        AppendChunk(events, each, prompts_[each].first_choice + i);
    }
    WriteEvents(events);
  }

  void OnChunk(std::size_t index, OutputChunk chunk) {
    const std::lock_guard lock(mutex_);
    Prompt& prompt = prompts_[index];
    const std::size_t at = prompt.first_choice + static_cast<std::size_t>(chunk.index);
    Choice& choice = choices_[at];
    choice.text += chunk.text;
    num_output_tokens_ += static_cast<std::int64_t>(chunk.tokens.size());
    for (const SampledToken& token : chunk.tokens) {
      if (request_.return_token_ids) choice.tokens.push_back(token.token);
      if (request_.logprobs) choice.logprobs.Add(tokenizer_, token);
    }
    if (chunk.finish) {
      prompt.num_cached = std::max<std::int64_t>(prompt.num_cached, chunk.finish->num_cached_tokens);
      choice.finish = std::move(chunk.finish);
    }
    if (!is_streaming_ || is_ended_) return;
    std::string events;
    AppendChunk(events, index, at);
    WriteEvents(events);
  }

  void OnDone(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    --num_unfinished_;
    if (is_ended_) return;
    if (!status.ok()) {
      if (options_.on_error) options_.on_error(status);
      CancelStarted();
      return EndWithError(status);
    }
    if (num_unfinished_ > 0) return;
    is_ended_ = true;
    if (!request_.stream) return exchange_->Send({.body = WholeBody(), .headers = options_.headers});
    std::string events;
    if (request_.include_usage) {
      absl::StrAppend(&events, "data: ", head_, "],");
      AppendUsage(events, Usage());
      events += "}\n\n";
    }
    events += "data: [DONE]\n\n";
    exchange_->Write(events);
    exchange_->End();
  }

  void EndWithError(const absl::Status& status) {
    is_ended_ = true;
    HttpResponse response = ErrorResponse(status);
    if (is_streaming_) {
      exchange_->Write(absl::StrCat("data: ", response.body, "\n\n"));
      exchange_->End();
    } else {
      response.headers.insert(response.headers.end(), options_.headers.begin(), options_.headers.end());
      exchange_->Send(std::move(response));
    }
  }

  void WriteEvents(const std::string& events) {
    // A peer that is gone or too slow is closed by the server, which cancels.
    if (!events.empty()) exchange_->Write(events);
  }

  UsageCounts Usage() const {
    UsageCounts usage{.completion_tokens = num_output_tokens_};
    for (const Prompt& prompt : prompts_) {
      usage.prompt_tokens += prompt.num_tokens;
      usage.cached_tokens += prompt.num_cached;
    }
    return usage;
  }

  // The events that tell what `choice` has gathered; nothing if that is nothing yet.
  void AppendChunk(std::string& out, std::size_t prompt, std::size_t index) {
    Choice& choice = choices_[index];
    const bool is_first = !std::exchange(choice.is_begun, true);
    const bool has_news =
        !choice.text.empty() || !choice.tokens.empty() || !choice.logprobs.is_empty() || choice.finish;
    if (is_chat_ && is_first) {
      absl::StrAppend(&out, "data: ", head_, R"({"index":)", index,
                      R"(,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null})");
      EndEvent(out, prompt);
    }
    if (!has_news && !(is_first && !is_chat_ && request_.return_token_ids)) return;
    absl::StrAppend(&out, "data: ", head_, R"({"index":)", index);
    if (is_chat_) {
      out += R"(,"delta":{)";
      if (!choice.text.empty()) {
        out += R"("content":)";
        AppendJsonString(out, choice.text);
      }
      out += "}";
    } else {
      out += R"(,"text":)";
      AppendJsonString(out, choice.text);
    }
    choice.text.clear();
    AppendRest(out, choice, is_chat_ || !is_first ? nullptr : &prompts_[prompt]);
    choice.tokens.clear();
    EndEvent(out, prompt);
  }

  void EndEvent(std::string& out, std::size_t prompt) {
    out += "]";
    if (is_chat_ && request_.return_token_ids && !std::exchange(has_told_prompt_, true)) {
      out += R"(,"prompt_token_ids":)";
      AppendTokenIds(out, prompts_[prompt].tokens);
    }
    if (request_.continuous_usage) {
      out += ",";
      AppendUsage(out, Usage());
    }
    out += "}\n\n";
  }

  // What both kinds of choices end with, the closing brace included.
  void AppendRest(std::string& out, Choice& choice, const Prompt* prompt) const {
    out += R"(,"logprobs":)";
    choice.logprobs.Take(out);
    out += ",";
    AppendFinish(out, choice.finish);
    if (request_.return_token_ids) {
      out += R"(,"token_ids":)";
      AppendTokenIds(out, choice.tokens);
      if (prompt != nullptr) {
        out += R"(,"prompt_token_ids":)";
        AppendTokenIds(out, prompt->tokens);
      }
    }
    out += "}";
  }

  std::string WholeBody() {
    std::string body = head_;
    for (const Prompt& prompt : prompts_) {
      for (std::size_t i = 0; i < prompt.num_choices; ++i) {
        const std::size_t index = prompt.first_choice + i;
        Choice& choice = choices_[index];
        absl::StrAppend(&body, index == 0 ? "" : ",", R"({"index":)", index,
                        is_chat_ ? R"(,"message":{"role":"assistant","content":)" : R"(,"text":)");
        AppendJsonString(body, choice.text);
        if (is_chat_) body += "}";
        AppendRest(body, choice, is_chat_ ? nullptr : &prompt);
      }
    }
    body += "],";
    AppendUsage(body, Usage());
    if (is_chat_ && request_.return_token_ids) {
      body += R"(,"prompt_token_ids":)";
      AppendTokenIds(body, prompts_.front().tokens);
    }
    body += "}";
    return body;
  }

  const Tokenizer& tokenizer_;
  OpenAiRequest request_;
  const AnswerOptions options_;
  const std::shared_ptr<HttpExchange> exchange_;
  const bool is_chat_;
  std::string head_;  // of the body and of every event

  std::mutex mutex_;  // generations of several prompts report on several threads
  std::size_t num_unprompted_;
  std::size_t num_unfinished_;
  std::vector<Prompt> prompts_;
  std::vector<Choice> choices_;
  std::vector<std::shared_ptr<Generation>> generations_;
  std::int64_t num_output_tokens_ = 0;
  bool is_streaming_ = false;  // the header is out
  bool is_ended_ = false;
  bool is_cancelled_ = false;
  bool has_told_prompt_ = false;
};

}  // namespace

void StartAnswer(Service& service, OpenAiRequest request, AnswerOptions options,
                 std::shared_ptr<HttpExchange> exchange) {
  std::make_shared<Answer>(service.tokenizer(), std::move(request), std::move(options), std::move(exchange))
      ->Start(service);
}

}  // namespace spillway
