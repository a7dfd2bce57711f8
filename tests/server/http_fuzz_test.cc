// Seeded mutations of request bodies and of raw HTTP: whatever comes, the server answers or closes, and goes on
// serving.

#include <gtest/gtest.h>

#include <random>
#include <thread>

#include "tests/server/http_client.h"

namespace spillway {
namespace {

class Mutator {
 public:
  explicit Mutator(std::uint32_t seed) : random_(seed) {}
  std::uint32_t Below(std::size_t bound) { return static_cast<std::uint32_t>(random_() % bound); }

  std::string Mutate(std::string text) {
    static const std::vector<std::string> kPieces = {"null",
                                                     "true",
                                                     "-1",
                                                     "1e999",
                                                     "\"\"",
                                                     "{}",
                                                     "[]",
                                                     "[[",
                                                     "}}",
                                                     "\\u0000",
                                                     "\xff",
                                                     "\xc3",
                                                     "99999999999999999999",
                                                     ",",
                                                     ":",
                                                     "\"n\":",
                                                     "\r\n",
                                                     " "};
    for (std::uint32_t count = 1 + Below(4); count > 0; --count) {
      const std::size_t at = Below(text.size() + 1);
      switch (Below(5)) {
        case 0:
          text.insert(at, kPieces[Below(kPieces.size())]);
          break;
        case 1:
          text.erase(at, Below(8));
          break;
        case 2:
          if (at < text.size()) text[at] = static_cast<char>(Below(256));
          break;
        case 3:
          text.insert(at, text.substr(Below(text.size() + 1), Below(16)));
          break;
        default:
          text.resize(at);
          break;
      }
    }
    return text;
  }

 private:
  std::mt19937 random_;
};

TEST(HttpFuzz, Bodies) {
  TestServer server([](auto& options) { options.engine.engine.max_model_len = 64; });
  Mutator mutator(1);
  const std::vector<std::pair<const char*, std::string>> seeds = {
      {"/v1/completions",
       R"({"model": "fake", "prompt": ["a", "b"], "n": 2, "stop": ["x", "yz"], "logprobs": 2, "seed": 3})"},
      {"/v1/completions",
       R"({"prompt": [1, 2, 3], "stream": true, "stream_options": {"include_usage": true}, "echo": true})"},
      {"/v1/chat/completions",
       R"({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "max_tokens": 4})"},
      {"/tokenize", R"({"prompt": "h\u00e9llo", "add_special_tokens": false})"},
      {"/detokenize", R"({"tokens": [104, 105, 256]})"}};
  Client client = server.Connect();
  std::map<int, int> counts;
  for (int round = 0; round < 6000; ++round) {
    const auto& [path, body] = seeds[mutator.Below(seeds.size())];
    const ClientResponse response = client.Post(path, mutator.Mutate(body));
    ++counts[response.status];
    ASSERT_TRUE(response.status == 200 || response.status == 400 || response.status == 404)
        << round << ": " << response.status;
    if (response.status != 200) {
      ASSERT_TRUE(response.Json()["error"]["message"].is_string());
    }
  }
  EXPECT_GT(counts[200], 100);
  EXPECT_GT(counts[400], 1000);
  EXPECT_EQ(client.Get("/load").Json()["server_load"], 0);
}

TEST(HttpFuzz, RawBytes) {
  TestServer server([](auto& options) {
    options.engine.engine.max_model_len = 64;
    options.frontend.header_timeout = absl::Milliseconds(200);
    options.frontend.idle_timeout = absl::Milliseconds(200);
  });
  Mutator mutator(2);
  const std::vector<std::string> seeds = {
      Client::Format("POST", "/v1/completions", R"({"prompt": "hi"})", "Connection: close\r\n"),
      Client::Format("POST", "/v1/completions", R"({"prompt": "hi", "stream": true})", "Connection: close\r\n"),
      "GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
      "POST /tokenize HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{\"prompt\": "
      "\"abc\"}\r\n0\r\n\r\n",
      "GET /version HTTP/1.0\r\n\r\nGET /version HTTP/1.0\r\n\r\n"};
  std::vector<Client> clients;
  for (int round = 0; round < 1500; ++round) {
    clients.push_back(server.Connect());
    clients.back().Send(mutator.Mutate(seeds[mutator.Below(seeds.size())]));
    if (mutator.Below(4) == 0) clients.back().Close();
    if (clients.size() == 100) {
      for (Client& client : clients) client.ReadAll();  // ends by an answer or by a timeout
      clients.clear();
    }
  }
  while (server.Connect().Get("/health").status != 200)
    std::this_thread::yield();  // a busy machine may miss the timeout
}

}  // namespace
}  // namespace spillway
