#include "kvstore/transfer_engine.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <iterator>
#include <optional>
#include <utility>

#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Transfers that a batch has room for from the beginning.
constexpr std::size_t kMostReserved = 128;

std::size_t BatchSize(const TransferOptions& options, std::size_t batch_bytes) {
  return std::max<std::size_t>(1, batch_bytes / options.block_bytes);
}

}  // namespace

std::size_t TransferEngine::Waiting::size() const {
  std::size_t size = 0;
  for (const std::vector<Transfer>& batch : batches_) size += batch.size();
  return size;
}

void TransferEngine::Waiting::PushBack(Transfer&& transfer) {
  if (empty() || batches_.back().size() == batch_size_) {
    batches_.emplace_back().reserve(std::min(batch_size_, kMostReserved));
  }
  batches_.back().push_back(std::move(transfer));
}

void TransferEngine::Waiting::PushFront(Transfer&& transfer) {
  if (empty() || batches_.front().size() == batch_size_) batches_.emplace_front();
  batches_.front().push_back(std::move(transfer));  // within a batch there is no order
}

std::vector<Transfer> TransferEngine::Waiting::TakeFront() {
  std::vector<Transfer> taken;
  if (empty()) return taken;
  taken = std::move(batches_.front());
  batches_.pop_front();
  return taken;
}

std::optional<Transfer> TransferEngine::Waiting::Remove(std::uint64_t id) {
  for (auto batch = batches_.begin(); batch != batches_.end(); ++batch) {
    const auto found = std::ranges::find(*batch, id, &Transfer::id);
    if (found == batch->end()) continue;
    std::optional<Transfer> removed = std::move(*found);
    batch->erase(found);
    if (batch->empty()) batches_.erase(batch);
    return removed;
  }
  return std::nullopt;
}

absl::StatusOr<std::unique_ptr<TransferEngine>> TransferEngine::Make(Device& device, HostTier& host,
                                                                     const TransferOptions& options,
                                                                     std::function<void()> wake) {
  std::unique_ptr<TransferEngine> engine(new TransferEngine(host, options, std::move(wake)));
  ASSIGN_OR_RETURN(engine->stream_, device.NewStream());
  engine->thread_ = std::thread([&engine = *engine] { engine.Loop(); });
  return engine;
}

TransferEngine::TransferEngine(HostTier& host, const TransferOptions& options, std::function<void()> wake)
    : host_(host),
      options_(options),
      wake_(std::move(wake)),
      link_(options.pacing),
      queues_{Waiting(BatchSize(options, options.restore_batch_bytes)),
              Waiting(BatchSize(options, options.store_batch_bytes)),
              Waiting(BatchSize(options, options.store_batch_bytes))} {}

TransferEngine::~TransferEngine() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

std::uint64_t TransferEngine::Queue(Transfer&& transfer) {
  const std::uint64_t id = transfer.id = next_id_++;
  const std::lock_guard lock(mutex_);
  Waiting& queue = queues_[static_cast<std::size_t>(transfer.kind)];
  queue.PushBack(std::move(transfer));
  changed_.notify_one();
  return id;
}

bool TransferEngine::Cancel(std::uint64_t id) {
  std::optional<Transfer> cancelled;  // its ends are released outside the lock
  const std::lock_guard lock(mutex_);
  for (Waiting& queue : queues_) {
    cancelled = queue.Remove(id);
    if (cancelled) return true;
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
  stats.queued = static_cast<std::int64_t>(queues_[static_cast<std::size_t>(kind)].size());
  return stats;
}

void TransferEngine::Loop() {
  while (AwaitWork()) {
    Fill();
    if (in_flight_.empty()) continue;
    Batch front = std::move(in_flight_.front());
    in_flight_.pop_front();
    const absl::Status status = front.event->Await();
    Fill();  // the stream goes on while this batch is taken in
    Finish(std::move(front), status);
  }
}

bool TransferEngine::AwaitWork() {
  if (!in_flight_.empty()) return true;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] {
    const bool has_queued = FirstQueued() != queues_.end();
    return has_queued || (is_stopping_ && num_fetching_ == 0);
  });
  if (is_stopping_) {
    for (Waiting& queue : queues_) queue.Clear();
    return num_fetching_ > 0;
  }
  // What is capped waits here, so that a restore that comes meanwhile goes first.
  const std::chrono::duration<double> early(cap_free_at_ - Now());
  if (early.count() > 0) changed_.wait_for(lock, early, [this] { return is_stopping_; });
  return true;
}

// Launches batches until the stream has enough to do. All at once: a stream's thread that is woken for one copy may
// take the core of this one, and would have nothing to do after it.
void TransferEngine::Fill() {
  stream_->Hold();
  while (in_flight_.size() < options_.depth && Now() >= cap_free_at_) {
    std::vector<Transfer> taken = TakeQueued();
    if (taken.empty()) break;
    std::erase_if(taken, [this](Transfer& transfer) { return !Prepare(transfer); });
    if (!taken.empty()) Launch(std::move(taken));
  }
  stream_->Resume();
}

// The queue whose turn it is; under the lock.
TransferEngine::Queues::iterator TransferEngine::FirstQueued() {
  const auto moves_home = queues_.begin() + static_cast<std::ptrdiff_t>(Transfer::Kind::kMoveHome);
  if (!moves_home->empty()) return moves_home;
  return std::ranges::find_if(queues_, [](const Waiting& queue) { return !queue.empty(); });
}

// The next batch, all of one kind.
std::vector<Transfer> TransferEngine::TakeQueued() {
  const std::lock_guard lock(mutex_);
  const auto first = FirstQueued();
  if (is_stopping_ || first == queues_.end()) return {};
  return first->TakeFront();
}

// False: it has ended already, or is fetched from a lower tier first.
bool TransferEngine::Prepare(Transfer& transfer) {
  const bool is_restore = transfer.kind == Transfer::Kind::kRestore;
  if (is_restore && !transfer.slot) {
    std::optional<HostSlot> found = host_.Find(transfer.key, transfer.tokens);
    if (!found) {
      Fetch(std::move(transfer));
      return false;
    }
    transfer.slot = *std::move(found);
  }
  if (is_restore) transfer.status = host_.Verify(transfer.slot);
  if (transfer.status.ok() && options_.before_copy) {
    absl::Status injected = options_.before_copy(transfer);
    if (transfer.kind != Transfer::Kind::kMoveHome) transfer.status = std::move(injected);
  }
  if (transfer.status.ok()) return true;
  Complete(std::move(transfer));
  return false;
}

void TransferEngine::Launch(std::vector<Transfer> transfers) {
  const Transfer::Kind kind = transfers.front().kind;
  Batch batch{.kind = kind, .transfers = std::move(transfers), .begun = Now()};
  if (!std::ranges::is_sorted(batch.transfers, {}, &Transfer::device_bytes)) {  // mostly it is, and moves cost
    std::ranges::sort(batch.transfers, {}, &Transfer::device_bytes);
  }
  const std::size_t block_bytes = options_.block_bytes;
  const std::vector<Transfer>& all = batch.transfers;
  for (std::size_t begin = 0, end = 1; begin < all.size(); begin = end++) {
    while (end < all.size() && all[end].device_bytes == all[end - 1].device_bytes + block_bytes &&
           all[end].slot.bytes() == all[end - 1].slot.bytes() + block_bytes) {
      ++end;
    }
    batch.copy_ends.push_back(end);
    const std::size_t bytes = (end - begin) * block_bytes;
    if (batch.kind == Transfer::Kind::kRestore) {
      stream_->Copy(all[begin].device_bytes, all[begin].slot.bytes(), bytes);
    } else {
      stream_->Copy(all[begin].slot.bytes(), all[begin].device_bytes, bytes);
    }
  }
  if (options_.max_bytes_per_second > 0) {
    const double cost = static_cast<double>(all.size() * block_bytes) / options_.max_bytes_per_second;
    cap_free_at_ = std::max(cap_free_at_, batch.begun) + cost;
  }
  batch.event = stream_->Record();
  in_flight_.push_back(std::move(batch));
}

// Brings the block from the lower tier into a host slot, then queues the restore again.
void TransferEngine::Fetch(Transfer transfer) {
  Tier* const lower = host_.lower();
  std::optional<HostSlot> slot;
  if (lower != nullptr) slot = host_.BeginWrite(transfer.key, transfer.tokens, WriteCause::kFetched);
  if (!slot) {
    transfer.status = absl::NotFoundError("the block is in no tier");
    Complete(std::move(transfer));
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
               const bool is_sound = status.ok();
               if (is_sound) {
                 fetched->slot = host_.Commit(std::move(*filling), fetched->key, fetched->tokens);
               } else {
                 *filling = HostSlot();
                 fetched->status = std::move(status);
                 Complete(std::move(*fetched));
               }
               const std::lock_guard lock(mutex_);
               if (is_sound) {
                 queues_[static_cast<std::size_t>(Transfer::Kind::kRestore)].PushFront(std::move(*fetched));
               }
               --num_fetching_;
               changed_.notify_one();
             });
}

void TransferEngine::Finish(Batch batch, const absl::Status& status) {
  for (Transfer& transfer : batch.transfers) transfer.status = status;
  if (link_.is_paced()) {
    for (std::size_t begin = 0; const std::size_t end : batch.copy_ends) {
      link_.Await(batch.begun, 1, (end - begin) * options_.block_bytes);
      if (end == batch.copy_ends.back()) Account(batch, status);
      const auto first = batch.transfers.begin();
      Complete(std::vector(std::make_move_iterator(first + static_cast<std::ptrdiff_t>(begin)),
                           std::make_move_iterator(first + static_cast<std::ptrdiff_t>(end))));
      begin = end;
    }
    return;
  }
  Account(batch, status);
  Complete(std::move(batch.transfers));
}

void TransferEngine::Account(const Batch& batch, const absl::Status& status) {
  const double now = Now();
  const double seconds = now - std::max(batch.begun, last_completed_at_);  // it shared the link with the one before it
  last_completed_at_ = now;
  if (!status.ok()) return;
  const auto blocks = static_cast<std::int64_t>(batch.transfers.size());
  const std::int64_t bytes = blocks * static_cast<std::int64_t>(options_.block_bytes);
  const auto copies = static_cast<std::int64_t>(batch.copy_ends.size());
  const auto size = static_cast<std::size_t>(std::bit_width(static_cast<std::uint64_t>(bytes / copies))) - 1;
  const std::lock_guard lock(mutex_);
  TransferStats& stats = stats_[static_cast<std::size_t>(batch.kind)];
  stats.blocks += blocks;
  stats.bytes += bytes;
  stats.seconds += seconds;
  const auto batch_size = static_cast<std::size_t>(std::bit_width(batch.transfers.size() - 1));
  ++stats.by_batch_blocks[std::min(batch_size, stats.by_batch_blocks.size() - 1)];
  CopyStats& of_size = stats.by_copy_size[std::min(size, kNumCopySizes - 1)];
  of_size.copies += copies;
  of_size.blocks += blocks;
  of_size.bytes += bytes;
  of_size.seconds += seconds;
}

void TransferEngine::Complete(Transfer transfer) {
  std::vector<Transfer> one;
  one.push_back(std::move(transfer));
  Complete(std::move(one));
}

void TransferEngine::Complete(std::vector<Transfer> transfers) {
  std::int64_t failures = 0;
  for (Transfer& transfer : transfers) {
    const bool is_move_home = transfer.kind == Transfer::Kind::kMoveHome;
    const bool commits = is_move_home ? transfer.commits : transfer.kind == Transfer::Kind::kStore;
    if (transfer.status.ok() && commits) {
      transfer.slot = host_.Commit(std::move(transfer.slot), transfer.key, transfer.tokens);
    }
    if (!is_move_home) transfer.slot = HostSlot();
    if (!transfer.status.ok()) ++failures;
  }
  {
    const std::lock_guard lock(mutex_);
    stats_[static_cast<std::size_t>(transfers.front().kind)].failures += failures;
    if (completed_.empty()) {
      completed_ = std::move(transfers);
    } else {
      std::ranges::move(transfers, std::back_inserter(completed_));
    }
  }
  wake_();
}

}  // namespace spillway
