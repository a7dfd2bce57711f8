#include "server/event_pipe.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <limits>

#include "absl/time/clock.h"

namespace spillway {
namespace {

// Where the signal handler writes; the one thing a handler can find.
std::atomic<int> signal_end = -1;

void OnSignal(int) {
  const int saved = errno;
  const char byte = static_cast<char>(ServerEvent::kSignal);
  [[maybe_unused]] const auto written = ::write(signal_end.load(std::memory_order_relaxed), &byte, 1);
  errno = saved;
}

}  // namespace

EventPipe::~EventPipe() {
  int mine = ends_[1];
  if (mine >= 0 && signal_end.compare_exchange_strong(mine, -1)) {
    std::signal(SIGTERM, SIG_DFL);
    std::signal(SIGINT, SIG_DFL);
  }
  for (const int end : ends_) {
    if (end >= 0) ::close(end);
  }
}

absl::Status EventPipe::Open() {
  if (::pipe2(ends_, O_CLOEXEC) != 0) return absl::ErrnoToStatus(errno, "pipe2");
  return absl::OkStatus();
}

absl::Status EventPipe::CatchSignals() {
  signal_end.store(ends_[1]);
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  for (const int signal : {SIGTERM, SIGINT}) {
    if (::sigaction(signal, &action, nullptr) != 0) return absl::ErrnoToStatus(errno, "sigaction");
  }
  return absl::OkStatus();
}

void EventPipe::Post(ServerEvent event) const {
  const char byte = static_cast<char>(event);
  while (::write(ends_[1], &byte, 1) < 0 && errno == EINTR) {
  }
}

std::optional<ServerEvent> EventPipe::Await(absl::Time deadline) const {
  while (true) {
    int timeout_ms = -1;
    if (deadline != absl::InfiniteFuture()) {
      const std::int64_t left = absl::ToInt64Milliseconds(absl::Ceil(deadline - absl::Now(), absl::Milliseconds(1)));
      timeout_ms = static_cast<int>(std::clamp<std::int64_t>(left, 0, std::numeric_limits<int>::max()));
    }
    pollfd readable = {.fd = ends_[0], .events = POLLIN, .revents = 0};
    const int ready = ::poll(&readable, 1, timeout_ms);
    if (ready == 0) return std::nullopt;
    char byte = 0;
    if (ready > 0 && ::read(ends_[0], &byte, 1) == 1) return static_cast<ServerEvent>(byte);
  }
}

}  // namespace spillway
