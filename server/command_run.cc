#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <iterator>

#include "server/await_generation.h"
#include "server/commands.h"
#include "server/engine_host.h"
#include "server/log.h"

namespace spillway {
namespace {

GenerationRequest RequestOf(const PromptChoice& choice) {
  GenerationRequest request;
  request.temperature = choice.temperature;
  request.top_p = choice.top_p;
  request.min_p = choice.min_p;
  request.top_k = choice.top_k;
  request.seed = choice.seed;
  request.max_tokens = choice.max_tokens;
  return request;
}

// Streams the answer to standard output.
absl::StatusOr<std::string> Answer(Service& service, GenerationRequest request) {
  auto result = AwaitGeneration(service, std::move(request), [](const OutputChunk& chunk) {
    fmt::print("{}", chunk.text);
    std::fflush(stdout);
  });
  fmt::print("\n");
  if (!result.ok()) return result.status();
  return result->choices.front().text;
}

int Fail(const absl::Status& status) {
  Log(LogLevel::kError, std::string(status.message()));
  return kExitFailed;
}

int Complete(EngineHost& host, const Options& options, std::string prompt) {
  GenerationRequest request = RequestOf(options.prompt);
  request.prompt = std::move(prompt);
  const absl::StatusOr<std::string> answer = Answer(*host.service, std::move(request));
  return answer.ok() ? 0 : Fail(answer.status());
}

int Chat(EngineHost& host, const Options& options) {
  fmt::print(stderr, "Chat with {} ({} format). An empty line or Ctrl-D ends it.\n",
             host.service->options().model_names.front(), host.chat_template->name());
  std::vector<ChatMessage> messages;
  for (std::string line; fmt::print(stderr, "> "), std::getline(std::cin, line) && !line.empty();) {
    messages.push_back({"user", line});
    const auto prompt = host.chat_template->Render(messages, /*add_generation_prompt=*/true);
    if (!prompt.ok()) return Fail(prompt.status());
    GenerationRequest request = RequestOf(options.prompt);
    request.prompt = *prompt;
    request.special_tokens = SpecialTokens::kNone;  // the format has its own
    const absl::StatusOr<std::string> answer = Answer(*host.service, std::move(request));
    if (!answer.ok()) return Fail(answer.status());
    messages.push_back({"assistant", *answer});
  }
  return 0;
}

}  // namespace

int RunCommand(const Options& options, const Environment& environment) {
  auto host = MakeEngineHost(options, environment);
  if (!host.ok()) return Fail(host.status());
  if (!options.prompt.prompt.empty()) return Complete(*host, options, options.prompt.prompt);
  if (::isatty(STDIN_FILENO) != 0) return Chat(*host, options);
  return Complete(*host, options, {std::istreambuf_iterator<char>(std::cin), {}});
}

}  // namespace spillway
