#include "kvstore/transfer_engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

absl::StatusOr<std::unique_ptr<TransferEngine>> TransferEngine::Make(Device& device, HostTier& host,
                                                                     const TransferOptions& options,
                                                                     std::function<void()> wake) {
  std::unique_ptr<TransferEngine> engine(new TransferEngine(host, options, std::move(wake)));
  ASSIGN_OR_RETURN(engine->stream_, device.NewStream());
  engine->thread_ = std::thread([&engine = *engine] { engine.Loop(); });
  return engine;
}

TransferEngine::TransferEngine(HostTier& host, const TransferOptions& options, std::function<void()> wake)
    : host_(host), options_(options), wake_(std::move(wake)) {}

TransferEngine::~TransferEngine() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

std::uint64_t TransferEngine::Queue(Transfer transfer) {
  const std::uint64_t id = transfer.id = next_id_++;
  const std::lock_guard lock(mutex_);
  (transfer.kind == Transfer::Kind::kRestore ? restores_ : stores_).push_back(std::move(transfer));
  changed_.notify_one();
  return id;
}

bool TransferEngine::Cancel(std::uint64_t id) {
  Transfer cancelled;  // its ends are released outside the lock
  const std::lock_guard lock(mutex_);
  for (std::deque<Transfer>* queue : {&restores_, &stores_}) {
    const auto found = std::ranges::find(*queue, id, &Transfer::id);
    if (found == queue->end()) continue;
    cancelled = std::move(*found);
    queue->erase(found);
    return true;
  }
  return false;
}

std::vector<Transfer> TransferEngine::Collect() {
  const std::lock_guard lock(mutex_);
  return std::exchange(completed_, {});
}

TransferStats TransferEngine::stats(Transfer::Kind kind) const {
  const std::lock_guard lock(mutex_);
  TransferStats stats = stats_[static_cast<std::size_t>(kind)];
  stats.queued = static_cast<std::int64_t>((kind == Transfer::Kind::kRestore ? restores_ : stores_).size());
  return stats;
}

void TransferEngine::Loop() {
  while (true) {
    Transfer next;
    {
      std::unique_lock lock(mutex_);
      if (in_flight_.empty()) {
        changed_.wait(
            lock, [this] { return !restores_.empty() || !stores_.empty() || (is_stopping_ && num_fetching_ == 0); });
        if (is_stopping_ && num_fetching_ == 0) return;
      }
      if (in_flight_.size() < static_cast<std::size_t>(options_.depth) && !is_stopping_) {
        std::deque<Transfer>& queue = restores_.empty() ? stores_ : restores_;
        if (!queue.empty()) {
          next = std::move(queue.front());
          queue.pop_front();
        }
      } else if (is_stopping_ && in_flight_.empty()) {
        restores_.clear();
        stores_.clear();
      }
    }
    if (next.id != 0) {
      Begin(std::move(next), Now());
    } else if (!in_flight_.empty()) {
      InFlight front = std::move(in_flight_.front());
      in_flight_.pop_front();
      absl::Status status = front.event->Await();
      AwaitPacedLink(front.begun);
      const double now = Now();
      const double busy_since = std::max(front.begun, last_completed_at_);  // it shared the link with the one before it
      last_completed_at_ = now;
      Complete(std::move(front.transfer), std::move(status), now - busy_since);
    }
  }
}

void TransferEngine::Begin(Transfer transfer, double now) {
  const bool is_restore = transfer.kind == Transfer::Kind::kRestore;
  if (is_restore && !transfer.slot) {
    if (std::optional<HostSlot> found = host_.Find(transfer.key, transfer.tokens)) {
      transfer.slot = *std::move(found);
    } else {
      Fetch(std::move(transfer));
      return;
    }
  }
  absl::Status status = is_restore ? host_.Verify(transfer.slot) : absl::OkStatus();
  if (status.ok() && options_.before_copy) status = options_.before_copy(transfer);
  if (!status.ok()) {
    Complete(std::move(transfer), std::move(status), 0);
    return;
  }
  if (is_restore) {
    stream_->Copy(transfer.device_bytes, transfer.slot.bytes(), options_.block_bytes);
  } else {
    stream_->Copy(transfer.slot.bytes(), transfer.device_bytes, options_.block_bytes);
  }
  in_flight_.push_back({.transfer = std::move(transfer), .event = stream_->Record(), .begun = now});
}

// Brings the block from the lower tier into a host slot, then queues the restore again.
void TransferEngine::Fetch(Transfer transfer) {
  Tier* const lower = host_.lower();
  std::optional<HostSlot> slot;
  if (lower != nullptr) slot = host_.BeginWrite(transfer.key, transfer.tokens, WriteCause::kFetched);
  if (!slot) {
    Complete(std::move(transfer), absl::NotFoundError("the block is in no tier"), 0);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    ++num_fetching_;
  }
  auto fetched = std::make_shared<Transfer>(std::move(transfer));
  auto filling = std::make_shared<HostSlot>(*std::move(slot));
  lower->Get(fetched->key, fetched->tokens, {filling->bytes(), options_.block_bytes},
             [this, fetched, filling](absl::Status status) {
               if (status.ok()) {
                 fetched->slot = host_.Commit(std::move(*filling), fetched->key, fetched->tokens);
               } else {
                 *filling = HostSlot();
                 Complete(std::move(*fetched), std::move(status), 0);
               }
               const std::lock_guard lock(mutex_);
               if (fetched->slot) restores_.push_front(std::move(*fetched));
               --num_fetching_;
               changed_.notify_one();
             });
}

void TransferEngine::AwaitPacedLink(double begun) {
  const LinkPacing& pacing = options_.pacing;
  if (pacing.bytes_per_second <= 0) return;
  const double cost = pacing.latency_seconds + static_cast<double>(options_.block_bytes) / pacing.bytes_per_second;
  link_free_at_ = std::max(link_free_at_, begun) + cost;
  std::this_thread::sleep_for(std::chrono::duration<double>(link_free_at_ - Now()));
}

void TransferEngine::Complete(Transfer transfer, absl::Status status, double seconds) {
  transfer.status = std::move(status);
  if (transfer.status.ok() && transfer.kind == Transfer::Kind::kStore) {
    transfer.slot = host_.Commit(std::move(transfer.slot), transfer.key, transfer.tokens);
  }
  transfer.slot = HostSlot();
  {
    const std::lock_guard lock(mutex_);
    TransferStats& stats = stats_[static_cast<std::size_t>(transfer.kind)];
    if (transfer.status.ok()) {
      ++stats.blocks;
      stats.bytes += static_cast<std::int64_t>(options_.block_bytes);
      stats.seconds += seconds;
    } else {
      ++stats.failures;
    }
    completed_.push_back(std::move(transfer));
  }
  wake_();
}

}  // namespace spillway
