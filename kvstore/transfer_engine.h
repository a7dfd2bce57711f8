#pragma once

// TransferEngine: moves blocks between the device tier and the host tier on its own streams and threads, restores
// before write-through. A transfer owns a reference on both ends until it is over, so neither can be reused under it.
//
// One engine thread queues, cancels and collects. Transfers that have not begun can be cancelled; those that have, run
// to their end. `wake` runs on a transfer thread whenever something was completed; it may only post to a mailbox.

#include <array>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kv_layout.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"
#include "kvstore/host_tier.h"
#include "kvstore/prefix_index.h"

namespace spillway {

// What is moved, and where from.
struct Transfer {
  enum class Kind : std::uint8_t { kRestore, kStore };

  Kind kind = Kind::kRestore;
  std::uint64_t id = 0;
  BlockKey key;
  PrefixIndex::Tokens tokens{};
  BlockRef block;  // the device end, held
  std::byte* device_bytes = nullptr;
  HostSlot slot;        // the host end, pinned; empty for a restore that must be fetched from a lower tier first
  absl::Status status;  // once completed
};

// Sums since start, by kind.
struct TransferStats {
  std::int64_t blocks = 0;
  std::int64_t bytes = 0;
  std::int64_t failures = 0;
  std::int64_t queued = 0;  // now
  double seconds = 0;       // in which at least one was under way
};

// Makes a copy cost latency + bytes / bandwidth, as on a bus, where the device's link is only a memcpy (the cpu
// device).
struct LinkPacing {
  double bytes_per_second = 0;  // 0: not paced
  double latency_seconds = 0;
};

struct TransferOptions {
  std::size_t block_bytes = 0;
  int depth = 2;  // copies queued on a stream at once
  LinkPacing pacing;
  // Fault injection for tests: on the transfer thread before a copy; a bad status fails the transfer. May block.
  std::function<absl::Status(const Transfer&)> before_copy;
};

class TransferEngine {
 public:
  // `device` and `host` outlive the engine.
  static absl::StatusOr<std::unique_ptr<TransferEngine>> Make(Device& device, HostTier& host,
                                                              const TransferOptions& options,
                                                              std::function<void()> wake);
  ~TransferEngine();  // waits for what has begun, drops the rest

  // Engine thread only, as the methods below. Returns the id.
  std::uint64_t Queue(Transfer transfer);
  // True: it had not begun and never will; its ends are released.
  bool Cancel(std::uint64_t id);
  // Everything that has ended since the last call, in order; the ends are released with the records.
  std::vector<Transfer> Collect();

  TransferStats stats(Transfer::Kind kind) const;  // any thread

 private:
  TransferEngine(HostTier& host, const TransferOptions& options, std::function<void()> wake);
  void Loop();
  void Begin(Transfer transfer, double now);
  void Complete(Transfer transfer, absl::Status status, double seconds);
  void Fetch(Transfer transfer);
  void AwaitPacedLink(double begun);

  struct InFlight {
    Transfer transfer;
    std::shared_ptr<Event> event;
    double begun = 0;
  };

  HostTier& host_;
  const TransferOptions options_;
  const std::function<void()> wake_;
  std::unique_ptr<Stream> stream_;
  std::uint64_t next_id_ = 1;  // engine thread

  mutable std::mutex mutex_;  // guards all up to in_flight_
  std::condition_variable changed_;
  // Restores of prefixes in order of arrival; stores likewise, behind them.
  std::deque<Transfer> restores_;
  std::deque<Transfer> stores_;
  std::vector<Transfer> completed_;
  std::array<TransferStats, 2> stats_;
  int num_fetching_ = 0;
  bool is_stopping_ = false;

  std::deque<InFlight> in_flight_;  // transfer thread
  double last_completed_at_ = 0;    // transfer thread
  double link_free_at_ = 0;         // transfer thread: when the paced link has done what it was given
  std::thread thread_;
};

}  // namespace spillway
