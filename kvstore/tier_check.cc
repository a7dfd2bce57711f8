#include "kvstore/tier_check.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"
#include "kvstore/block_key.h"
#include "kvstore/kv_store.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

class Check {
 public:
  Check(Device& device, HostTier& host, const KvLayout& layout, int num_blocks)
      : device_(device), host_(host), layout_(layout), num_blocks_(num_blocks) {}

  absl::StatusOr<TierCheck> Run() {
    const double begin = Now();
    ASSIGN_OR_RETURN(staging_, device_.Allocate(MemoryKind::kPinnedHost, layout_.block_bytes()));
    ASSIGN_OR_RETURN(stream_, device_.NewStream());
    const KvStoreOptions options{
        .layout = layout_, .num_blocks = static_cast<std::uint32_t>(num_blocks_), .pacing = {}, .before_copy = nullptr};
    ASSIGN_OR_RETURN(store_, KvStore::Make(device_, host_, options, [this] {
                       const std::lock_guard lock(mutex_);
                       has_mail_ = true;
                       arrived_.notify_one();
                     }));
    MakeKeys();
    host_.Clear();
    TierCheck result;
    RETURN_IF_ERROR(WriteAndStore());
    RETURN_IF_ERROR(RestoreAndCompare("host"));
    result.host_blocks = num_blocks_;
    if (host_.lower() != nullptr) {
      RETURN_IF_ERROR(PutBelow());
      host_.Clear();
      RETURN_IF_ERROR(RestoreAndCompare(host_.lower()->name()));
      result.lower_blocks = num_blocks_;
    }
    host_.Clear();
    result.seconds = Now() - begin;
    return result;
  }

 private:
  void MakeKeys() {
    const KeyChain chain("spillway tier check");
    for (int i = 0; i < num_blocks_ * kBlockTokens; ++i) tokens_.push_back(i);
    for (int i = 0; i < num_blocks_; ++i) {
      keys_.push_back(chain.Next(i == 0 ? chain.root() : keys_.back(), TokensOf(i), ""));
    }
  }
  std::span<const std::int32_t> TokensOf(int block) const {
    return std::span<const std::int32_t>(tokens_).subspan(static_cast<std::size_t>(block) * kBlockTokens, kBlockTokens);
  }
  // No two words of a block are equal, nor those of two blocks.
  void FillExpected(int block, std::span<std::byte> into) const {
    for (std::size_t at = 0; at < into.size(); at += sizeof(std::uint64_t)) {
      const std::uint64_t word = (at + into.size() * static_cast<std::size_t>(block) + 1) * 0x9e3779b97f4a7c15U;
      std::memcpy(into.data() + at, &word, std::min(sizeof(word), into.size() - at));
    }
  }
  std::byte* BytesOf(const BlockRef& block) const {
    return store_->view().pool + static_cast<std::size_t>(block.id()) * layout_.block_bytes();
  }

  absl::Status WriteAndStore() {
    std::vector<BlockRef> blocks;
    for (int i = 0; i < num_blocks_; ++i) {
      blocks.push_back(*store_->Take());
      FillExpected(i, {staging_.get(), layout_.block_bytes()});
      stream_->Copy(BytesOf(blocks.back()), staging_.get(), layout_.block_bytes());
      RETURN_IF_ERROR(stream_->Record()->Await());
      store_->Publish(blocks.back(), keys_[static_cast<std::size_t>(i)], TokensOf(i));
    }
    // A threshold asks for more sightings.
    constexpr int kMostSightings = 1000;
    for (int i = 0; i < kMostSightings && !IsStored(); ++i) {
      AwaitTransfers();
      store_->Match(keys_, tokens_);
    }
    AwaitTransfers();
    KvStore::Release(blocks);
    store_->EvictCold();
    if (IsStored()) return absl::OkStatus();
    return absl::InternalError("host tier: a block that was offered to it is not there");
  }
  bool IsStored() const { return store_->CountBelow(keys_, tokens_) == keys_.size(); }

  absl::Status PutBelow() {
    std::vector<std::byte> bytes(layout_.block_bytes());
    for (int i = 0; i < num_blocks_; ++i) {
      FillExpected(i, bytes);
      std::promise<absl::Status> done;
      host_.lower()->Put(keys_[static_cast<std::size_t>(i)], TokensOf(i), bytes,
                         [&done](const absl::Status& status) { done.set_value(status); });
      RETURN_IF_ERROR(done.get_future().get());
    }
    while (host_.stats().in_flight > 0) std::this_thread::yield();  // write-through of the same blocks, just before
    return absl::OkStatus();
  }

  // Nothing of what is to come back is on the device.
  absl::Status WipeDevice() {
    store_->EvictCold();
    std::memset(staging_.get(), 0, layout_.block_bytes());
    std::vector<BlockRef> blocks;
    for (int i = 0; i < num_blocks_; ++i) {
      blocks.push_back(*store_->Take());
      stream_->Copy(BytesOf(blocks.back()), staging_.get(), layout_.block_bytes());
    }
    return stream_->Record()->Await();
  }

  absl::Status RestoreAndCompare(std::string_view tier) {
    RETURN_IF_ERROR(WipeDevice());
    std::vector<KvStore::Restored> restored;
    restored.reserve(static_cast<std::size_t>(num_blocks_));
    for (int i = 0; i < num_blocks_; ++i) {
      restored.push_back(*store_->Restore(keys_[static_cast<std::size_t>(i)], TokensOf(i)));
    }
    AwaitTransfers();
    absl::Status status;
    for (int i = 0; i < num_blocks_ && status.ok(); ++i) {
      status = Compare(tier, i, restored[static_cast<std::size_t>(i)]);
    }
    restored.clear();
    store_->EvictCold();
    return status;
  }
  absl::Status Compare(std::string_view tier, int number, const KvStore::Restored& restored) {
    const std::string what = absl::StrCat(std::string(tier), " tier: block ", number, " of ", num_blocks_);
    if (restored.restoring->state != Restoring::State::kReady) {
      return absl::InternalError(absl::StrCat(what, " was stored and does not come back"));
    }
    std::vector<std::byte> expected(layout_.block_bytes());
    FillExpected(number, expected);
    stream_->Copy(staging_.get(), BytesOf(restored.block), layout_.block_bytes());
    RETURN_IF_ERROR(stream_->Record()->Await());
    for (std::size_t at = 0; at < expected.size(); ++at) {
      if (staging_.get()[at] == expected[at]) continue;
      return absl::DataLossError(absl::StrCat(what, " differs at byte ", at, " of ", expected.size(), ": ",
                                              static_cast<int>(staging_.get()[at]), " came back, ",
                                              static_cast<int>(expected[at]), " was stored"));
    }
    return absl::OkStatus();
  }
  void AwaitTransfers() {
    while (store_->has_transfers()) {
      std::unique_lock lock(mutex_);
      arrived_.wait(lock, [this] { return std::exchange(has_mail_, false); });
      lock.unlock();
      store_->Collect();
    }
  }

  Device& device_;
  HostTier& host_;
  const KvLayout layout_;
  const int num_blocks_;
  Buffer staging_;
  std::unique_ptr<Stream> stream_;
  std::vector<std::int32_t> tokens_;
  std::vector<BlockKey> keys_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  bool has_mail_ = false;  // guarded by mutex_
  std::unique_ptr<KvStore> store_;
};

}  // namespace

absl::StatusOr<TierCheck> CheckTiers(Device& device, HostTier& host, const KvLayout& layout, int num_blocks) {
  return Check(device, host, layout, num_blocks).Run();
}

}  // namespace spillway
