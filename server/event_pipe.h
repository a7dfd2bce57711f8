#pragma once

// What `serve` waits for, in one place: signals, the end of draining, the engine's failure.

#include <optional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace spillway {

enum class ServerEvent : char { kSignal = 's', kDrained = 'd', kEngineFailed = 'f' };

class EventPipe {
 public:
  EventPipe() = default;
  ~EventPipe();  // signals get their default meaning back
  EventPipe(const EventPipe&) = delete;
  EventPipe& operator=(const EventPipe&) = delete;

  absl::Status Open();
  // From now on SIGTERM and SIGINT are events. One EventPipe at a time.
  absl::Status CatchSignals();

  void Post(ServerEvent event) const;  // any thread
  // nullopt at the deadline.
  std::optional<ServerEvent> Await(absl::Time deadline) const;

 private:
  int ends_[2] = {-1, -1};  // read, write
};

}  // namespace spillway
