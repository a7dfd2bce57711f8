#include "server/load_generator.h"

#include <fmt/format.h>

#include <array>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/connect.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string_view>
#include <utility>

// g++ 12 takes the coroutine frames' own operator new and delete for a mismatch.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"

namespace spillway {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using Clock = std::chrono::steady_clock;
using Tcp = asio::ip::tcp;
using nlohmann::json;

constexpr auto kAwait = asio::as_tuple(asio::use_awaitable);

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

// Ids that every vocabulary has; what they mean does not matter.
std::vector<std::int32_t> RandomPrompt(std::int64_t length, std::mt19937_64& random) {
  std::uniform_int_distribution<std::int32_t> token(16, 255);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(length));
  for (std::int32_t& each : tokens) each = token(random);
  return tokens;
}

http::request<http::string_body> MakeRequest(const LoadOptions& options, http::verb verb, std::string target,
                                             std::string body) {
  http::request<http::string_body> request(verb, target, 11);
  request.set(http::field::host, fmt::format("{}:{}", options.host, options.port));
  request.set(http::field::connection, "close");
  if (!options.api_key.empty()) request.set(http::field::authorization, "Bearer " + options.api_key);
  if (verb == http::verb::post) request.set(http::field::content_type, "application/json");
  request.body() = std::move(body);
  request.prepare_payload();
  return request;
}

// Events of an SSE stream, fed with bytes as they come.
class EventStream {
 public:
  template <typename OnData>
  void Feed(std::string_view bytes, OnData on_data) {
    buffer_.append(bytes);
    std::size_t begin = 0;
    for (std::size_t end = 0; (end = buffer_.find('\n', begin)) != std::string::npos; begin = end + 1) {
      std::string_view line(buffer_.data() + begin, end - begin);
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (line.starts_with("data:")) on_data(line.substr(line.starts_with("data: ") ? 6 : 5));
    }
    buffer_.erase(0, begin);
  }

 private:
  std::string buffer_;
};

class LoadRun {
 public:
  LoadRun(const LoadOptions& options, const std::function<void(std::int64_t, std::int64_t)>& progress)
      : options_(options), progress_(progress), random_(options.seed), slot_(io_) {}

  absl::StatusOr<LoadResult> Run() {
    absl::Status failure;
    asio::co_spawn(io_, Main(failure), asio::detached);
    io_.run();
    if (!failure.ok()) return failure;
    return std::move(result_);
  }

 private:
  using Response = std::function<void(std::string_view)>;

  asio::awaitable<void> Main(absl::Status& failure) {
    boost::system::error_code error;
    Tcp::resolver resolver(io_);
    endpoints_ = resolver.resolve(options_.host, std::to_string(options_.port), error);
    if (error) {
      failure = absl::NotFoundError(fmt::format("--host '{}': {}", options_.host, error.message()));
      co_return;
    }
    result_.model = options_.model;
    if (result_.model.empty()) {
      std::string body;
      const std::string problem = co_await Exchange(MakeRequest(options_, http::verb::get, "/v1/models", ""),
                                                    [&body](std::string_view bytes) { body.append(bytes); });
      const json models = json::parse(body, nullptr, false);
      if (problem.empty() && models.is_object() && models.contains("data") && models["data"].is_array() &&
          !models["data"].empty() && models["data"][0].contains("id")) {
        result_.model = models["data"][0].value("id", "");
      } else {
        failure = absl::UnavailableError(fmt::format("no model at http://{}:{}/v1/models: {}", options_.host,
                                                     options_.port, problem.empty() ? body : problem));
        co_return;
      }
    }
    co_await Dispatch();
  }

  // Starts every request at its time, or later where max_concurrency holds it back.
  asio::awaitable<void> Dispatch() {
    result_.requests.resize(static_cast<std::size_t>(options_.num_prompts));
    std::exponential_distribution<double> gap(std::isinf(options_.request_rate) ? 1 : options_.request_rate);
    const Clock::time_point begin = Clock::now();
    Clock::time_point arrival = begin;
    asio::steady_timer timer(io_);
    for (LoadedRequest& request : result_.requests) {
      if (!std::isinf(options_.request_rate)) {
        arrival += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(gap(random_)));
        timer.expires_at(arrival);
        co_await timer.async_wait(kAwait);
      }
      while (options_.max_concurrency > 0 && num_open_ >= options_.max_concurrency) co_await SlotFreed();
      ++num_open_;
      asio::co_spawn(io_, Send(request), asio::detached);
    }
    while (num_open_ > 0) co_await SlotFreed();
    result_.seconds = Seconds(Clock::now() - begin);
  }

  asio::awaitable<void> SlotFreed() {
    slot_.expires_at(Clock::time_point::max());
    co_await slot_.async_wait(kAwait);
  }

  asio::awaitable<void> Send(LoadedRequest& request) {
    json body = {{"model", result_.model},
                 {"prompt", RandomPrompt(options_.input_len, random_)},
                 {"max_tokens", options_.output_len},
                 {"temperature", 0},
                 {"stream", true},
                 {"stream_options", {{"include_usage", true}}}};
    if (options_.ignore_eos) body["ignore_eos"] = true;
    request.prompt_tokens = options_.input_len;

    const Clock::time_point begin = Clock::now();
    Clock::time_point last = begin;
    bool has_first = false;
    EventStream events;
    const auto on_data = [&](std::string_view data) {
      if (data == "[DONE]") return;
      const json event = json::parse(data, nullptr, false);
      if (!event.is_object()) return;
      if (event.contains("error")) request.error = event["error"].dump();
      const Clock::time_point now = Clock::now();
      if (event.contains("choices") && !event["choices"].empty()) {
        if (has_first) {
          request.inter_token_seconds.push_back(Seconds(now - last));
        } else {
          request.first_token_seconds = Seconds(now - begin);
        }
        has_first = true;
        last = now;
      }
      if (event.contains("usage") && event["usage"].is_object()) {
        request.output_tokens = event["usage"].value("completion_tokens", std::int64_t{0});
        request.prompt_tokens = event["usage"].value("prompt_tokens", options_.input_len);
      }
    };
    const std::string problem =
        co_await Exchange(MakeRequest(options_, http::verb::post, "/v1/completions", body.dump()),
                          [&](std::string_view bytes) { events.Feed(bytes, on_data); });
    if (!problem.empty()) request.error = problem;
    if (request.error.empty() && !has_first) request.error = "the stream held no tokens";
    request.total_seconds = Seconds(last - begin);

    --num_open_;
    ++num_done_;
    if (progress_) progress_(num_done_, options_.num_prompts);
    slot_.cancel();
  }

  // One request on its own connection; the body's bytes go to `on_bytes` as they come. Returns what went wrong.
  asio::awaitable<std::string> Exchange(http::request<http::string_body> request, Response on_bytes) {
    Tcp::socket socket(io_);
    const auto [connect_error, endpoint] = co_await asio::async_connect(socket, endpoints_, kAwait);
    if (connect_error) co_return "connect: " + connect_error.message();
    socket.set_option(Tcp::no_delay(true));
    const auto [write_error, written] = co_await http::async_write(socket, request, kAwait);
    if (write_error) co_return "send: " + write_error.message();

    boost::beast::flat_buffer buffer;
    http::response_parser<http::buffer_body> parser;
    parser.body_limit(boost::none);
    const auto [header_error, header_bytes] = co_await http::async_read_header(socket, buffer, parser, kAwait);
    if (header_error) co_return "receive: " + header_error.message();
    const bool is_ok = parser.get().result() == http::status::ok;
    std::string refusal = is_ok ? "" : fmt::format("status {}: ", parser.get().result_int());
    std::array<char, 16384> bytes;
    while (!parser.is_done()) {
      parser.get().body().data = bytes.data();
      parser.get().body().size = bytes.size();
      const auto [error, count] = co_await http::async_read(socket, buffer, parser, kAwait);
      if (error && error != http::error::need_buffer) co_return "receive: " + error.message();
      const std::string_view received(bytes.data(), bytes.size() - parser.get().body().size);
      if (is_ok) {
        on_bytes(received);
      } else {
        refusal.append(received);
      }
    }
    co_return refusal;
  }

  const LoadOptions& options_;
  const std::function<void(std::int64_t, std::int64_t)>& progress_;
  std::mt19937_64 random_;
  asio::io_context io_{1};
  asio::steady_timer slot_;  // cancelled whenever a request has ended
  Tcp::resolver::results_type endpoints_;
  std::int64_t num_open_ = 0;
  std::int64_t num_done_ = 0;
  LoadResult result_;
};

}  // namespace

absl::StatusOr<LoadResult> GenerateLoad(const LoadOptions& options,
                                        const std::function<void(std::int64_t done, std::int64_t total)>& progress) {
  return LoadRun(options, progress).Run();
}

}  // namespace spillway
