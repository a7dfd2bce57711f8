#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "bench/tiers_bench.h"
#include "bench/waiter.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "kvstore/kv_store.h"

namespace spillway::tiers_bench {
namespace {

constexpr double kPacedBytesPerSecond = 500e6;
constexpr int kRounds = 41;
constexpr int kPacedRounds = 3;

// A KvStore over a host tier, and the keys of as many blocks as both hold.
class Places {
 public:
  Places(std::size_t block_bytes, std::uint32_t count, double link_bytes_per_second) : count_(count) {
    // One layer of one head, so many elements long.
    layout_ = {.num_layers = 1,
               .num_kv_heads = 1,
               .head_dim = static_cast<int>(block_bytes / kBlockTokens / 2 / 2),
               .dtype = DType::kBF16};
    SPILLWAY_CHECK(layout_.block_bytes() == block_bytes);
    host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, count * block_bytes),
                         {.block_bytes = block_bytes, .num_blocks = count});
    store_ = *KvStore::Make(*device_, *host_,
                            {.layout = layout_,
                             .num_blocks = count,
                             .pacing = {.bytes_per_second = link_bytes_per_second, .latency_seconds = 0},
                             .before_copy = nullptr},
                            [this] {
                              const std::lock_guard lock(mutex_);
                              has_mail_ = true;
                              arrived_.notify_one();
                            });
    const KeyChain chain("0");
    for (std::uint32_t i = 0; i < count * kBlockTokens; ++i) tokens_.push_back(static_cast<std::int32_t>(i));
    for (std::uint32_t i = 0; i < count; ++i) {
      keys_.push_back(chain.Next(i == 0 ? chain.root() : keys_.back(), TokensOf(i), ""));
    }
  }

  // Publishes every block. Seconds until the host tier has them all.
  double StoreAll() {
    std::vector<BlockRef> blocks;
    for (std::uint32_t i = 0; i < count_; ++i) {
      blocks.push_back(*store_->Take());
      std::memset(store_->view().pool + static_cast<std::size_t>(blocks.back().id()) * layout_.block_bytes(),
                  static_cast<int>(i % 251 + 1), layout_.block_bytes());
    }
    const double begin = Now();
    for (std::uint32_t i = 0; i < count_; ++i) store_->Publish(blocks[i], keys_[i], TokensOf(i));
    AwaitTransfers();
    const double seconds = Now() - begin;
    SPILLWAY_CHECK(host_->stats().resident_blocks == count_);
    KvStore::Release(blocks);
    return seconds;
  }

  // Forgets the device's copies and brings them all back. Seconds until the last one is ready.
  double RestoreAll() {
    store_->EvictCold();
    std::vector<KvStore::Restored> restored;
    restored.reserve(count_);
    const double begin = Now();
    for (std::uint32_t i = 0; i < count_; ++i) restored.push_back(*store_->Restore(keys_[i], TokensOf(i)));
    AwaitTransfers();
    const double seconds = Now() - begin;
    spans_.clear();
    for (std::uint32_t i = 0; i < count_; ++i) {
      std::byte* const bytes =
          store_->view().pool + static_cast<std::size_t>(restored[i].block.id()) * layout_.block_bytes();
      const auto wanted = static_cast<std::byte>(i % 251 + 1);
      SPILLWAY_CHECK(restored[i].restoring->state == Restoring::State::kReady && bytes[0] == wanted &&
                     bytes[layout_.block_bytes() - 1] == wanted);
      spans_.push_back({.to = bytes, .from = host_->Find(keys_[i], TokensOf(i))->bytes()});
    }
    while (!restored.empty()) restored.pop_back();
    return seconds;
  }

  // What a restore is held against: the copies of the last one, from the same slots to the same blocks in the same
  // order, by memcpy and on a stream, with nothing else to do.
  double Memcpy() const {
    const double begin = Now();
    for (const Span& span : spans_) std::memcpy(span.to, span.from, layout_.block_bytes());
    return Now() - begin;
  }
  double Streamed() const {
    const double begin = Now();
    for (const Span& span : spans_) stream_->Copy(span.to, span.from, layout_.block_bytes());
    SPILLWAY_CHECK(stream_->Record()->Await().ok());
    return Now() - begin;
  }

  double BookkeepingShare() const {
    const TierStats stats = host_->stats();
    return static_cast<double>(stats.bookkeeping_bytes) / static_cast<double>(stats.resident_bytes);
  }
  const KvStore& store() const { return *store_; }

 private:
  struct Span {
    std::byte* to = nullptr;
    const std::byte* from = nullptr;
  };

  std::span<const std::int32_t> TokensOf(std::uint32_t block) const {
    return std::span<const std::int32_t>(tokens_).subspan(std::size_t{block} * kBlockTokens, kBlockTokens);
  }
  void AwaitTransfers() {
    while (store_->has_transfers()) {
      std::unique_lock lock(mutex_);
      arrived_.wait(lock, [this] { return std::exchange(has_mail_, false); });
      lock.unlock();
      store_->Collect();
    }
  }

  const std::uint32_t count_;
  KvLayout layout_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  bool has_mail_ = false;
  std::unique_ptr<Device> device_ = *MakeCpuDevice({});
  std::unique_ptr<HostTier> host_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<Stream> stream_ = *device_->NewStream();
  std::vector<Span> spans_;  // of the last restore
  std::vector<std::int32_t> tokens_;
  std::vector<BlockKey> keys_;
};

}  // namespace

nlohmann::json MeasureCopies() {
  std::printf("whole blocks between the tiers, GB/s (medians of %d rounds)\n%-10s %-10s %8s %8s %9s %8s %8s %12s\n",
              kRounds, "block", "link", "memcpy", "stream", "restore", "store", "share", "bookkeeping");
  nlohmann::json rows = nlohmann::json::array();
  for (const double link : {0.0, kPacedBytesPerSecond}) {
    for (const std::size_t block_kib : {16U, 128U, 512U, 2048U}) {
      const std::size_t block_bytes = block_kib << 10U;
      const std::size_t total = std::size_t{link > 0 ? 32U : 192U} << 20U;
      const auto count = static_cast<std::uint32_t>(total / block_bytes);
      Places places(block_bytes, count, link);
      const double store = places.StoreAll();
      places.RestoreAll();  // tells which copies are made plainly
      std::vector<double> memcpys, streamed, restores, shares;
      for (int round = 0; round < (link > 0 ? kPacedRounds : kRounds); ++round) {
        memcpys.push_back(places.Memcpy());
        streamed.push_back(places.Streamed());
        restores.push_back(places.RestoreAll());
        const double limit = link > 0 ? static_cast<double>(total) / link : std::min(memcpys.back(), streamed.back());
        shares.push_back(limit / restores.back());
      }
      const auto rate = [&](double seconds) { return static_cast<double>(total) / seconds; };
      const double memcpy_rate = rate(Median(memcpys));
      const double streamed_rate = rate(Median(streamed));
      const double restore_rate = rate(Median(restores));
      const double share = Median(shares);
      std::printf("%6zu KiB %-10s %8.2f %8.2f %9.2f %8.2f %6.1f %% %10.2f %%\n", block_kib,
                  link > 0 ? "500 MB/s" : "unpaced", memcpy_rate / 1e9, streamed_rate / 1e9, restore_rate / 1e9,
                  rate(store) / 1e9, 100 * share, 100 * places.BookkeepingShare());
      nlohmann::json sizes = nlohmann::json::object();
      const TransferStats stats = places.store().transfer_stats(Transfer::Kind::kRestore);
      for (std::size_t i = 0; i < kNumCopySizes; ++i) {
        const CopyStats& size = stats.by_copy_size[i];
        if (size.copies > 0) {
          sizes[std::to_string(std::uint64_t{1} << i)] = {
              {"copies", size.copies}, {"blocks", size.blocks}, {"bytes", size.bytes}, {"seconds", size.seconds}};
        }
      }
      rows.push_back({{"block_bytes", block_bytes},
                      {"link_bytes_per_second", link},
                      {"memcpy_bytes_per_second", memcpy_rate},
                      {"stream_bytes_per_second", streamed_rate},
                      {"restore_bytes_per_second", restore_rate},
                      {"store_bytes_per_second", rate(store)},
                      {"share_of_limit", share},
                      {"bookkeeping_share", places.BookkeepingShare()},
                      {"restores_by_copy_size", sizes}});
    }
  }
  std::printf(
      "share: of the faster of two plain copies of the same spans in the same round, or of the paced link; store: into "
      "memory that was never "
      "touched\n\n");
  return rows;
}

}  // namespace spillway::tiers_bench
