#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <random>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/kv_layout.h"
#include "server/cost_model_json.h"
#include "server/frontend.h"
#include "server/http_server.h"
#include "server/openai_answer.h"
#include "server/openai_format.h"
#include "server/openai_json.h"
#include "server/openai_request.h"
#include "server/tenant.h"

namespace spillway {
namespace {

// Takes the same time whatever the two differ in, their lengths aside.
bool EqualInConstantTime(std::string_view a, std::string_view b) {
  unsigned char difference = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const char other = b.empty() ? '\0' : b[i % b.size()];
    difference =
        static_cast<unsigned char>(difference | (static_cast<unsigned char>(a[i]) ^ static_cast<unsigned char>(other)));
  }
  return difference == 0;
}

// May be part of an id and of a header.
bool IsPrintable(const std::string& text) {
  return std::ranges::all_of(text, [](char c) { return c > 0x20 && c < 0x7f && c != '"' && c != '\\'; });
}

// One request on its way through the endpoints.
struct Call {
  std::shared_ptr<HttpExchange> exchange;
  HttpHeaders headers;     // of every answer to it
  std::string request_id;  // X-Request-Id, empty: none
  std::string tenant;

  void Answer(HttpResponse response) const {
    response.headers.insert(response.headers.end(), headers.begin(), headers.end());
    exchange->Send(std::move(response));
  }
};

class OpenAiApi {
 public:
  OpenAiApi(Service& service, const ChatTemplate& chat_template, Metrics& metrics, const FrontendOptions& options)
      : service_(service), chat_template_(chat_template), metrics_(metrics), options_(options) {
    std::random_device entropy;
    id_prefix_ = absl::StrCat(absl::Hex(entropy(), absl::kZeroPad8), absl::Hex(entropy(), absl::kZeroPad8));
  }

  // On the server's thread.
  void Handle(HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
    const Route* route = nullptr;
    std::vector<std::string> allowed;
    for (const Route& each : Routes()) {
      if (request.path != each.path) continue;
      allowed.emplace_back(each.method);
      if (request.method == each.method) route = &each;
    }
    const bool is_known = !allowed.empty();
    exchange->OnFinished([this, handler = is_known ? request.path : std::string("none"),
                          method = route != nullptr ? request.method : std::string("other"),
                          started = std::chrono::steady_clock::now()](int status) {
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
      metrics_.OnHttpRequest(handler, method, status, seconds.count());
    });
    Call call{.exchange = std::move(exchange), .headers = {}, .request_id = {}, .tenant = {}};
    if (!request.request_id.empty() && request.request_id.size() <= 256 && IsPrintable(request.request_id)) {
      call.request_id = request.request_id;
      call.headers.emplace_back("X-Request-Id", request.request_id);
    }
    const Access access = route != nullptr                   ? route->access
                          : request.path.starts_with("/v1/") ? Access::kInference
                                                             : Access::kOpen;
    if (access == Access::kAdmin && !options_.is_admin_port && options_.admin_api_key.empty()) {
      return call.Answer(ErrorResponse(
          404,
          absl::StrCat(request.path, " is part of the control surface: start with --admin-api-key or --admin-port")));
    }
    const std::optional<std::size_t> key = KeyAmong(options_.api_keys, request);
    if (!MayCall(access, request, key.has_value())) {
      return call.Answer(ErrorResponse(401, absl::StrCat("a valid ", access == Access::kAdmin ? "admin" : "API",
                                                         " key is needed: Authorization: Bearer <key>")));
    }
    if (!is_known) return call.Answer(ErrorResponse(404, absl::StrCat("there is no endpoint ", request.path)));
    if (route == nullptr) {
      HttpResponse response = ErrorResponse(405, absl::StrCat(request.path, " does not answer ", request.method));
      response.headers.emplace_back("Allow", absl::StrJoin(allowed, ", "));
      return call.Answer(std::move(response));
    }
    call.tenant = TenantOf(request.fairness_id, key);
    (this->*route->handle)(std::move(request), std::move(call));
  }

 private:
  using Handler = void (OpenAiApi::*)(HttpRequest request, Call call);
  enum class Access : std::uint8_t { kOpen, kInference, kAdmin };  // who may call
  struct Route {
    const char* method;
    const char* path;
    Access access;
    Handler handle;
  };
  static std::span<const Route> Routes();

  bool MayCall(Access access, const HttpRequest& request, bool has_api_key) const {
    if (access == Access::kOpen) return true;
    if (access == Access::kAdmin) {
      return options_.is_admin_port || KeyAmong({options_.admin_api_key}, request).has_value();
    }
    return options_.api_keys.empty() || has_api_key;
  }
  // The position of the request's key among `keys`.
  static std::optional<std::size_t> KeyAmong(const std::vector<std::string>& keys, const HttpRequest& request) {
    constexpr std::string_view kScheme = "bearer ";
    std::string_view value = request.authorization;
    const bool has_scheme =
        value.size() >= kScheme.size() && std::ranges::equal(value.substr(0, kScheme.size()), kScheme, {}, [](char c) {
          return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
        });
    if (!has_scheme) return std::nullopt;
    value.remove_prefix(kScheme.size());
    std::optional<std::size_t> found;
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (EqualInConstantTime(value, keys[i])) found = i;
    }
    return found;
  }

  OnUnknownField UnknownFieldCounter() {
    return [this](const std::string& name) { metrics_.OnUnknownField(name); };
  }
  const std::string& served_name() const {
    static const std::string kNone;
    return service_.options().model_names.empty() ? kNone : service_.options().model_names.front();
  }

  // Parses the body on a Service thread and hands the document to `then`, whose error is the answer.
  template <typename Then>
  void WithBody(HttpRequest request, Call call, Then then) {
    service_.Post([this, body = std::move(request.body), call = std::move(call), then = std::move(then)]() mutable {
      const auto document = ParseJson(body, options_.max_json_depth);
      body = {};
      const absl::Status status = document.ok() ? then(*document, call) : document.status();
      if (!status.ok()) call.Answer(ErrorResponse(status));
    });
  }

  void Completions(HttpRequest request, Call call) {
    Generate(OpenAiKind::kCompletion, std::move(request), std::move(call));
  }
  void Chat(HttpRequest request, Call call) { Generate(OpenAiKind::kChat, std::move(request), std::move(call)); }

  void Generate(OpenAiKind kind, HttpRequest request, Call call) {
    WithBody(std::move(request), std::move(call), [this, kind](const Json& body, Call& caller) {
      auto read = ReadOpenAiRequest(kind, body, chat_template_, UnknownFieldCounter());
      if (!read.ok()) return read.status();
      if (absl::Status status = service_.CheckModel(read->model); !status.ok()) return status;
      for (GenerationRequest& generation : read->generations) generation.tenant = caller.tenant;
      std::string id = read->request_id;
      if (id.empty()) id = caller.request_id;
      if (id.empty()) {
        id = absl::StrCat(id_prefix_, absl::Hex(next_id_.fetch_add(1, std::memory_order_relaxed), absl::kZeroPad8));
      }
      AnswerOptions options{.id = absl::StrCat(kind == OpenAiKind::kChat ? "chatcmpl-" : "cmpl-", id),
                            .model = read->model.empty() ? served_name() : read->model,
                            .headers = caller.headers,
                            .on_error = [this](const absl::Status& status) {
                              if (absl::IsResourceExhausted(status)) metrics_.OnRejection("queue_full");
                              if (absl::IsUnavailable(status) && service_.is_alive()) metrics_.OnRejection("draining");
                            }};
      StartAnswer(service_, *std::move(read), std::move(options), caller.exchange);
      return absl::OkStatus();
    });
  }

  void Models(HttpRequest, Call call) {
    Json list = Json::array();
    const std::int64_t created = absl::ToUnixSeconds(started_);
    for (const std::string& name : service_.options().model_names) {
      list.push_back({{"id", name},
                      {"object", "model"},
                      {"created", created},
                      {"owned_by", "spillway"},
                      {"root", served_name()},
                      {"parent", nullptr},
                      {"max_model_len", service_.engine().options().max_model_len},
                      {"permission", Json::array()}});
    }
    call.Answer({.body = DumpJson({{"object", "list"}, {"data", list}}), .headers = {}});
  }

  void Health(HttpRequest, Call call) {
    if (service_.is_alive()) return call.Answer({.content_type = "", .body = "", .headers = {}});
    call.Answer(ErrorResponse(503, absl::StrCat("the engine is not running: ", service_.engine().status().failure)));
  }
  void Ready(HttpRequest, Call call) {
    if (service_.is_ready()) return call.Answer({.content_type = "", .body = "", .headers = {}});
    call.Answer(ErrorResponse(503, service_.is_alive() ? "the server is draining" : "the engine is not running"));
  }
  void Version(HttpRequest, Call call) {
    call.Answer({.body = R"({"version":")" SPILLWAY_VERSION R"("})", .headers = {}});
  }
  void Load(HttpRequest, Call call) {
    call.Answer({.body = absl::StrCat(R"({"server_load":)", service_.num_live(), "}"), .headers = {}});
  }
  void Scrape(HttpRequest, Call call) {
    call.Answer({.content_type = "text/plain; version=0.0.4; charset=utf-8", .body = metrics_.Render(), .headers = {}});
  }

  // Cached blocks of every tier go; those that running sequences hold stay, which the answer tells.
  void ResetPrefixCache(HttpRequest, Call call) {
    const bool was_idle = service_.engine().ResetPrefixCache();
    call.Answer({.body = DumpJson({{"success", was_idle}}), .headers = {}});
  }
  void ServerInfo(HttpRequest, Call call) {
    Json configuration = Json::object();
    for (const auto& [name, value] : options_.configuration) configuration[name] = value;
    const EngineStatus status = service_.engine().status();
    call.Answer({.body = DumpJson({{"version", SPILLWAY_VERSION},
                                   {"configuration", std::move(configuration)},
                                   {"data_parallel_size", options_.data_parallel_size},
                                   {"kv_blocks", status.kv_blocks_total},
                                   {"kv_block_tokens", kBlockTokens},
                                   {"max_model_len", service_.engine().options().max_model_len}}),
                 .headers = {}});
  }

  void ShowCostModel(HttpRequest, Call call) {
    const EngineStatus status = service_.engine().status();
    if (!status.cost_model) return call.Answer(ErrorResponse(404, "this engine has no cost model"));
    call.Answer({.body = CostModelJson(status).dump(), .headers = {}});
  }

  void Tokenize(HttpRequest request, Call call) {
    WithBody(std::move(request), std::move(call), [this](const Json& body, Call& caller) {
      const auto read = ReadTokenizeRequest(body, chat_template_, UnknownFieldCounter());
      if (!read.ok()) return read.status();
      if (absl::Status status = service_.CheckModel(read->model); !status.ok()) return status;
      const auto tokens = service_.tokenizer().Encode(read->text, read->special_tokens);
      if (!tokens.ok()) return tokens.status();
      std::string text = absl::StrCat(R"({"count":)", tokens->size(), R"(,"max_model_len":)",
                                      service_.engine().options().max_model_len, R"(,"tokens":)");
      AppendTokenIds(text, *tokens);
      text += R"(,"token_strs":)";
      if (read->return_token_strings) {
        for (std::size_t i = 0; i < tokens->size(); ++i) {
          text += i == 0 ? "[" : ",";
          AppendJsonString(text, service_.tokenizer().TokenText((*tokens)[i]));
        }
        text += tokens->empty() ? "[]" : "]";
      } else {
        text += "null";
      }
      text += "}";
      caller.Answer({.body = std::move(text), .headers = {}});
      return absl::OkStatus();
    });
  }

  void Detokenize(HttpRequest request, Call call) {
    WithBody(std::move(request), std::move(call), [this](const Json& body, Call& caller) {
      const auto read = ReadDetokenizeRequest(body, UnknownFieldCounter());
      if (!read.ok()) return read.status();
      if (absl::Status status = service_.CheckModel(read->model); !status.ok()) return status;
      const std::int32_t vocab = service_.tokenizer().vocab_size();
      std::vector<std::int32_t> tokens;
      for (const std::int64_t id : read->tokens) {
        if (id < 0 || id >= vocab) {
          return InvalidField("tokens", absl::StrCat("token ", id, " is not in the vocabulary of ", vocab, " tokens"));
        }
        tokens.push_back(static_cast<std::int32_t>(id));
      }
      std::string text = R"({"prompt":)";
      AppendJsonString(text, service_.tokenizer().Decode(tokens, SkipSpecial::kNo));
      text += "}";
      caller.Answer({.body = std::move(text), .headers = {}});
      return absl::OkStatus();
    });
  }

  Service& service_;
  const ChatTemplate& chat_template_;
  Metrics& metrics_;
  const FrontendOptions options_;
  const absl::Time started_ = absl::Now();
  std::string id_prefix_;
  std::atomic<std::uint64_t> next_id_ = 0;
};

std::span<const OpenAiApi::Route> OpenAiApi::Routes() {
  static constexpr Route kRoutes[] = {
      {"POST", "/v1/completions", Access::kInference, &OpenAiApi::Completions},
      {"POST", "/v1/chat/completions", Access::kInference, &OpenAiApi::Chat},
      {"GET", "/v1/models", Access::kInference, &OpenAiApi::Models},
      {"POST", "/tokenize", Access::kInference, &OpenAiApi::Tokenize},
      {"POST", "/detokenize", Access::kInference, &OpenAiApi::Detokenize},
      {"GET", "/health", Access::kOpen, &OpenAiApi::Health},
      {"GET", "/ready", Access::kOpen, &OpenAiApi::Ready},
      {"GET", "/ping", Access::kOpen, &OpenAiApi::Health},
      {"POST", "/ping", Access::kOpen, &OpenAiApi::Health},
      {"GET", "/version", Access::kOpen, &OpenAiApi::Version},
      {"GET", "/load", Access::kOpen, &OpenAiApi::Load},
      {"GET", "/metrics", Access::kOpen, &OpenAiApi::Scrape},
      {"POST", "/reset_prefix_cache", Access::kAdmin, &OpenAiApi::ResetPrefixCache},
      {"GET", "/server_info", Access::kAdmin, &OpenAiApi::ServerInfo},
      {"GET", "/spillway/cost_model", Access::kAdmin, &OpenAiApi::ShowCostModel},
  };
  return kRoutes;
}

class HttpFrontend : public Frontend {
 public:
  HttpFrontend(Service& service, const ChatTemplate& chat_template, Metrics& metrics, const FrontendOptions& options)
      : api_(service, chat_template, metrics, options) {}
  absl::Status Listen(const FrontendOptions& options, std::size_t max_pending_bytes) {
    auto server = HttpServer::Make(
        {.frontend = options,
         .max_pending_bytes = max_pending_bytes,
         .handle =
             [this](HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
               api_.Handle(std::move(request), std::move(exchange));
             },
         .make_error = [](int status, const std::string& message) { return ErrorResponse(status, message); }});
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    return absl::OkStatus();
  }
  std::uint16_t port() const override { return server_->port(); }
  void Stop(absl::Time deadline) override { server_->Stop(deadline); }

 private:
  OpenAiApi api_;
  std::unique_ptr<HttpServer> server_;  // stops before the API it calls goes
};

}  // namespace

absl::StatusOr<std::unique_ptr<Frontend>> MakeHttpFrontend(Service& service, const ChatTemplate& chat_template,
                                                           Metrics& metrics, const FrontendOptions& options) {
  auto frontend = std::make_unique<HttpFrontend>(service, chat_template, metrics, options);
  if (absl::Status status = frontend->Listen(options, service.options().max_pending_bytes); !status.ok()) return status;
  return frontend;
}

}  // namespace spillway
