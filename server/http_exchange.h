#pragma once

// The half of an answer that other threads write to, and the half that its session takes bytes from.

#include <condition_variable>
#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "server/http_server.h"

namespace spillway {

// How many exchanges exist. Stop waits for none.
class ExchangeCount {
 public:
  void Add();
  void Remove();
  void AwaitNone();

 private:
  std::mutex mutex_;
  std::condition_variable none_;
  std::int64_t count_ = 0;
};

class QueuedExchange : public HttpExchange {
 public:
  enum class Wake : std::uint8_t { kFlush, kDrop };
  struct Options {
    bool is_head = false;  // the answer has no body
    bool is_keep_alive = true;
    bool is_http10 = false;  // streams end with the connection
    std::size_t max_pending_bytes = 0;
    // Asks the session to call Take, or to drop the connection. Called under the lock, never after Detach.
    std::function<void(Wake)> wake{};
  };
  QueuedExchange(Options options, ExchangeCount& count);
  ~QueuedExchange() override;

  void Send(HttpResponse response) override;
  void BeginStream(const std::string& content_type, const HttpHeaders& headers) override;
  bool Write(std::string_view bytes) override;
  void End() override;
  void OnClosed(std::function<void()> closed) override;
  void OnFinished(std::function<void(int status)> finished) override;

  // The session's side.
  struct Taken {
    bool is_ended = false;
    bool is_keep_alive = false;  // once it has ended
  };
  Taken Take(std::string& bytes);  // replaces `bytes`; they count as pending until the next Take
  void Detach();                   // the connection is gone

 private:
  void AppendHead(int status, const std::string& content_type, const HttpHeaders& headers);
  void Finish(std::unique_lock<std::mutex>& lock);  // calls finished_ unlocked
  void WakeSession(Wake wake);

  const Options options_;
  ExchangeCount& count_;
  std::mutex mutex_;
  std::string head_;     // bytes as they go out
  std::string payload_;  // of a stream: framed when taken
  std::size_t num_in_flight_ = 0;
  int status_ = 499;
  bool is_chunked_ = false;
  bool is_keep_alive_;
  bool is_begun_ = false;
  bool is_ended_ = false;
  bool is_terminated_ = false;  // the last chunk is in head_ or taken
  bool is_woken_ = false;
  bool is_detached_ = false;
  bool is_overflowing_ = false;
  std::function<void()> closed_;
  std::function<void(int)> finished_;
};

}  // namespace spillway
