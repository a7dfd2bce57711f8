#pragma once

// An asynchronous HTTP/1.1 server on one thread: connections, limits, timeouts, streaming answers. It knows no
// endpoint.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/frontend.h"

namespace spillway {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;
  std::string path;  // without the query
  std::string body;
  std::string authorization;  // the headers that someone reads
  std::string request_id;
  std::string fairness_id;  // the first of kFairnessHeaders
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  HttpHeaders headers;
};

// One request being answered: Send, or BeginStream, Write ..., End. Any thread; nothing blocks. What is written while
// the socket is busy leaves as one chunk. Dropping it unanswered closes the connection.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;
  virtual void Send(HttpResponse response) = 0;
  virtual void BeginStream(const std::string& content_type, const HttpHeaders& headers) = 0;
  virtual bool Write(
      std::string_view bytes) = 0;  // false: the peer is gone, or lets too much wait and is being dropped
  virtual void End() = 0;
  // `closed` runs at most once, on the server's thread (or at once, if it has happened): the peer went before the end.
  virtual void OnClosed(std::function<void()> closed) = 0;
  // `finished` runs once, before the last bytes leave, with the status; 499 if the peer went before there was one.
  virtual void OnFinished(std::function<void(int status)> finished) = 0;
};

struct HttpServerOptions {
  FrontendOptions frontend;
  std::size_t max_pending_bytes = 4U << 20U;  // of one stream
  // Called on the server's thread, must not block. Its exchanges may outlive it, not the server.
  std::function<void(HttpRequest request, std::shared_ptr<HttpExchange> exchange)> handle;
  // The body of an answer to what is not HTTP, or too large.
  std::function<HttpResponse(int status, const std::string& message)> make_error;
};

class HttpServer {
 public:
  static absl::StatusOr<std::unique_ptr<HttpServer>> Make(HttpServerOptions options);
  virtual ~HttpServer() = default;  // Stop at once, if not stopped
  virtual std::uint16_t port() const = 0;
  // Closes the listener and idle connections, lets answers end by `deadline`, closes the rest, and waits until every
  // exchange is dropped. Any thread, once.
  virtual void Stop(absl::Time deadline) = 0;
};

const char* HttpReason(int status);

}  // namespace spillway
