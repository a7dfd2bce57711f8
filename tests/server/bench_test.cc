// The load generator against a scripted HTTP server, and its report.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http.hpp>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "server/bench_report.h"
#include "server/load_generator.h"

namespace spillway {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using Tcp = asio::ip::tcp;
using nlohmann::json;

// Answers one connection at a time with three events of one token and usage; requests for model "bad" with 404.
class ScriptedServer {
 public:
  ScriptedServer() : acceptor_(io_, Tcp::endpoint(asio::ip::address_v4::loopback(), 0)), thread_([this] { Run(); }) {}
  ~ScriptedServer() {
    ::shutdown(acceptor_.native_handle(), SHUT_RDWR);
    thread_.join();
  }
  std::uint16_t port() { return acceptor_.local_endpoint().port(); }
  std::vector<json> bodies() {
    const std::lock_guard lock(mutex_);
    return bodies_;
  }

 private:
  void Run() {
    while (true) {
      boost::system::error_code error;
      Tcp::socket socket = acceptor_.accept(error);
      if (error) return;
      boost::beast::flat_buffer buffer;
      http::request<http::string_body> request;
      http::read(socket, buffer, request, error);
      if (error) continue;
      http::response<http::string_body> response(http::status::ok, 11);
      if (request.target() == "/v1/models") {
        response.body() = R"({"data": [{"id": "first"}]})";
      } else {
        const json body = json::parse(request.body());
        {
          const std::lock_guard lock(mutex_);
          bodies_.push_back(body);
        }
        if (body["model"] == "bad") {
          response.result(http::status::not_found);
          response.body() = "no such model";
        } else {
          for (int i = 0; i < 3; ++i) response.body() += "data: {\"choices\": [{\"text\": \"x\"}]}\n\n";
          response.body() +=
              "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 5, \"completion_tokens\": 3}}\r\n\r\n";
          response.body() += "data: [DONE]\n\n";
        }
      }
      response.prepare_payload();
      http::write(socket, response, error);
      socket.shutdown(Tcp::socket::shutdown_both, error);
    }
  }

  asio::io_context io_;
  Tcp::acceptor acceptor_;
  std::mutex mutex_;
  std::vector<json> bodies_;
  std::thread thread_;
};

LoadOptions OptionsFor(ScriptedServer& server) {
  LoadOptions options;
  options.host = "127.0.0.1";
  options.port = server.port();
  options.num_prompts = 8;
  options.request_rate = std::numeric_limits<double>::infinity();
  options.max_concurrency = 2;
  options.input_len = 5;
  options.output_len = 3;
  return options;
}

TEST(GenerateLoad, CountsWhatStreams) {
  ScriptedServer server;
  const LoadOptions options = OptionsFor(server);
  std::int64_t progress = 0;
  const auto result = GenerateLoad(options, [&](std::int64_t done, std::int64_t) { progress = done; });
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(progress, 8);
  EXPECT_EQ(result->model, "first");
  ASSERT_EQ(result->requests.size(), 8U);
  for (const LoadedRequest& request : result->requests) {
    EXPECT_EQ(request.error, "");
    EXPECT_EQ(request.output_tokens, 3);
    EXPECT_EQ(request.prompt_tokens, 5);
    EXPECT_EQ(request.inter_token_seconds.size(), 2U);
    EXPECT_GE(request.total_seconds, request.first_token_seconds);
  }
  const std::vector<json> bodies = server.bodies();
  ASSERT_EQ(bodies.size(), 8U);
  EXPECT_EQ(bodies[0]["prompt"].size(), 5U);
  EXPECT_EQ(bodies[0]["max_tokens"], 3);
  EXPECT_FALSE(bodies[0].contains("ignore_eos"));
  EXPECT_NE(bodies[0]["prompt"], bodies[1]["prompt"]);

  const auto report = ServeReport(options, *result, {50, 99.9});
  EXPECT_EQ(report["completed"], 8);
  EXPECT_EQ(report["failed"], 0);
  EXPECT_EQ(report["total_output_tokens"], 24);
  EXPECT_EQ(report["total_input_tokens"], 40);
  EXPECT_TRUE(report.contains("p99.9_ttft_ms"));
  EXPECT_TRUE(report.contains("median_itl_ms"));
  EXPECT_EQ(report["request_rate"], "inf");
}

TEST(GenerateLoad, KeepsTheServersRefusal) {
  ScriptedServer server;
  LoadOptions options = OptionsFor(server);
  options.model = "bad";
  options.num_prompts = 1;
  options.ignore_eos = true;
  options.request_rate = 1000;
  const auto result = GenerateLoad(options, nullptr);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->requests[0].error, "status 404: no such model");
  EXPECT_EQ(server.bodies()[0]["ignore_eos"], true);
  EXPECT_EQ(ServeReport(options, *result, {99})["failed"], 1);
}

TEST(GenerateLoad, FailsWithoutAServer) {
  std::uint16_t port = 0;
  {
    ScriptedServer server;
    port = server.port();
  }
  LoadOptions options;
  options.host = "127.0.0.1";
  options.port = port;
  EXPECT_THAT(std::string(GenerateLoad(options, nullptr).status().message()), ::testing::HasSubstr("connect: "));
}

TEST(BenchReport, PercentilesAreLinear) {
  EXPECT_EQ(Percentile({}, 50), 0);
  EXPECT_EQ(Percentile({4}, 99), 4);
  EXPECT_DOUBLE_EQ(Percentile({1, 2, 3, 4}, 50), 2.5);
  EXPECT_DOUBLE_EQ(Percentile({4, 1, 3, 2}, 100), 4);
  EXPECT_THAT(*ParsePercentiles("50,99.9"), ::testing::ElementsAre(50, 99.9));
  for (const char* bad : {"", "a", "101", "50,", "-1"}) EXPECT_FALSE(ParsePercentiles(bad).ok()) << bad;
}

}  // namespace
}  // namespace spillway
