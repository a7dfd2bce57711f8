#include "kvstore/paced_link.h"

#include <algorithm>
#include <chrono>
#include <thread>

namespace spillway {

double PacedLink::Await(double begun, std::size_t num_copies, std::size_t num_bytes) {
  if (!is_paced()) return 0;
  const double cost = static_cast<double>(num_copies) * pacing_.latency_seconds +
                      static_cast<double>(num_bytes) / pacing_.bytes_per_second;
  double done_at = 0;
  {
    const std::lock_guard lock(mutex_);
    done_at = free_at_ = std::max(free_at_, begun) + cost;
  }
  const std::chrono::duration<double> since_epoch(done_at);
  std::this_thread::sleep_until(
      std::chrono::steady_clock::time_point(std::chrono::duration_cast<std::chrono::nanoseconds>(since_epoch)));
  return cost;
}

}  // namespace spillway
