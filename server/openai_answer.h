#pragma once

// One answer to /v1/completions or /v1/chat/completions: starts the generations of a request and turns what they report
// into a body or into server-sent events.

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "server/http_server.h"
#include "server/openai_request.h"
#include "server/service.h"

namespace spillway {

struct AnswerOptions {
  std::string id;     // of the response, with its prefix
  std::string model;  // as reported
  HttpHeaders headers;
  // A generation was refused or has failed.
  std::function<void(const absl::Status&)> on_error;
};

// Keeps itself alive until the generations are done. If the peer goes, they are cancelled.
void StartAnswer(Service& service, OpenAiRequest request, AnswerOptions options,
                 std::shared_ptr<HttpExchange> exchange);

}  // namespace spillway
