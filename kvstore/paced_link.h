#pragma once

// PacedLink: makes a copy cost latency + bytes / bandwidth, as on a bus, where the device's link is only a memcpy (the
// cpu device). All streams that copy between host and device share one, as they would share the bus. Any thread.

#include <cstddef>
#include <mutex>

namespace spillway {

struct LinkPacing {
  double bytes_per_second = 0;  // 0: not paced
  double latency_seconds = 0;
};

class PacedLink {
 public:
  explicit PacedLink(const LinkPacing& pacing) : pacing_(pacing) {}

  bool is_paced() const { return pacing_.bytes_per_second > 0; }
  // Blocks until the link has carried `num_copies` copies of together `num_bytes`, which it was given at `begun`
  // (seconds of the steady clock); returns how long it took of the link. At once, and 0, where it is not paced.
  double Await(double begun, std::size_t num_copies, std::size_t num_bytes);

 private:
  const LinkPacing pacing_;
  std::mutex mutex_;
  double free_at_ = 0;  // when it has done what it was given; guarded by mutex_
};

}  // namespace spillway
