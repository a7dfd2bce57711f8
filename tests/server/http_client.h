#pragma once

// A blocking HTTP client on a loopback socket, as rude as a test wants it to be; and a server over a FakeEngine.

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/chat_template.h"
#include "server/frontend.h"
#include "server/metrics.h"
#include "server/service.h"
#include "tests/support/fake_engine.h"

namespace spillway {

struct ClientResponse {
  int status = 0;  // 0: the connection ended before a whole response
  std::string head;
  std::string body;

  std::string Header(std::string_view name) const {
    for (std::size_t at = head.find("\r\n"); at != std::string::npos; at = head.find("\r\n", at + 2)) {
      const std::string_view line = std::string_view(head).substr(at + 2);
      if (line.size() <= name.size() || line[name.size()] != ':') continue;
      const bool is_it = std::ranges::equal(line.substr(0, name.size()), name, {}, ::tolower, ::tolower);
      if (is_it) return std::string(line.substr(name.size() + 2, line.find("\r\n") - name.size() - 2));
    }
    return "";
  }
  nlohmann::json Json() const { return nlohmann::json::parse(body, nullptr, false); }
};

class Client {
 public:
  explicit Client(std::uint16_t port, int receive_buffer = 0) : socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    const timeval patience{.tv_sec = 60, .tv_usec = 0};  // a server that hangs fails the test, not the machine
    ::setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    const int one = 1;
    ::setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    if (receive_buffer > 0) ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof(receive_buffer));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    is_connected_ = ::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  }
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;
  Client(Client&& other) noexcept
      : socket_(std::exchange(other.socket_, -1)),
        is_connected_(other.is_connected_),
        input_(std::move(other.input_)) {}
  ~Client() { Close(); }

  bool is_connected() const { return is_connected_; }
  void Close() {
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  }

  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<std::size_t>(sent));
    }
    return true;
  }
  static std::string Format(std::string_view method, std::string_view path, std::string_view body,
                            std::string_view headers = "") {
    std::string text = absl::StrCat(std::string(method), " ", std::string(path), " HTTP/1.1\r\nHost: x\r\n");
    text += headers;
    absl::StrAppend(&text, "Content-Length: ", body.size(), "\r\n\r\n");
    text += body;
    return text;
  }
  void SendPost(std::string_view path, std::string_view body, std::string_view headers = "") {
    Send(Format("POST", path, body, headers));
  }
  ClientResponse Post(std::string_view path, std::string_view body, std::string_view headers = "") {
    SendPost(path, body, headers);
    return Read();
  }
  ClientResponse Get(std::string_view path, std::string_view headers = "") {
    Send(Format("GET", path, "", headers));
    return Read();
  }

  // One response, whole.
  ClientResponse Read() {
    ClientResponse response = ReadHead();
    if (response.status == 0) return response;
    if (response.Header("Transfer-Encoding") == "chunked") {
      while (auto chunk = ReadChunk()) response.body += *chunk;
    } else if (const std::string length = response.Header("Content-Length"); !length.empty()) {
      std::size_t size = 0;
      std::from_chars(length.data(), length.data() + length.size(), size);
      while (input_.size() < size && Receive()) {
      }
      response.body = input_.substr(0, size);
      input_.erase(0, size);
    } else {
      response.body = ReadAll();
    }
    return response;
  }
  ClientResponse ReadHead() {
    ClientResponse response;
    std::size_t end = 0;
    while ((end = input_.find("\r\n\r\n")) == std::string::npos) {
      if (!Receive()) return response;
    }
    response.head = input_.substr(0, end + 2);
    input_.erase(0, end + 4);
    const std::size_t space = response.head.find(' ');
    std::from_chars(response.head.data() + space + 1, response.head.data() + response.head.size(), response.status);
    return response;
  }
  // Nothing: the last chunk, or the end of the connection.
  std::optional<std::string> ReadChunk() {
    std::size_t end = 0;
    while ((end = input_.find("\r\n")) == std::string::npos) {
      if (!Receive()) return std::nullopt;
    }
    std::size_t size = 0;
    std::from_chars(input_.data(), input_.data() + end, size, 16);
    while (input_.size() < end + 2 + size + 2) {
      if (!Receive()) return std::nullopt;
    }
    std::string chunk = input_.substr(end + 2, size);
    input_.erase(0, end + 2 + size + 2);
    if (size == 0) return std::nullopt;
    return chunk;
  }
  std::string ReadAll() {  // until the server closes
    while (Receive()) {
    }
    return std::exchange(input_, {});
  }

 private:
  bool Receive() {
    char buffer[16384];
    const ssize_t received = ::recv(socket_, buffer, sizeof(buffer), 0);
    if (received <= 0) return false;
    input_.append(buffer, static_cast<std::size_t>(received));
    return true;
  }

  int socket_;
  bool is_connected_ = false;
  std::string input_;
};

// The payloads of server-sent events; "[DONE]" included.
inline std::vector<std::string> Events(std::string_view stream) {
  std::vector<std::string> events;
  constexpr std::string_view kPrefix = "data: ";
  while (stream.starts_with(kPrefix)) {
    const std::size_t end = stream.find("\n\n");
    if (end == std::string_view::npos) break;
    events.emplace_back(stream.substr(kPrefix.size(), end - kPrefix.size()));
    stream.remove_prefix(end + 2);
  }
  if (!stream.empty()) events.emplace_back("left over: " + std::string(stream));
  return events;
}

// An HTTP front end over a FakeEngine.
struct TestServer {
  struct Options {
    FakeEngineOptions engine;
    ServiceOptions service;
    FrontendOptions frontend;
    std::vector<std::string> special_tokens;
  };
  explicit TestServer(const std::function<void(Options&)>& change = nullptr) {
    Options options;
    if (change) change(options);
    tokenizer = std::make_unique<FakeTokenizer>(options.special_tokens);
    metrics = Metrics::Make("fake", options.engine.engine.max_model_len);
    options.engine.observer = &metrics->ObserverOf(0);
    if (options.service.model_names.empty()) options.service.model_names = {"fake", "alias"};
    engine = std::make_unique<FakeEngine>(std::move(options.engine));
    metrics->Attach(0, *engine);
    service = Service::Make(*engine, *tokenizer, options.service);
    chat_template = MakeChatTemplate(*tokenizer);
    auto made = MakeHttpFrontend(*service, *chat_template, *metrics, options.frontend);
    EXPECT_TRUE(made.ok()) << made.status();
    frontend = *std::move(made);
  }
  Client Connect(int receive_buffer = 0) const { return Client(frontend->port(), receive_buffer); }

  std::unique_ptr<FakeTokenizer> tokenizer;
  std::unique_ptr<Metrics> metrics;
  std::unique_ptr<FakeEngine> engine;
  std::unique_ptr<Service> service;
  std::unique_ptr<ChatTemplate> chat_template;
  std::unique_ptr<Frontend> frontend;
};

}  // namespace spillway
