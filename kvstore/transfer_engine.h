#pragma once

// TransferEngine: moves blocks between the device tier and the host tier on its own stream and thread: the moves home
// of running sequences first, then restores, then write-through. A transfer owns a reference on both ends until it is
// over, so neither can be reused under it.
//
// What is queued is submitted in batches: one event each, blocks that are adjacent on both ends in one copy. While one
// batch is copied the next is made ready, so that the stream does not wait. A batch is short (see TransferOptions), so
// that its blocks are ready soon and a restore does not wait long behind stores.
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
#include <optional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kv_layout.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"
#include "kvstore/copy_stats.h"
#include "kvstore/host_tier.h"
#include "kvstore/paced_link.h"
#include "kvstore/prefix_index.h"

namespace spillway {

// What is moved, and where from.
struct Transfer {
  // kMoveHome: a store into a home slot of a running sequence; the slot stays with the completed record.
  enum class Kind : std::uint8_t { kRestore, kStore, kMoveHome };
  static constexpr std::size_t kNumKinds = 3;

  Kind kind = Kind::kRestore;
  std::uint64_t id = 0;
  std::uint32_t tag = 0;  // the queuer's own
  BlockKey key;
  PrefixIndex::Tokens tokens{};
  BlockRef block;  // the device end, held
  std::byte* device_bytes = nullptr;
  HostSlot slot;        // the host end, pinned; empty for a restore that must be fetched from a lower tier first
  bool commits = true;  // kMoveHome: the slot is findable once it is filled
  absl::Status status;  // once completed
};

// Sums since start, by kind.
struct TransferStats {
  std::int64_t blocks = 0;
  std::int64_t bytes = 0;
  std::int64_t failures = 0;
  std::int64_t queued = 0;  // now
  double seconds = 0;       // in which at least one was under way
  CopySizes by_copy_size{};
  BatchSizes by_batch_blocks{};
};

struct TransferOptions {
  std::size_t block_bytes = 0;
  std::size_t depth = 2;  // batches on the stream at once
  // Most bytes of a batch; one block at least.
  std::size_t restore_batch_bytes = std::size_t{2} << 20;
  std::size_t store_batch_bytes = std::size_t{1} << 20;
  double max_bytes_per_second = 0;  // a batch begins only when those before it have had this long; 0: no cap
  LinkPacing pacing;
  // Fault injection for tests: on the transfer thread before a copy; a bad status fails the transfer, unless it is a
  // move home. May block.
  std::function<absl::Status(const Transfer&)> before_copy;
};

// What KvStore asks of whoever moves blocks. TransferEngine moves bytes; a replay moves none and keeps a virtual clock.
// Engine thread only, but for stats.
class BlockTransfers {
 public:
  virtual ~BlockTransfers() = default;  // waits for what has begun, drops the rest

  // Returns the id.
  virtual std::uint64_t Queue(Transfer&& transfer) = 0;
  // True: it had not begun and never will; its ends are released.
  virtual bool Cancel(std::uint64_t id) = 0;
  // Everything that has ended since the last call, in order; the ends are released with the records.
  virtual std::vector<Transfer> Collect() = 0;

  virtual TransferStats stats(Transfer::Kind kind) const = 0;  // any thread
};

class TransferEngine : public BlockTransfers {
 public:
  // `device` and `host` outlive the engine.
  static absl::StatusOr<std::unique_ptr<TransferEngine>> Make(Device& device, HostTier& host,
                                                              const TransferOptions& options,
                                                              std::function<void()> wake);
  ~TransferEngine() override;

  std::uint64_t Queue(Transfer&& transfer) override;
  bool Cancel(std::uint64_t id) override;
  std::vector<Transfer> Collect() override;
  TransferStats stats(Transfer::Kind kind) const override;
  PacedLink& link() { return link_; }  // for whoever else copies between host and device

 private:
  // Transfers in order of arrival, in batches that are handed over whole: they come by the thousand.
  class Waiting {
   public:
    explicit Waiting(std::size_t batch_size) : batch_size_(batch_size) {}
    bool empty() const { return batches_.empty(); }
    std::size_t size() const;
    void PushBack(Transfer&& transfer);
    void PushFront(Transfer&& transfer);
    std::vector<Transfer> TakeFront();  // empty: none waits
    std::optional<Transfer> Remove(std::uint64_t id);
    void Clear() { batches_.clear(); }

   private:
    const std::size_t batch_size_;
    std::deque<std::vector<Transfer>> batches_;  // of one to batch_size_
  };
  using Queues = std::array<Waiting, Transfer::kNumKinds>;  // by kind

  TransferEngine(HostTier& host, const TransferOptions& options, std::function<void()> wake);
  // What one event covers. Transfers in the order of their copies; copy i takes those up to copy_ends[i].
  struct Batch {
    Transfer::Kind kind = Transfer::Kind::kRestore;
    std::vector<Transfer> transfers{};
    std::vector<std::size_t> copy_ends{};
    std::shared_ptr<Event> event{};
    double begun = 0;
  };

  void Loop();
  bool AwaitWork();  // false: stop
  void Fill();
  Queues::iterator FirstQueued();
  std::vector<Transfer> TakeQueued();
  bool Prepare(Transfer& transfer);
  void Launch(std::vector<Transfer> transfers);
  void Fetch(Transfer transfer);
  void Finish(Batch batch, const absl::Status& status);
  void Account(const Batch& batch, const absl::Status& status);
  // Ends transfers whose status is set.
  void Complete(std::vector<Transfer> transfers);
  void Complete(Transfer transfer);

  HostTier& host_;
  const TransferOptions options_;
  const std::function<void()> wake_;
  PacedLink link_;
  std::unique_ptr<Stream> stream_;
  std::uint64_t next_id_ = 1;  // engine thread

  mutable std::mutex mutex_;  // guards all up to is_stopping_
  std::condition_variable changed_;
  Queues queues_;
  std::vector<Transfer> completed_;
  std::array<TransferStats, Transfer::kNumKinds> stats_;
  int num_fetching_ = 0;
  bool is_stopping_ = false;

  // Transfer thread.
  std::deque<Batch> in_flight_;
  double last_completed_at_ = 0;
  double cap_free_at_ = 0;  // when the cap lets the next batch begin
  std::thread thread_;
};

}  // namespace spillway
