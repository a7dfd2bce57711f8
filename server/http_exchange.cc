#include "server/http_exchange.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace spillway {

const char* HttpReason(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 413:
      return "Content Too Large";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    default:
      return "Error";
  }
}

void ExchangeCount::Add() {
  const std::lock_guard lock(mutex_);
  ++count_;
}

void ExchangeCount::Remove() {
  const std::lock_guard lock(mutex_);
  if (--count_ == 0) none_.notify_all();
}

void ExchangeCount::AwaitNone() {
  std::unique_lock lock(mutex_);
  none_.wait(lock, [this] { return count_ == 0; });
}

QueuedExchange::QueuedExchange(Options options, ExchangeCount& count)
    : options_(std::move(options)), count_(count), is_keep_alive_(options_.is_keep_alive) {
  count_.Add();
}

QueuedExchange::~QueuedExchange() {
  {
    std::unique_lock lock(mutex_);
    if (!is_ended_) {
      Finish(lock);
      WakeSession(Wake::kDrop);
    }
  }
  count_.Remove();
}

void QueuedExchange::Send(HttpResponse response) {
  std::unique_lock lock(mutex_);
  if (is_ended_ || is_begun_) return;
  is_begun_ = true;
  status_ = response.status;
  response.headers.emplace_back("Content-Length", absl::StrCat(response.body.size()));
  Finish(lock);
  AppendHead(response.status, response.content_type, response.headers);
  if (!options_.is_head) head_ += response.body;
  is_terminated_ = true;
  WakeSession(Wake::kFlush);
}

void QueuedExchange::BeginStream(const std::string& content_type, const HttpHeaders& headers) {
  const std::lock_guard lock(mutex_);
  if (is_ended_ || is_begun_) return;
  is_begun_ = true;
  status_ = 200;
  HttpHeaders all = headers;
  is_chunked_ = !options_.is_http10;
  if (is_chunked_) {
    all.emplace_back("Transfer-Encoding", "chunked");
  } else {
    is_keep_alive_ = false;
  }
  AppendHead(200, content_type, all);
  WakeSession(Wake::kFlush);
}

bool QueuedExchange::Write(std::string_view bytes) {
  const std::lock_guard lock(mutex_);
  if (is_ended_ || is_detached_ || is_overflowing_) return false;
  payload_ += bytes;
  if (payload_.size() + num_in_flight_ > options_.max_pending_bytes) {
    is_overflowing_ = true;
    payload_ = {};
    WakeSession(Wake::kDrop);
    return false;
  }
  WakeSession(Wake::kFlush);
  return true;
}

void QueuedExchange::End() {
  std::unique_lock lock(mutex_);
  if (is_ended_ || !is_begun_) return;
  Finish(lock);
  WakeSession(Wake::kFlush);
}

void QueuedExchange::OnClosed(std::function<void()> closed) {
  {
    const std::lock_guard lock(mutex_);
    if (!is_detached_) {
      if (!is_ended_) closed_ = std::move(closed);
      return;
    }
  }
  closed();
}

void QueuedExchange::OnFinished(std::function<void(int)> finished) {
  const std::lock_guard lock(mutex_);
  finished_ = std::move(finished);
}

QueuedExchange::Taken QueuedExchange::Take(std::string& bytes) {
  const std::lock_guard lock(mutex_);
  is_woken_ = false;
  bytes.clear();
  bytes.swap(head_);
  if (!payload_.empty()) {
    if (is_chunked_) absl::StrAppend(&bytes, absl::Hex(payload_.size()), "\r\n");
    bytes += payload_;
    if (is_chunked_) bytes += "\r\n";
    constexpr std::size_t kKept = 1024;
    if (payload_.capacity() > kKept) payload_ = {};
    payload_.clear();
  }
  if (is_ended_ && !is_terminated_) {
    is_terminated_ = true;
    if (is_chunked_) bytes += "0\r\n\r\n";
  }
  num_in_flight_ = bytes.size();
  return {is_ended_, is_keep_alive_};
}

void QueuedExchange::Detach() {
  std::function<void()> closed;
  {
    std::unique_lock lock(mutex_);
    is_detached_ = true;
    head_ = {};
    payload_ = {};
    if (is_ended_) return;
    closed = std::exchange(closed_, nullptr);
    Finish(lock);
  }
  if (closed) closed();
}

void QueuedExchange::AppendHead(int status, const std::string& content_type, const HttpHeaders& headers) {
  absl::StrAppend(&head_, "HTTP/1.1 ", status, " ", HttpReason(status), "\r\nServer: spillway\r\n");
  if (!content_type.empty()) absl::StrAppend(&head_, "Content-Type: ", content_type, "\r\n");
  for (const auto& [name, value] : headers) absl::StrAppend(&head_, name, ": ", value, "\r\n");
  if (!is_keep_alive_) {
    head_ += "Connection: close\r\n";
  } else if (options_.is_http10) {
    head_ += "Connection: keep-alive\r\n";
  }
  head_ += "\r\n";
}

void QueuedExchange::Finish(std::unique_lock<std::mutex>& lock) {
  if (const auto finished = std::exchange(finished_, nullptr)) {
    const int status = status_;
    lock.unlock();
    finished(status);
    lock.lock();
  }
  is_ended_ = true;
  closed_ = nullptr;
}

void QueuedExchange::WakeSession(Wake wake) {
  if (is_detached_ || (is_woken_ && wake == Wake::kFlush)) return;
  is_woken_ = true;
  options_.wake(wake);
}

}  // namespace spillway
