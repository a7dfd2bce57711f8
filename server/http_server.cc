#include "server/http_server.h"

#include <pthread.h>

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/beast/http/parser.hpp>
#include <chrono>
#include <future>
#include <optional>
#include <thread>
#include <unordered_set>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/http_exchange.h"
#include "server/tenant.h"

namespace spillway {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using asio::ip::tcp;
using boost::system::error_code;
using Clock = std::chrono::steady_clock;

constexpr auto kNever = Clock::time_point::max();
constexpr auto kLinger = std::chrono::seconds(1);  // after an answer that closes the connection

// A body that grows as bytes arrive: a Content-Length alone reserves nothing.
struct GrowingBody {
  using value_type = std::string;
  class reader {
   public:
    template <bool is_request, typename Fields>
    reader(http::header<is_request, Fields>&, value_type& body) : body_(body) {}
    void init(const boost::optional<std::uint64_t>&, error_code& error) { error = {}; }
    template <typename Buffers>
    std::size_t put(const Buffers& buffers, error_code& error) {
      error = {};
      for (auto it = asio::buffer_sequence_begin(buffers); it != asio::buffer_sequence_end(buffers); ++it) {
        body_.append(static_cast<const char*>(it->data()), it->size());
      }
      return asio::buffer_size(buffers);
    }
    void finish(error_code& error) { error = {}; }

   private:
    value_type& body_;
  };
};

using Parser = http::request_parser<GrowingBody>;

class Session;

// What sessions share. Its members are touched by the server's thread alone, except `io`.
struct Hub {
  explicit Hub(HttpServerOptions given) : options(std::move(given)) {}
  HttpServerOptions options;
  asio::io_context io{1};
  ExchangeCount exchanges;
  std::unordered_set<std::shared_ptr<Session>> sessions;
  std::function<void()> no_sessions;  // set while stopping
  bool is_stopping = false;
  std::array<char, 65536> scratch{};  // every session reads through it: an idle connection holds no buffer
};

// One connection. Server's thread only.
class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(Hub& hub, tcp::socket socket) : hub_(hub), socket_(std::move(socket)), timer_(hub.io) {}

  void Begin() {
    error_code ignored;
    socket_.non_blocking(true, ignored);
    socket_.set_option(tcp::no_delay(true), ignored);
    ReadNext(hub_.options.frontend.header_timeout);
  }

  bool is_idle() const { return !exchange_ && !parser_ && !is_writing_; }

  void Drop() {
    if (is_dropped_) return;
    is_dropped_ = true;
    const auto self = shared_from_this();
    error_code ignored;
    socket_.close(ignored);
    timer_.cancel();
    parser_.reset();
    if (const auto exchange = std::exchange(exchange_, nullptr)) exchange->Detach();
    hub_.sessions.erase(self);
    if (hub_.sessions.empty() && hub_.no_sessions) hub_.no_sessions();
  }

 private:
  void ReadNext(absl::Duration patience) {
    is_lingering_ = false;
    read_deadline_ = Clock::now() + absl::ToChronoNanoseconds(patience);
    Arm();
    Parse();
  }

  void AwaitReadable() {
    constexpr std::size_t kMaxAhead = 65536;  // of pipelined requests; beyond it the peer has to wait
    if (is_awaiting_ || is_dropped_ || (exchange_ && input_.size() >= kMaxAhead)) return;
    is_awaiting_ = true;
    socket_.async_wait(tcp::socket::wait_read, [self = shared_from_this()](error_code error) {
      self->is_awaiting_ = false;
      if (!self->is_dropped_) self->OnReadable(error);
    });
  }

  void OnReadable(error_code error) {
    if (error) return Drop();
    const std::size_t size = socket_.read_some(asio::buffer(hub_.scratch), error);
    if (error == asio::error::would_block) return AwaitReadable();
    if (error) return Drop();  // end of file too: who closes, even by half, does not wait for an answer
    if (is_lingering_) return AwaitReadable();
    input_.append(hub_.scratch.data(), size);
    if (exchange_) return AwaitReadable();
    Parse();
  }

  void Parse() {
    if (!input_.empty() && !parser_) {
      parser_.emplace();
      parser_->eager(true);
      parser_->header_limit(static_cast<std::uint32_t>(hub_.options.frontend.max_header_bytes));
      parser_->body_limit(hub_.options.frontend.max_body_bytes);
      read_deadline_ = Clock::now() + absl::ToChronoNanoseconds(hub_.options.frontend.header_timeout);
      Arm();
    }
    std::size_t used = 0;
    error_code error;
    while (used < input_.size() && !parser_->is_done()) {
      used += parser_->put(asio::buffer(input_) + used, error);
      if (error) break;
    }
    input_.erase(0, used);
    if (input_.empty()) input_ = {};
    if (error && error != http::error::need_more) return Refuse(error);
    if (parser_ && parser_->is_done()) return Handle();
    if (parser_ && parser_->is_header_done() && !is_continued_) {
      is_continued_ = true;
      if (boost::beast::iequals(parser_->get()[http::field::expect], "100-continue") && !is_writing_) {
        output_ = "HTTP/1.1 100 Continue\r\n\r\n";
        Write();
      }
    }
    AwaitReadable();
  }

  static std::string_view AsView(boost::beast::string_view text) { return {text.data(), text.size()}; }

  void Refuse(error_code error) {
    int status = 400;
    std::string message = absl::StrCat("not a valid HTTP request: ", error.message());
    const FrontendOptions& limits = hub_.options.frontend;
    if (error == http::error::header_limit) {
      status = 431;
      message = absl::StrCat("the header is larger than ", limits.max_header_bytes, " bytes");
    } else if (error == http::error::body_limit) {
      status = 413;
      message = absl::StrCat("the body is larger than ", limits.max_body_bytes, " bytes");
    }
    parser_.reset();
    input_ = {};
    StartExchange({.is_keep_alive = false})->Send(hub_.options.make_error(status, message));
  }

  void Handle() {
    auto& message = parser_->get();
    const std::string_view target = AsView(message.target());
    HttpRequest request{.method = std::string(AsView(message.method_string())),
                        .path = std::string(target.substr(0, target.find_first_of("?#"))),
                        .body = std::move(message.body()),
                        .authorization = std::string(AsView(message[http::field::authorization])),
                        .request_id = std::string(AsView(message["X-Request-Id"])),
                        .fairness_id = std::string(AsView(message[kFairnessHeaders[0]]))};
    if (request.fairness_id.empty()) request.fairness_id = AsView(message[kFairnessHeaders[1]]);
    QueuedExchange::Options options{.is_head = message.method() == http::verb::head,
                                    .is_keep_alive = message.keep_alive() && !hub_.is_stopping,
                                    .is_http10 = message.version() < 11};
    parser_.reset();
    auto exchange = StartExchange(std::move(options));
    AwaitReadable();
    hub_.options.handle(std::move(request), std::move(exchange));
  }

  std::shared_ptr<HttpExchange> StartExchange(QueuedExchange::Options options) {
    is_continued_ = false;
    read_deadline_ = kNever;
    options.max_pending_bytes = hub_.options.max_pending_bytes;
    options.wake = [&hub = hub_, session = weak_from_this()](QueuedExchange::Wake wake) {
      asio::post(hub.io, [session, wake] {
        const auto self = session.lock();
        if (!self || self->is_dropped_) return;
        wake == QueuedExchange::Wake::kDrop ? self->Drop() : self->Flush();
      });
    };
    exchange_ = std::make_shared<QueuedExchange>(std::move(options), hub_.exchanges);
    return exchange_;
  }

  void Flush() {
    if (is_writing_ || !exchange_) return;
    const QueuedExchange::Taken taken = exchange_->Take(output_);
    if (taken.is_ended) {
      exchange_ = nullptr;
      is_last_ = !taken.is_keep_alive;
      is_answered_ = true;
    }
    if (!output_.empty()) return Write();
    if (is_answered_) FinishAnswer();
  }

  void Write() {
    is_writing_ = true;
    num_written_ = 0;
    WriteSome();
  }

  void WriteSome() {
    write_deadline_ = Clock::now() + absl::ToChronoNanoseconds(hub_.options.frontend.write_timeout);
    Arm();
    socket_.async_write_some(asio::buffer(output_) + num_written_,
                             [self = shared_from_this()](error_code error, std::size_t size) {
                               if (!self->is_dropped_) self->OnWritten(error, size);
                             });
  }

  void OnWritten(error_code error, std::size_t size) {
    if (error) return Drop();
    num_written_ += size;
    if (num_written_ < output_.size()) return WriteSome();
    is_writing_ = false;
    write_deadline_ = kNever;
    constexpr std::size_t kKept = 1024;
    if (output_.capacity() > kKept) output_ = {};
    if (is_answered_) return FinishAnswer();
    Flush();
  }

  void FinishAnswer() {
    is_answered_ = false;
    if (!is_last_) {
      if (hub_.is_stopping && input_.empty()) return Drop();
      return ReadNext(hub_.options.frontend.idle_timeout);
    }
    // Closing with unread input would reset the connection and lose the answer: read until the peer has closed.
    error_code error;
    socket_.shutdown(tcp::socket::shutdown_send, error);
    if (error) return Drop();
    is_lingering_ = true;
    input_ = {};
    read_deadline_ = Clock::now() + kLinger;
    Arm();
    AwaitReadable();
  }

  // One timer for both deadlines; moving a deadline back costs nothing, it is looked at when the timer fires.
  void Arm() {
    const auto due = std::min(read_deadline_, write_deadline_);
    if (due >= armed_for_ || is_dropped_) return;
    armed_for_ = due;
    timer_.expires_at(due);
    timer_.async_wait([self = shared_from_this()](error_code error) {
      if (error || self->is_dropped_) return;
      self->armed_for_ = kNever;
      if (std::min(self->read_deadline_, self->write_deadline_) <= Clock::now()) return self->Drop();
      self->Arm();
    });
  }

  Hub& hub_;
  tcp::socket socket_;
  asio::steady_timer timer_;
  Clock::time_point read_deadline_ = kNever;
  Clock::time_point write_deadline_ = kNever;
  Clock::time_point armed_for_ = kNever;
  std::string input_;   // not yet parsed
  std::string output_;  // being written
  std::size_t num_written_ = 0;
  std::optional<Parser> parser_;              // of the request being read
  std::shared_ptr<QueuedExchange> exchange_;  // of the request being answered
  bool is_awaiting_ = false;
  bool is_writing_ = false;
  bool is_continued_ = false;
  bool is_answered_ = false;  // the bytes being written are its last
  bool is_last_ = false;
  bool is_lingering_ = false;
  bool is_dropped_ = false;
};

class AsioHttpServer : public HttpServer {
 public:
  explicit AsioHttpServer(HttpServerOptions options)
      : hub_(std::move(options)), acceptor_(hub_.io), retry_(hub_.io), work_(asio::make_work_guard(hub_.io)) {}
  ~AsioHttpServer() override { Stop(absl::InfinitePast()); }

  absl::Status Listen() {
    const FrontendOptions& options = hub_.options.frontend;
    const auto failed = [&](const char* what, const error_code& error) {
      return absl::UnavailableError(
          absl::StrCat("HTTP: cannot ", what, " ", options.host, ":", options.port, ": ", error.message()));
    };
    error_code error;
    const auto found = tcp::resolver(hub_.io).resolve(options.host, absl::StrCat(options.port),
                                                      tcp::resolver::passive | tcp::resolver::numeric_service, error);
    if (error || found.empty()) return failed("resolve", error);
    const tcp::endpoint endpoint = *found.begin();
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (error) return failed("bind", error);
    acceptor_.listen(asio::socket_base::max_listen_connections, error);
    if (error) return failed("listen on", error);
    port_ = acceptor_.local_endpoint(error).port();
    Accept();
    thread_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "http");
      hub_.io.run();
    });
    return absl::OkStatus();
  }

  std::uint16_t port() const override { return port_; }

  void Stop(absl::Time deadline) override {
    if (!thread_.joinable()) return;
    std::promise<void> closed;
    asio::post(hub_.io, [this, &closed] {
      hub_.is_stopping = true;
      hub_.no_sessions = [this, &closed] {
        hub_.no_sessions = nullptr;
        closed.set_value();
      };
      error_code ignored;
      acceptor_.close(ignored);
      retry_.cancel();
      const auto sessions = hub_.sessions;
      for (const auto& session : sessions) {
        if (session->is_idle()) session->Drop();
      }
      if (hub_.sessions.empty() && hub_.no_sessions) hub_.no_sessions();
    });
    std::future<void> all_closed = closed.get_future();
    const bool in_time =
        deadline == absl::InfiniteFuture() ||
        (deadline > absl::Now() && all_closed.wait_until(absl::ToChronoTime(deadline)) == std::future_status::ready);
    if (!in_time) {
      asio::post(hub_.io, [this] {
        const auto sessions = hub_.sessions;
        for (const auto& session : sessions) session->Drop();
      });
    }
    all_closed.wait();
    hub_.exchanges.AwaitNone();
    work_.reset();
    thread_.join();
  }

 private:
  void Accept() {
    acceptor_.async_accept([this](error_code error, tcp::socket socket) {
      if (hub_.is_stopping || error == asio::error::operation_aborted) return;
      if (error) {  // out of descriptors: some will be closed
        retry_.expires_after(std::chrono::milliseconds(50));
        retry_.async_wait([this](error_code cancelled) {
          if (!cancelled) Accept();
        });
        return;
      }
      if (hub_.sessions.size() < static_cast<std::size_t>(hub_.options.frontend.max_connections)) {
        (*hub_.sessions.insert(std::make_shared<Session>(hub_, std::move(socket))).first)->Begin();
      } else {
        constexpr std::string_view kFull =
            "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
        socket.non_blocking(true, error);
        socket.write_some(asio::buffer(kFull), error);
      }
      Accept();
    });
  }

  Hub hub_;
  tcp::acceptor acceptor_;
  asio::steady_timer retry_;
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::uint16_t port_ = 0;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Make(HttpServerOptions options) {
  auto server = std::make_unique<AsioHttpServer>(std::move(options));
  if (absl::Status status = server->Listen(); !status.ok()) return status;
  return server;
}

}  // namespace spillway
