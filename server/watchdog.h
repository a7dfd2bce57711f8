#pragma once

// Looks at the engine at a fixed interval, and tells once when it is no longer alive: failed, stopped or stalled.

#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

#include "absl/time/time.h"
#include "engine/engine.h"

namespace spillway {

class Watchdog {
 public:
  // `on_failure` runs once, on the watchdog's thread, with the engine's own words. `engine` outlives the watchdog.
  Watchdog(const Engine& engine, absl::Duration interval, std::function<void(const std::string& failure)> on_failure);
  ~Watchdog();  // stops looking; waits for on_failure if it is running
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void Run();

  const Engine& engine_;
  const absl::Duration interval_;
  const std::function<void(const std::string&)> on_failure_;
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool is_stopping_ = false;
  std::thread thread_;
};

}  // namespace spillway
