#pragma once

// KvStore: the only type of kvstore/ that the engine sees: the device tier of one engine (a pool of blocks in one slab
// and the index of those whose content is known) over the host tier that all engines share.
//
//   Match       the longest run of known blocks at the head of a prompt, each held for the caller
//   Take        a block to write: a free one, else the coldest known one, which is forgotten (evicted)
//   Publish     a full block becomes findable, until evicted; it is written through to the host tier
//   Restore     a block that a lower tier has comes up; all who want it share one transfer
//   KeepHome    a running sequence's block gets a home slot in the host tier, so that it can leave the device and still
//               be read; PinHome: a copy that is there already becomes one
//   TakeCompanion  a host slot for what belongs to a running sequence and is no block
//   Collect     takes in what the transfers have finished
//
// A hit compares tokens. Engine thread only; transfers run on threads of their own and touch no bookkeeping.

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kernels.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"
#include "kvstore/host_tier.h"
#include "kvstore/lookup_stats.h"
#include "kvstore/prefix_index.h"
#include "kvstore/transfer_engine.h"

namespace spillway {

enum class PrefixCaching : std::uint8_t { kOn, kOff };  // off: nothing is published

// A block on its way up. Shared by its waiters; engine thread only.
struct Restoring {
  enum class State : std::uint8_t { kPending, kReady, kFailed };
  State state = State::kPending;
  BlockKey key;
  BlockId block{};
  std::uint64_t transfer = 0;
  std::uint32_t tag = 0;  // of the transfer
  int num_waiters = 0;
};

// The copy of a block in a home slot, held by the sequence whose block it is. Engine thread only; outlived by the
// store.
class HomeBlock {
 public:
  explicit HomeBlock(std::uint32_t& count) : count_(count) { ++count_; }
  ~HomeBlock() { --count_; }
  HomeBlock(const HomeBlock&) = delete;
  HomeBlock& operator=(const HomeBlock&) = delete;

  // The copy is complete: the device's block may go.
  bool is_ready() const { return static_cast<bool>(slot_); }
  const HostSlot& slot() const { return slot_; }
  void Fill(HostSlot slot) { slot_ = std::move(slot); }

 private:
  std::uint32_t& count_;
  HostSlot slot_;  // empty while the transfer has it
};

enum class WriteThrough : std::uint8_t { kYes, kNo };

struct KvStoreOptions {
  KvLayout layout;
  std::uint32_t num_blocks = 0;
  // Home blocks at most; those of all engines over one host tier must fit it together. 0: none.
  std::uint32_t max_home_blocks = 0;
  std::uint32_t max_companions = 0;  // slots of TakeCompanion at most, beside those
  PrefixCaching caching = PrefixCaching::kOn;
  LinkPacing pacing;
  double max_transfer_bytes_per_second = 0;                  // 0: no cap
  std::function<absl::Status(const Transfer&)> before_copy;  // fault injection, see TransferOptions
};

class KvStore {
 public:
  // `device` and `host` outlive the store. `wake`: see TransferEngine.
  static absl::StatusOr<std::unique_ptr<KvStore>> Make(Device& device, HostTier& host, const KvStoreOptions& options,
                                                       std::function<void()> wake);
  // Over someone else's transfers. `slab` holds num_blocks blocks; nothing is read from it or written to it here.
  static std::unique_ptr<KvStore> Make(Buffer slab, std::unique_ptr<BlockTransfers> transfers, HostTier& host,
                                       const KvStoreOptions& options);

  // keys[i] names tokens [16 i, 16 i + 16). At most keys.size() blocks.
  std::vector<BlockRef> Match(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens);
  // How many of keys[0], keys[1], ... lower tiers have, up to the first they lack. Advisory.
  std::size_t CountBelow(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens);
  const LookupStats& lookups() const { return lookups_; }  // of CountBelow
  std::optional<BlockRef> Take();                          // nullopt: every block is held
  // All 16 rows of every layer are written by work that is done. A key that is known already keeps its first block;
  // this one then stays private to its holders.
  void Publish(const BlockRef& block, const BlockKey& key, std::span<const std::int32_t> tokens,
               WriteThrough write_through = WriteThrough::kYes);

  // A home copy of a block whose rows are complete: ready at once where the host tier has it, else once its transfer is
  // collected. Null: no home slot is to be had; where num_home() is below max_home() that passes by itself.
  std::shared_ptr<HomeBlock> KeepHome(const BlockRef& block, const BlockKey& key, std::span<const std::int32_t> tokens);
  // The host tier's copy of `key`, sound and ready; null: there is none, or no more home blocks are allowed.
  std::shared_ptr<HomeBlock> PinHome(const BlockKey& key, std::span<const std::int32_t> tokens);
  // Releases back to front, so that a prefix's tail is evicted before its head.
  static void Release(std::vector<std::shared_ptr<HomeBlock>>& home);
  // A home slot for what a running sequence keeps beside its blocks; ready, its content unknown and never findable.
  // Null: no more are allowed, or no slot is to be had now.
  std::shared_ptr<HomeBlock> TakeCompanion();

  // Whoever used these blocks lets them go: the copies below are as recent as the device's, and a prefix's tail is
  // evicted before its head there too.
  void MarkUsed(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens);

  // A block for `key` and the state of its restore; when that is ready the block is published, when it has failed the
  // block's content means nothing. nullopt: no block could be taken.
  struct Restored {
    BlockRef block;
    std::shared_ptr<Restoring> restoring;
  };
  std::optional<Restored> Restore(const BlockKey& key, std::span<const std::int32_t> tokens);
  // One waiter less. The last one cancels a transfer that has not begun.
  void Detach(const std::shared_ptr<Restoring>& restoring);
  // True if a restore has ended since the last call. Feeds write-through.
  bool Collect();
  // Blocks that only transfers hold: they come back without anyone's doing.
  std::uint32_t num_returning() const;
  std::size_t num_restoring() const { return restoring_.size(); }  // blocks on their way up
  std::size_t num_storing() const { return num_storing_; }         // on their way down
  bool has_transfers() const { return outstanding_.size() != 0; }
  // Published blocks that wait for their write-through or are under way.
  std::size_t num_unstored() const { return unstored_.size() + num_storing_; }

  // Releases back to front, so that a prefix's tail is evicted before its head.
  static void Release(std::vector<BlockRef>& blocks);

  // Forgets every block that nobody holds; held ones stay.
  void EvictCold();

  KvView home_view() const { return {.pool = host_.slab(), .layout = options_.layout}; }  // by HostSlot::id
  std::uint32_t num_home() const { return num_home_; }
  std::uint32_t max_home() const { return options_.max_home_blocks; }
  std::uint32_t num_companions() const { return num_companions_; }
  std::uint32_t max_companions() const { return options_.max_companions; }
  std::uint32_t num_moving_home() const { return num_moving_home_; }
  // Not OK once a move home has failed, as it does only where the device has.
  const absl::Status& status() const { return status_; }

  KvView view() const { return {.pool = slab_.get(), .layout = options_.layout}; }
  const KvLayout& layout() const { return options_.layout; }
  std::uint32_t num_blocks() const { return pool_.num_blocks(); }
  std::uint32_t num_available() const { return pool_.num_free() + pool_.num_cold(); }  // what Take could give
  std::uint32_t num_held() const { return pool_.num_held(); }
  std::uint32_t num_cold() const { return pool_.num_cold(); }
  std::int64_t num_evicted() const { return num_evicted_; }  // blocks that Take has forgotten, since start
  HostTier& host() const { return host_; }
  PacedLink* link() const { return link_; }  // to the host tier; null over someone else's transfers
  TransferStats transfer_stats(Transfer::Kind kind) const { return transfers_->stats(kind); }  // any thread

  void CheckInvariants() const;

 private:
  KvStore(Buffer slab, HostTier& host, const KvStoreOptions& options);
  void QueueWriteThrough(BlockId block, const BlockKey& key, std::span<const std::int32_t> tokens);
  void FeedWriteThrough();
  void MarkUsed(std::span<const BlockKey> keys, std::span<const std::int32_t> tokens,
                std::vector<std::size_t>* not_below);
  void Evict(BlockId block);
  std::byte* BytesOf(BlockId block) const;

  // Restorings by their keys.
  struct HashOfKey {
    using is_transparent = void;
    std::size_t operator()(const BlockKey& key) const {  // a SHA-256: any of its bytes are as good as a hash of it
      std::size_t word = 0;
      std::memcpy(&word, key.bytes.data(), sizeof(word));
      return word;
    }
    std::size_t operator()(const std::shared_ptr<Restoring>& restoring) const { return (*this)(restoring->key); }
  };
  struct EqualKeys {
    using is_transparent = void;
    static const BlockKey& KeyOf(const BlockKey& key) { return key; }
    static const BlockKey& KeyOf(const std::shared_ptr<Restoring>& restoring) { return restoring->key; }
    bool operator()(const auto& left, const auto& right) const { return KeyOf(left) == KeyOf(right); }
  };

  // Transfers that are queued or under way, by their tags. Tags are used again, so that all lie close together.
  class OutstandingTransfers {
   public:
    struct Entry {
      BlockId block{};
      bool is_used = false;
      std::shared_ptr<Restoring> restoring;  // of a restore
      std::shared_ptr<HomeBlock> home;       // of a move home
    };
    std::size_t size() const { return entries_.size() - unused_.size(); }
    std::uint32_t Add(Entry entry);  // its tag
    Entry Remove(std::uint32_t tag);
    std::span<const Entry> entries() const { return entries_; }  // those that are not used as well

   private:
    std::vector<Entry> entries_;
    std::vector<std::uint32_t> unused_;  // tags
  };
  struct Unstored {  // a published block that waits for its write-through; it may be evicted meanwhile
    BlockId block{};
    BlockKey key;
    PrefixIndex::Tokens tokens{};
  };

  const Buffer slab_;
  const KvStoreOptions options_;
  HostTier& host_;
  std::uint32_t num_home_ = 0;  // HomeBlocks alive
  std::uint32_t num_moving_home_ = 0;
  std::uint32_t num_companions_ = 0;  // slots of TakeCompanion that are held
  absl::Status status_;
  BlockPool pool_;
  PrefixIndex index_;
  std::deque<Unstored> unstored_;
  absl::flat_hash_set<BlockKey> storing_keys_;  // of unstored_ and of stores under way
  std::uint32_t num_storing_ = 0;
  std::int64_t num_evicted_ = 0;
  LookupStats lookups_;
  absl::flat_hash_set<std::shared_ptr<Restoring>, HashOfKey, EqualKeys> restoring_;
  OutstandingTransfers outstanding_;
  PacedLink* link_ = nullptr;                  // of transfers_
  std::unique_ptr<BlockTransfers> transfers_;  // last: its records release into the pool
};

}  // namespace spillway
