#include "server/watchdog.h"

#include <utility>

namespace spillway {

Watchdog::Watchdog(const Engine& engine, absl::Duration interval,
                   std::function<void(const std::string& failure)> on_failure)
    : engine_(engine), interval_(interval), on_failure_(std::move(on_failure)), thread_([this] { Run(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  stopped_.notify_all();
  thread_.join();
}

void Watchdog::Run() {
  std::unique_lock lock(mutex_);
  while (!stopped_.wait_for(lock, absl::ToChronoNanoseconds(interval_), [this] { return is_stopping_; })) {
    lock.unlock();
    const EngineStatus status = engine_.status();
    if (!status.is_alive) return on_failure_(status.failure);
    lock.lock();
  }
}

}  // namespace spillway
