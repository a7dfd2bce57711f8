#pragma once

// TimedCopies: a stream for copies between host and device. A group of copies takes at least what the link's pacing
// says, and where that is wanted it notes how long it took. Engine thread queues; the sums are read once what was
// queued is done.

#include <cstddef>
#include <memory>
#include <utility>

#include "kernels/device.h"
#include "kvstore/paced_link.h"

namespace spillway {

class TimedCopies {
 public:
  struct Sum {
    double copies = 0;
    double bytes = 0;
    double seconds = 0;
  };

  // `link` outlives this. A link that is not paced costs nothing unless `times`.
  TimedCopies(std::unique_ptr<Stream> stream, PacedLink& link, bool times)
      : link_(link), times_(times || link.is_paced()), stream_(std::move(stream)) {}

  Stream& stream() { return *stream_; }
  void Begin();
  // Begins a group when `free` (may be null) is there. A copy whose buffer is free follows the one before without a
  // gap, as on a bus, however late the stream's thread wakes.
  void BeginOnceFree(const std::shared_ptr<Event>& free);
  // Ends the group, which copies so much, into `sum`; that stays where it is. Another may follow at once, with an End
  // of its own.
  void End(std::size_t num_copies, std::size_t num_bytes, Sum& sum);

 private:
  PacedLink& link_;
  const bool times_;
  double begun_ = 0;                // thread of stream_, as ended_; 0: once the buffer is free
  double ended_ = 0;                // the group before
  std::unique_ptr<Stream> stream_;  // last: its destructor waits for work that reads the others
};

}  // namespace spillway
