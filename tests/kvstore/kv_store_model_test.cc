// Two KvStores over one host tier under 100,000 random operations, beside a model made of maps. A block's bytes say
// which block of which prompt they are, so whatever is found can be told to be right.

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/check.h"
#include "kvstore/kv_store.h"

namespace spillway {
namespace {

constexpr KvLayout kLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 8, .dtype = DType::kF32};
constexpr std::uint32_t kDeviceBlocks = 24;
constexpr std::uint32_t kHostBlocks = 40;
constexpr int kPrompts = 8;
constexpr int kLongest = 11;  // blocks
constexpr int kOperations = 100'000;

// Prompts 2 k and 2 k + 1 begin alike: they differ from their third block on.
class Prompts {
 public:
  Prompts() {
    const KeyChain chain("0");
    for (int p = 0; p < kPrompts; ++p) {
      for (int i = 0; i < kLongest; ++i) {
        for (int t = 0; t < kBlockTokens; ++t) tokens_[p].push_back(Identity(p, i) * 100 + t);
        keys_[p].push_back(
            chain.Next(i == 0 ? chain.root() : keys_[p].back(), TokensOf(p, i), p % 3 == 0 ? "salt" : ""));
      }
    }
  }
  // Equal for blocks of equal content.
  static int Identity(int prompt, int block) {
    return block < 2 && prompt % 3 != 0 ? 1 + block : 10 + prompt * 20 + block;
  }
  std::span<const BlockKey> Keys(int prompt, int count) const {
    return std::span(keys_[prompt]).first(static_cast<std::size_t>(count));
  }
  std::span<const std::int32_t> Tokens(int prompt) const { return tokens_[prompt]; }
  std::span<const std::int32_t> TokensOf(int prompt, int block) const {
    return std::span(tokens_[prompt]).subspan(static_cast<std::size_t>(block) * kBlockTokens, kBlockTokens);
  }
  const BlockKey& Key(int prompt, int block) const { return keys_[prompt][static_cast<std::size_t>(block)]; }

 private:
  std::vector<std::int32_t> tokens_[kPrompts];
  std::vector<BlockKey> keys_[kPrompts];
};

// One store, who holds what in it, and what it must therefore find.
class Actor {
 public:
  Actor(Device& device, HostTier& host, const Prompts& prompts, std::mt19937_64& random)
      : prompts_(prompts),
        random_(random),
        store_(*KvStore::Make(device, host,
                              {.layout = kLayout, .num_blocks = kDeviceBlocks, .pacing = {}, .before_copy = nullptr},
                              [] {})) {}

  void Act() {
    switch (Draw(16)) {
      case 0:
      case 1:
      case 2:
      case 3:
        return Admit();
      case 4:
      case 5:
      case 6:
        return Grow();
      case 7:
      case 8:
      case 9:
        return Release();
      case 10:
        return Abandon();
      case 11:
        if (Draw(40) == 0) EvictCold();
        return;
      default:
        return Collect();
    }
  }
  void ReleaseAll() {
    while (!holders_.empty()) {
      Detach(holders_.back());
      KvStore::Release(holders_.back().blocks);
      holders_.pop_back();
    }
    while (store_->has_transfers()) store_->Collect();
  }
  void Check() const {
    store_->CheckInvariants();
    SPILLWAY_CHECK(store_->num_available() + store_->num_held() == kDeviceBlocks);
    for (const Holder& holder : holders_) {
      for (const BlockRef& block : holder.blocks) SPILLWAY_CHECK(static_cast<bool>(block));
    }
  }
  const KvStore& store() const { return *store_; }

  std::map<const char*, int> counts;

 private:
  // A sequence: blocks [0, published) are complete, the rest come up. One that was published second under its key is
  // private to its holder.
  struct Holder {
    int prompt = 0;
    std::vector<BlockRef> blocks;
    std::vector<bool> is_findable;  // of those complete
    std::vector<std::shared_ptr<Restoring>> restoring;
    int published() const { return static_cast<int>(blocks.size() - restoring.size()); }
  };

  std::uint64_t Draw(std::uint64_t below) { return random_() % below; }
  Holder* Any() { return holders_.empty() ? nullptr : &holders_[Draw(holders_.size())]; }
  std::byte* BytesOf(const BlockRef& block) const {
    return store_->view().pool + static_cast<std::size_t>(block.id()) * kLayout.block_bytes();
  }
  void Fill(const BlockRef& block, int prompt, int index) const {
    std::vector<std::int32_t> words(kLayout.block_bytes() / 4);
    for (std::size_t i = 0; i < words.size(); ++i)
      words[i] = Prompts::Identity(prompt, index) * 1000 + static_cast<std::int32_t>(i);
    std::memcpy(BytesOf(block), words.data(), kLayout.block_bytes());
  }
  void ExpectContent(const BlockRef& block, int prompt, int index) const {
    std::vector<std::int32_t> words(kLayout.block_bytes() / 4);
    std::memcpy(words.data(), BytesOf(block), kLayout.block_bytes());
    for (std::size_t i = 0; i < words.size(); ++i) {
      ASSERT_EQ(words[i], Prompts::Identity(prompt, index) * 1000 + static_cast<std::int32_t>(i))
          << "prompt " << prompt << ", block " << index << ", word " << i;
    }
  }
  bool IsFindable(int prompt, int index, const BlockRef& block) const {
    std::vector<BlockRef> found = store_->Match(prompts_.Keys(prompt, index + 1), prompts_.Tokens(prompt));
    const bool is_it = static_cast<int>(found.size()) == index + 1 && found.back().id() == block.id();
    KvStore::Release(found);
    return is_it;
  }
  // How much of a prompt is held findable: so much a Match must find.
  int MustFind(int prompt, int length) const {
    const auto is_held = [&](int block) {
      return std::ranges::any_of(holders_, [&](const Holder& holder) {
        return block < holder.published() && holder.is_findable[static_cast<std::size_t>(block)] &&
               prompts_.Key(holder.prompt, block) == prompts_.Key(prompt, block);
      });
    };
    int count = 0;
    while (count < length && is_held(count)) ++count;
    return count;
  }

  void Admit() {
    if (holders_.size() >= 5) return;
    Holder holder{.prompt = static_cast<int>(Draw(kPrompts)), .blocks = {}, .is_findable = {}, .restoring = {}};
    const int length = 1 + static_cast<int>(Draw(kLongest));
    holder.blocks = store_->Match(prompts_.Keys(holder.prompt, length), prompts_.Tokens(holder.prompt));
    const int found = static_cast<int>(holder.blocks.size());
    EXPECT_GE(found, MustFind(holder.prompt, length));
    for (int i = 0; i < found; ++i) ExpectContent(holder.blocks[static_cast<std::size_t>(i)], holder.prompt, i);
    holder.is_findable.assign(holder.blocks.size(), true);
    counts["matched"] += found;
    const auto missing = prompts_.Keys(holder.prompt, length).subspan(static_cast<std::size_t>(found));
    const auto tokens = prompts_.Tokens(holder.prompt).subspan(static_cast<std::size_t>(found) * kBlockTokens);
    const auto below = static_cast<int>(store_->CountBelow(missing, tokens));
    for (int i = 0; i < below; ++i) {
      auto restored =
          store_->Restore(missing[static_cast<std::size_t>(i)], prompts_.TokensOf(holder.prompt, found + i));
      if (!restored) break;
      holder.blocks.push_back(std::move(restored->block));
      holder.restoring.push_back(std::move(restored->restoring));
    }
    holders_.push_back(std::move(holder));
  }
  void Grow() {
    Holder* const holder = Any();
    if (holder == nullptr || !holder->restoring.empty()) return;
    const int index = static_cast<int>(holder->blocks.size());
    if (index == kLongest) return;
    std::optional<BlockRef> taken = store_->Take();
    if (!taken) return;
    for (const Holder& other : holders_) {
      for (const BlockRef& block : other.blocks) ASSERT_NE(block.id(), taken->id()) << "taken while held";
    }
    Fill(*taken, holder->prompt, index);
    store_->Publish(*taken, prompts_.Key(holder->prompt, index), prompts_.TokensOf(holder->prompt, index));
    holder->is_findable.push_back(IsFindable(holder->prompt, index, *taken));
    holder->blocks.push_back(*std::move(taken));
    ++counts["published"];
  }
  void Release() {
    if (holders_.empty()) return;
    const std::size_t which = Draw(holders_.size());
    Holder& holder = holders_[which];
    if (!holder.restoring.empty()) return;
    store_->MarkUsed(prompts_.Keys(holder.prompt, holder.published()), prompts_.Tokens(holder.prompt));
    KvStore::Release(holder.blocks);
    holders_.erase(holders_.begin() + static_cast<std::ptrdiff_t>(which));
  }
  // Gives up a load under way.
  void Abandon() {
    Holder* const holder = Any();
    if (holder == nullptr || holder->restoring.empty()) return;
    Detach(*holder);
    while (static_cast<int>(holder->blocks.size()) > holder->published()) holder->blocks.pop_back();
    KvStore::Release(holder->blocks);
    holders_.erase(holders_.begin() + (holder - holders_.data()));
    ++counts["abandoned"];
  }
  void Detach(Holder& holder) {
    for (const auto& restoring : holder.restoring) store_->Detach(restoring);
    while (!holder.restoring.empty()) {
      holder.restoring.pop_back();
      holder.blocks.pop_back();
    }
  }
  void EvictCold() {
    store_->EvictCold();
    EXPECT_EQ(store_->num_cold(), 0U);
  }
  void Collect() {
    store_->Collect();
    for (Holder& holder : holders_) {
      const auto is_pending = [](const auto& each) { return each->state == Restoring::State::kPending; };
      if (holder.restoring.empty() || std::ranges::any_of(holder.restoring, is_pending)) continue;
      const int first = holder.published();
      int sound = 0;
      for (const auto& each : holder.restoring) {
        if (each->state != Restoring::State::kReady) break;
        const BlockRef& block = holder.blocks[static_cast<std::size_t>(first + sound)];
        ExpectContent(block, holder.prompt, first + sound);
        holder.is_findable.push_back(IsFindable(holder.prompt, first + sound, block));
        ++sound;
      }
      counts["restored"] += sound;
      counts["lost"] += static_cast<int>(holder.restoring.size()) - sound;
      holder.restoring.clear();
      while (static_cast<int>(holder.blocks.size()) > first + sound) holder.blocks.pop_back();
    }
  }

  const Prompts& prompts_;
  std::mt19937_64& random_;
  std::unique_ptr<KvStore> store_;
  std::vector<Holder> holders_;
};

TEST(KvStoreModel, TwoStoresOverOneHostTierAgreeWithMaps) {
  const std::uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  const Prompts prompts;
  std::unique_ptr<Device> device = *MakeCpuDevice({.num_workers = 1, .before_item = nullptr});
  const std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, kHostBlocks * kLayout.block_bytes()),
                   {.block_bytes = kLayout.block_bytes(), .num_blocks = kHostBlocks, .verify = KvVerify::kOn});
  {
    Actor actors[2] = {{*device, *host, prompts, random}, {*device, *host, prompts, random}};
    // Transfers take their own time: where they are slow, more operations pass before enough of them were seen.
    const auto has_seen_enough = [&] {
      return host->stats().evictions > 0 &&
             std::ranges::all_of(actors, [](Actor& actor) { return actor.counts["restored"] > 100; });
    };
    for (int i = 0; i < kOperations || (i < 50 * kOperations && !has_seen_enough()); ++i) {
      if (::testing::Test::HasFatalFailure()) break;
      Actor& actor = actors[random() % 2];
      actor.Act();
      actor.Check();
      if (i % 16 == 0) host->CheckInvariants();
      if (random() % 5000 == 0) host->Clear();
    }
    for (Actor& actor : actors) {
      actor.ReleaseAll();
      EXPECT_EQ(actor.store().num_held(), 0U);
      for (const char* what : {"matched", "published", "restored", "abandoned"}) {
        EXPECT_GT(actor.counts[what], 100) << what << ": the test shows nothing";
      }
    }
  }
  EXPECT_EQ(host->stats().in_flight, 0);
  EXPECT_EQ(host->stats().checksum_failures, 0);
  EXPECT_GT(host->stats().evictions, 0);
  host->CheckInvariants();
}

}  // namespace
}  // namespace spillway
