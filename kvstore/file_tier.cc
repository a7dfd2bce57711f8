#include "kvstore/file_tier.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"
#include "kvstore/file_tier_block_file.h"
#include "kvstore/file_tier_budget.h"
#include "kvstore/file_tier_directory.h"
#include "kvstore/file_tier_format.h"
#include "kvstore/file_tier_index.h"

namespace spillway {
namespace {

using Done = std::function<void(absl::Status)>;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// A block file and what is in it. Whoever works on it shares it, so that Clear can put a new one in its place at any
// time.
struct Volume {
  BlockFile file;
  FileTierIndex index;  // guarded by the tier's mutex
};

struct LoadedVolume {
  std::shared_ptr<Volume> volume;
  std::uint64_t newest_stamp = 0;
};

absl::StatusOr<LoadedVolume> LoadVolume(const TierDirectory& directory, const BlockFileLayout& layout,
                                        const SpaceDigest& space, std::uint32_t max_slots) {
  ASSIGN_OR_RETURN(OwnedFile file, directory.OpenBlockFile(BlockFileName(space)));
  LoadedVolume loaded{.volume =
                          std::make_shared<Volume>(Volume{.file = {std::move(file), layout, space}, .index = {}})};
  FileTierIndex& index = loaded.volume->index;
  ASSIGN_OR_RETURN(std::vector<BlockFile::Found> found, loaded.volume->file.Scan(max_slots));
  if (found.empty()) return loaded;

  const std::uint32_t num_slots = found.back().slot + 1;
  std::vector<bool> is_filled(num_slots, false);
  while (index.num_slots() < num_slots) index.TakeNew();
  // Newest first to tell which of two records of one key counts, then oldest first to add them in order of use.
  std::ranges::sort(found, std::greater<>(), [](const BlockFile::Found& block) { return block.record.stamp; });
  loaded.newest_stamp = found.front().record.stamp;
  absl::flat_hash_set<BlockKey> seen;
  std::erase_if(found, [&seen](const BlockFile::Found& block) { return !seen.insert(block.record.key).second; });
  std::ranges::reverse(found);
  for (const auto& [record, slot] : found) {
    index.Add(record.key, record.tokens, record.payload_checksum, slot);
    is_filled[slot] = true;
  }
  for (std::uint32_t slot = num_slots; slot-- > 0;) {
    if (!is_filled[slot]) index.GiveBack(slot);
  }
  return loaded;
}

// Threads serve declined calls, then reads, then writes, and only one of them writes at a time: with two threads or
// more, a read never waits behind a write. (A second writer would gain little: file systems let one writer at a time
// into a file.)
//
// Whoever has set is_writing_ is the writer, and alone changes files: a thread with a Put, or Clear.
class FileTier : public Tier {
 public:
  FileTier(const FileTierOptions& options, const BlockFileLayout& layout, const SpaceDigest& space,
           std::unique_ptr<TierDirectory> directory, const FileTierBudget& budget, LoadedVolume loaded)
      : options_(options),
        layout_(layout),
        space_(space),
        max_slots_(layout.MaxSlots(budget.ceiling_bytes())),
        directory_(std::move(directory)),
        budget_(budget),
        newest_stamp_(loaded.newest_stamp),
        volume_(std::move(loaded.volume)) {}
  ~FileTier() override;

  absl::Status Start();

  std::string_view name() const override { return "file"; }
  bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const override;
  void Put(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<const std::byte> bytes,
           Done done) override;
  void Get(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<std::byte> into, Done done) override;
  void Clear() override;
  TierStats stats() const override;

 private:
  struct PendingPut {
    BlockKey key;
    BlockTokens tokens{};
    std::span<const std::byte> bytes;
    std::vector<Done> waiters;
  };
  struct PendingGet {
    BlockKey key;
    BlockTokens tokens{};
    std::span<std::byte> into;
    Done done;
  };

  // With mutex_ held.
  bool HasWork() const;
  void Answer(Done done, absl::Status status);
  void Decline(Done done, absl::string_view why);

  std::function<void()> NextJob();

  void Read(const PendingGet& get);
  void Write(PendingPut& put);                            // as the writer
  absl::Status TryWrite(const PendingPut& put);           // as the writer
  std::optional<std::uint32_t> TakeSlot(Volume& volume);  // as the writer

  const FileTierOptions options_;
  const BlockFileLayout layout_;
  const SpaceDigest space_;
  const std::uint32_t max_slots_;
  const std::unique_ptr<const TierDirectory> directory_;

  // The writer's.
  FileTierBudget budget_;
  std::uint64_t newest_stamp_;

  mutable std::mutex mutex_;  // guards all below up to stats_, and the volume's index
  std::condition_variable changed_;
  std::shared_ptr<Volume> volume_;  // null while or after Clear could not make a new one
  bool is_writing_ = false;
  bool is_stopping_ = false;
  std::deque<std::function<void()>> answers_;  // calls that need no file
  std::deque<std::function<void()>> reads_;
  std::deque<BlockKey> writes_;
  // Those in writes_ and the one being written.
  absl::flat_hash_map<BlockKey, std::unique_ptr<PendingPut>> puts_;
  TierStats stats_;

  std::vector<std::thread> threads_;
};

FileTier::~FileTier() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

absl::Status FileTier::Start() {
  // The threads take no signals. Those of the process are the main thread's, and SIGXFSZ would end it where an error
  // will do.
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  absl::Status status;
  try {
    for (int i = 0; i < options_.num_threads; ++i) {
      threads_.emplace_back([this] {
        while (const std::function<void()> job = NextJob()) job();
      });
    }
  } catch (const std::system_error& error) {
    status = absl::ResourceExhaustedError(absl::StrCat("file tier: cannot start a thread: ", error.what()));
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return status;
}

bool FileTier::HasWork() const {
  return is_stopping_ || !answers_.empty() || !reads_.empty() || (!writes_.empty() && !is_writing_);
}

// Empty: the tier stops and nothing is left to do, unless for the writer, who comes back here.
std::function<void()> FileTier::NextJob() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return HasWork(); });
  for (auto* queue : {&answers_, &reads_}) {
    if (queue->empty()) continue;
    std::function<void()> job = std::move(queue->front());
    queue->pop_front();
    return job;
  }
  if (writes_.empty() || is_writing_) return nullptr;
  is_writing_ = true;
  PendingPut* put = puts_.at(writes_.front()).get();
  writes_.pop_front();
  return [this, put] { Write(*put); };
}

void FileTier::Answer(Done done, absl::Status status) {
  answers_.push_back([done = std::move(done), status = std::move(status)] { done(status); });
  changed_.notify_all();
}

void FileTier::Decline(Done done, absl::string_view why) {
  ++stats_.declined;
  Answer(std::move(done), absl::ResourceExhaustedError(absl::StrCat("file tier: declined, ", why)));
}

bool FileTier::Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return volume_ != nullptr && volume_->index.Contains(key, tokens);
}

void FileTier::Put(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<const std::byte> bytes,
                   Done done) {
  const std::lock_guard<std::mutex> lock(mutex_);
  BlockTokens own_tokens{};
  if (tokens.size() != own_tokens.size() || bytes.size() != options_.block_bytes) {
    Answer(std::move(done), absl::InvalidArgumentError(absl::StrCat("file tier: offered ", tokens.size(),
                                                                    " tokens and ", bytes.size(), " bytes, wanted ",
                                                                    own_tokens.size(), " and ", options_.block_bytes)));
    return;
  }
  std::ranges::copy(tokens, own_tokens.begin());
  if (volume_ != nullptr && volume_->index.Contains(key, tokens)) {
    Answer(std::move(done), absl::OkStatus());
    return;
  }
  if (volume_ != nullptr && volume_->index.ContainsKey(key)) {
    Decline(std::move(done), "the key is held for other tokens");
    return;
  }
  if (const auto pending = puts_.find(key); pending != puts_.end()) {
    if (pending->second->tokens != own_tokens) {
      Decline(std::move(done), "the key is being written for other tokens");
      return;
    }
    ++stats_.in_flight;
    pending->second->waiters.push_back(std::move(done));
    return;
  }
  if ((puts_.size() + 1) * options_.block_bytes > options_.max_pending_bytes) {
    Decline(std::move(done), absl::StrCat(puts_.size(), " blocks wait to be written"));
    return;
  }
  auto put = std::make_unique<PendingPut>(PendingPut{.key = key, .tokens = own_tokens, .bytes = bytes, .waiters = {}});
  put->waiters.push_back(std::move(done));
  ++stats_.in_flight;
  puts_.emplace(key, std::move(put));
  writes_.push_back(key);
  changed_.notify_all();
}

void FileTier::Write(PendingPut& put) {
  const Clock::time_point start = Clock::now();
  const absl::Status status = TryWrite(put);
  std::unique_ptr<PendingPut> finished;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_writing_ = false;
    const auto pending = puts_.find(put.key);
    finished = std::move(pending->second);
    puts_.erase(pending);
    const auto num_waiters = static_cast<std::int64_t>(finished->waiters.size());
    stats_.in_flight -= num_waiters;
    stats_.write_seconds += SecondsSince(start);
    if (status.ok()) {
      stats_.written_bytes += static_cast<std::int64_t>(options_.block_bytes);
    } else if (absl::IsResourceExhausted(status)) {
      stats_.declined += num_waiters;
    } else {
      ++stats_.failures;
    }
  }
  changed_.notify_all();
  for (const Done& done : finished->waiters) done(status);
}

absl::Status FileTier::TryWrite(const PendingPut& put) {
  std::shared_ptr<Volume> volume;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    volume = volume_;
  }
  if (volume == nullptr) return absl::ResourceExhaustedError("file tier: declined, its file could not be made again");
  const std::optional<std::uint32_t> slot = TakeSlot(*volume);
  if (!slot) return absl::ResourceExhaustedError("file tier: declined, every block is being read");
  BlockRecord record{.key = put.key, .tokens = put.tokens, .stamp = ++newest_stamp_};
  absl::Status status = volume->file.Write(*slot, record, put.bytes);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (status.ok()) {
    volume->index.Add(put.key, put.tokens, record.payload_checksum, *slot);
  } else {
    volume->index.GiveBack(*slot);
  }
  return status;
}

// Free ones first, then the file grows to its share, then the least recently used block gives way.
std::optional<std::uint32_t> FileTier::TakeSlot(Volume& volume) {
  std::uint32_t num_slots = 0;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const std::optional<std::uint32_t> slot = volume.index.TakeFree()) return slot;
    num_slots = volume.index.num_slots();
  }
  const bool may_grow = num_slots < max_slots_ && budget_.MakeRoom(layout_.Charge(num_slots + 1));
  const std::lock_guard<std::mutex> lock(mutex_);
  if (may_grow) return volume.index.TakeNew();
  const std::optional<std::uint32_t> slot = volume.index.TakeOldest();
  if (slot) ++stats_.evictions;
  return slot;
}

void FileTier::Get(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<std::byte> into, Done done) {
  const std::lock_guard<std::mutex> lock(mutex_);
  PendingGet get{.key = key, .tokens = {}, .into = into, .done = std::move(done)};
  if (tokens.size() != get.tokens.size() || into.size() != options_.block_bytes) {
    Answer(std::move(get.done), absl::InvalidArgumentError(
                                    absl::StrCat("file tier: asked for ", tokens.size(), " tokens and ", into.size(),
                                                 " bytes, holds ", get.tokens.size(), " and ", options_.block_bytes)));
    return;
  }
  std::ranges::copy(tokens, get.tokens.begin());
  ++stats_.in_flight;
  ++stats_.reads_in_flight;
  reads_.push_back([this, get = std::move(get)] { Read(get); });
  changed_.notify_all();
}

void FileTier::Read(const PendingGet& get) {
  const Clock::time_point start = Clock::now();
  std::shared_ptr<Volume> volume;
  std::optional<FileTierIndex::Pin> pin;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    volume = volume_;
    if (volume != nullptr) pin = volume->index.FindAndPin(get.key, get.tokens);
    if (!pin) {
      ++stats_.misses;
      --stats_.in_flight;
      --stats_.reads_in_flight;
    }
  }
  if (!pin) {
    get.done(absl::NotFoundError("file tier: not there"));
    return;
  }
  const FileTierIndex::Block& block = **pin;
  absl::Status status = volume->file.Read(block.slot, block.key, block.tokens, block.payload_checksum, get.into);
  const bool is_unsound = absl::IsDataLoss(status);
  if (!status.ok()) {
    // Still pinned, so the slot is nobody else's. Where even this fails, the block is found and found unsound after a
    // restart.
    volume->file.Erase(block.slot).IgnoreError();
    status = absl::DataLossError(status.message());
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    volume->index.Unpin(*pin, status.ok() ? FileTierIndex::Verdict::kKeep : FileTierIndex::Verdict::kForget);
    --stats_.in_flight;
    --stats_.reads_in_flight;
    stats_.read_seconds += SecondsSince(start);
    if (status.ok()) {
      ++stats_.hits;
      stats_.read_bytes += static_cast<std::int64_t>(options_.block_bytes);
    } else {
      ++stats_.misses;
      if (!is_unsound) ++stats_.read_failures;
      ++(is_unsound ? stats_.checksum_failures : stats_.failures);
    }
  }
  get.done(status);
}

// Blocks of other spaces go too: whoever clears wants the prompts gone.
void FileTier::Clear() {
  std::shared_ptr<Volume> old;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !is_writing_; });
    is_writing_ = true;
    old = std::exchange(volume_, nullptr);
    for (const BlockKey& key : std::exchange(writes_, {})) {
      const auto pending = puts_.find(key);
      for (Done& done : pending->second->waiters) {
        --stats_.in_flight;
        Decline(std::move(done), "the tier was cleared");
      }
      puts_.erase(pending);
    }
  }
  absl::Status status = budget_.RemoveOtherSpaces();
  status.Update(directory_->Remove(BlockFileName(space_)));
  LoadedVolume fresh;
  if (status.ok() || absl::IsNotFound(status)) {
    absl::StatusOr<LoadedVolume> made = LoadVolume(*directory_, layout_, space_, max_slots_);
    status = made.status();
    if (made.ok()) fresh = *std::move(made);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!status.ok()) ++stats_.failures;
  volume_ = std::move(fresh.volume);
  is_writing_ = false;
  changed_.notify_all();
}

TierStats FileTier::stats() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  TierStats stats = stats_;
  if (volume_ != nullptr) {
    stats.resident_blocks = volume_->index.num_blocks();
    stats.bookkeeping_bytes = static_cast<std::int64_t>(volume_->index.memory_bytes());
  }
  const auto block_bytes = static_cast<std::int64_t>(options_.block_bytes);
  stats.resident_bytes = stats.resident_blocks * block_bytes;
  stats.capacity_blocks = max_slots_;
  stats.capacity_bytes = max_slots_ * block_bytes;
  return stats;
}

absl::Status Validate(const FileTierOptions& options) {
  constexpr std::size_t kMaxBlockBytes = 1ULL << 30U;
  constexpr std::int64_t kMaxBudgetBytes = 1LL << 60U;
  const auto wrong = [](absl::string_view name, const auto& value, absl::string_view wanted) {
    return absl::InvalidArgumentError(absl::StrCat("file tier: ", name, " is ", value, ", wanted ", wanted));
  };
  if (options.directory.empty()) return wrong("directory", "empty", "a path");
  if (options.space.empty()) return wrong("space", "empty", "what the bytes mean");
  if (options.block_bytes == 0 || options.block_bytes > kMaxBlockBytes) {
    return wrong("block_bytes", options.block_bytes, absl::StrCat("1 to ", kMaxBlockBytes));
  }
  if (options.budget_bytes <= 0 || options.budget_bytes > kMaxBudgetBytes) {
    return wrong("budget_bytes", options.budget_bytes, absl::StrCat("1 to ", kMaxBudgetBytes));
  }
  if (options.num_threads < 1 || options.num_threads > 64) return wrong("num_threads", options.num_threads, "1 to 64");
  if (options.max_pending_bytes < options.block_bytes) {
    return wrong("max_pending_bytes", options.max_pending_bytes,
                 absl::StrCat("a block (", options.block_bytes, ") or more"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tier>> MakeFileTier(const FileTierOptions& options) {
  RETURN_IF_ERROR(Validate(options));
  ASSIGN_OR_RETURN(TierDirectory opened, TierDirectory::Open(options.directory));
  auto directory = std::make_unique<TierDirectory>(std::move(opened));
  const SpaceDigest space = MakeSpaceDigest(options.space, options.block_bytes);
  ASSIGN_OR_RETURN(FileTierBudget budget, FileTierBudget::Make(*directory, BlockFileName(space), options.budget_bytes));
  const BlockFileLayout layout(options.block_bytes);
  const std::uint32_t max_slots = layout.MaxSlots(budget.ceiling_bytes());
  if (max_slots == 0) {
    return absl::InvalidArgumentError(absl::StrCat("file tier: budget_bytes is ", options.budget_bytes,
                                                   ", which holds no block of ", options.block_bytes, " beside the ",
                                                   options.budget_bytes - budget.ceiling_bytes(), " already taken"));
  }
  ASSIGN_OR_RETURN(LoadedVolume loaded, LoadVolume(*directory, layout, space, max_slots));
  if (!budget.MakeRoom(layout.Charge(loaded.volume->index.num_slots()))) {
    return absl::FailedPreconditionError(absl::StrCat("file tier: files of other spaces in ", options.directory,
                                                      " exceed the budget and cannot be removed"));
  }
  auto tier = std::make_unique<FileTier>(options, layout, space, std::move(directory), budget, std::move(loaded));
  RETURN_IF_ERROR(tier->Start());
  return tier;
}

}  // namespace spillway
