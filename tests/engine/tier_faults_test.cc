// Faults of what tiers keep. Cached copies that are lost, late or refused change nothing; faults that nothing in the
// product could notice are planted and must be caught by the comparisons that the identity tests rest on.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/file_tier.h"
#include "kvstore/host_tier.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/temp_folder.h"
#include "tests/support/wrapped_host_tier.h"

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;
using ::spillway::testing::WrappedHostTier;

constexpr std::int32_t kMaxModelLen = 96;
constexpr std::int32_t kApart = 140;  // between the tokens of two prompts
constexpr std::size_t kPromptBlocks = 4;

const std::string& Folder() {
  static const std::string folder = [] {
    std::string path = ::testing::TempDir() + "spillway_tier_faults_" + std::to_string(::getpid());
    std::filesystem::create_directories(path);
    const absl::Status status = WriteRandomLlama(
        path,
        {.seed = 22, .layers = 2, .hidden = 48, .inner = 96, .max_positions = kMaxModelLen, .dtype = DType::kBF16});
    SPILLWAY_CHECK(status.ok()) << status;
    return path;
  }();
  return folder;
}

std::vector<std::int32_t> Prompt(std::int32_t first, std::size_t length = kPromptBlocks * kBlockTokens + 1) {
  std::vector<std::int32_t> prompt(length);
  for (std::size_t i = 0; i < length; ++i) prompt[i] = first + static_cast<std::int32_t>((i * i + i / 3) % 130);
  return prompt;
}

EngineOptions Pool(std::int64_t blocks) {
  EngineOptions options;
  options.hash_logits = true;
  options.overlap_steps = true;
  options.kv_cache_bytes = blocks * Rig::BlockBytes(Folder());
  return options;
}

std::unique_ptr<HostTier> MakeHost(Device& device, const KvLayout& layout, std::uint32_t blocks,
                                   HostTierOptions options = {}) {
  options.block_bytes = layout.block_bytes();
  options.num_blocks = blocks;
  return MakeHostTier(*device.Allocate(MemoryKind::kPinnedHost, blocks * layout.block_bytes()), options);
}

// Runs a prompt, has another push it out of the device tier, arms the fault, and runs the prompt again.
template <typename Faulty>
class Scenario {
 public:
  Scenario() {
    rig_ =
        Rig::Make(Folder(), Pool(6), {}, DTypeChoice::kAuto, nullptr, [this](Device& device, const KvLayout& layout) {
          auto faulty = std::make_unique<Faulty>(MakeHost(device, layout, 40), layout);
          faulty_ = faulty.get();
          return faulty;
        });
  }
  Collected Run(std::int32_t first, const std::string& salt = "") {
    SequenceRequest request = MakeRequest(Prompt(first), 2);
    request.cache_salt = salt;
    return rig_.RunOne(std::move(request));
  }
  void AwaitStored(std::size_t blocks) {
    while (rig_.host->stats().resident_blocks < static_cast<std::int64_t>(blocks)) std::this_thread::yield();
  }
  // True: the second answer has other bits than the first.
  bool IsSeen(bool is_armed) {
    const Collected before = Run(3);
    AwaitStored(kPromptBlocks);
    Run(3 + kApart);
    AwaitStored(2 * kPromptBlocks);
    faulty_->is_armed.store(is_armed);
    const std::int64_t hits = rig_.host->stats().hits;
    const Collected after = Run(3);
    EXPECT_GT(rig_.host->stats().hits, hits) << "nothing was restored: the test shows nothing";
    return before.hashes() != after.hashes();
  }
  Faulty& faulty() { return *faulty_; }
  const Rig& rig() const { return rig_; }

 private:
  Rig rig_;
  Faulty* faulty_ = nullptr;
};

// Remembers what was committed, so that it can be given out wrongly.
class RememberingTier : public WrappedHostTier {
 public:
  RememberingTier(std::unique_ptr<HostTier> real, const KvLayout& layout)
      : WrappedHostTier(std::move(real)), layout_(layout) {}
  HostSlot Commit(HostSlot slot, const BlockKey& key, std::span<const std::int32_t> tokens) override {
    {
      const std::lock_guard lock(mutex_);
      keys_.try_emplace(std::vector<std::int32_t>(tokens.begin(), tokens.end()), key);
    }
    return WrappedHostTier::Commit(std::move(slot), key, tokens);
  }

  std::atomic<bool> is_armed{false};

 protected:
  std::optional<BlockKey> KeyOf(const std::vector<std::int32_t>& tokens) const {
    const std::lock_guard lock(mutex_);
    const auto found = keys_.find(tokens);
    return found == keys_.end() ? std::nullopt : std::optional(found->second);
  }
  const KvLayout layout_;

 private:
  mutable std::mutex mutex_;
  std::map<std::vector<std::int32_t>, BlockKey> keys_;  // guarded by mutex_
};

// The blocks of two prompts trade places.
class SwappingTier : public RememberingTier {
 public:
  using RememberingTier::RememberingTier;
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    if (is_armed.load()) {
      std::vector<std::int32_t> others(tokens.begin(), tokens.end());
      const std::int32_t shift = others.front() < kApart ? kApart : -kApart;
      for (std::int32_t& token : others) token += shift;
      if (const auto other = KeyOf(others)) return RememberingTier::Find(*other, others);
    }
    return RememberingTier::Find(key, tokens);
  }
};

class RowZeroingTier : public RememberingTier {
 public:
  using RememberingTier::RememberingTier;
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    std::optional<HostSlot> found = RememberingTier::Find(key, tokens);
    if (found && is_armed.load()) {
      std::memset(found->bytes() + layout_.strip_offset(1, 1) + 5 * layout_.row_bytes(), 0, layout_.row_bytes());
    }
    return found;
  }
};

// Takes any block with equal tokens for the one that is asked for, whatever its key and so whatever its salt.
class SaltIgnoringTier : public RememberingTier {
 public:
  using RememberingTier::RememberingTier;
  std::optional<HostSlot> Find(const BlockKey& key, std::span<const std::int32_t> tokens) override {
    return RememberingTier::Find(Any(key, tokens), tokens);
  }
  bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const override {
    return RememberingTier::Contains(Any(key, tokens), tokens);
  }

 private:
  BlockKey Any(const BlockKey& key, std::span<const std::int32_t> tokens) const {
    if (!is_armed.load()) return key;
    return KeyOf(std::vector<std::int32_t>(tokens.begin(), tokens.end())).value_or(key);
  }
};

TEST(PlantedTierFault, TwoRestoredBlocksSwappedIsCaught) {
  EXPECT_FALSE(Scenario<SwappingTier>().IsSeen(/*is_armed=*/false));
  EXPECT_TRUE(Scenario<SwappingTier>().IsSeen(/*is_armed=*/true));
}

TEST(PlantedTierFault, OneRowZeroedIsCaught) {
  EXPECT_FALSE(Scenario<RowZeroingTier>().IsSeen(/*is_armed=*/false));
  EXPECT_TRUE(Scenario<RowZeroingTier>().IsSeen(/*is_armed=*/true));
}

// Equal tokens give equal bytes, so that only what was found can tell.
TEST(PlantedTierFault, ABlockOfAnotherSaltIsCaught) {
  for (const bool is_armed : {false, true}) {
    Scenario<SaltIgnoringTier> scenario;
    scenario.faulty().is_armed.store(is_armed);
    const Collected first = scenario.Run(3, "one");
    scenario.AwaitStored(kPromptBlocks);
    EXPECT_EQ(first.num_cached, 0);
    const Collected second = scenario.Run(3, "two");
    EXPECT_EQ(second.num_cached > 0, is_armed);
    EXPECT_EQ(second.hashes(), first.hashes());
  }
}

// A lower tier that loses, fails, delays and reorders. It never lies: what it cannot vouch for is an error.
class FaultyTier : public Tier {
 public:
  FaultyTier(std::unique_ptr<Tier> real, std::uint64_t seed)
      : real_(std::move(real)), random_(seed), thread_([this] { Deliver(); }) {}
  ~FaultyTier() override {
    real_.reset();  // nothing arrives any more
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
      changed_.notify_one();
    }
    thread_.join();
  }
  std::string_view name() const override { return real_->name(); }
  bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const override {
    return real_->Contains(key, tokens);
  }
  void Put(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<const std::byte> bytes,
           std::function<void(absl::Status)> done) override {
    if (Draw(10) == 0) return done(absl::ResourceExhaustedError("injected"));
    real_->Put(key, tokens, bytes, std::move(done));
  }
  void Get(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<std::byte> into,
           std::function<void(absl::Status)> done) override {
    const std::uint64_t fault = Draw(10);
    if (fault == 0) return done(absl::NotFoundError("injected"));
    real_->Get(key, tokens, into, [this, fault, into, done = std::move(done)](absl::Status status) {
      if (fault == 1 && !into.empty()) {  // what a checksum would find
        into[into.size() / 2] ^= std::byte{8};
        status = absl::DataLossError("injected");
      }
      if (fault == 2) status = absl::InternalError("injected");
      const std::lock_guard lock(mutex_);
      late_.emplace_back([done, status] { done(status); });
      changed_.notify_one();
    });
  }
  void Clear() override { real_->Clear(); }
  TierStats stats() const override { return real_->stats(); }

  std::atomic<int> num_gets{0};

 private:
  std::uint64_t Draw(std::uint64_t below) {
    const std::lock_guard lock(mutex_);
    return random_() % below;
  }
  // Hands over what has arrived, in any order, some of it only after a pause.
  void Deliver() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return is_stopping_ || !late_.empty(); });
      if (late_.empty()) return;
      if (random_() % 4 == 0) changed_.wait_for(lock, std::chrono::milliseconds(1), [this] { return is_stopping_; });
      std::vector<std::function<void()>> now = std::exchange(late_, {});
      std::ranges::shuffle(now, random_);
      lock.unlock();
      num_gets += static_cast<int>(now.size());
      for (const auto& deliver : now) deliver();
      lock.lock();
    }
  }

  std::unique_ptr<Tier> real_;
  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::mt19937_64 random_;
  std::vector<std::function<void()>> late_;
  bool is_stopping_ = false;
  std::thread thread_;
};

TEST(TierFaults, ALowerTierThatLosesFailsDelaysAndReordersChangesNothing) {
  constexpr int kTalks = 6;
  const auto request = [](int talk, int round) {
    return MakeRequest(Prompt(3 + talk * 17, 40 + static_cast<std::size_t>(7 * round)), 4);
  };
  std::vector<Collected> expected;
  {
    EngineOptions options;
    options.hash_logits = true;
    options.enable_prefix_caching = false;
    Rig rig = Rig::Make(Folder(), options);
    for (int round = 0; round < 4; ++round) {
      for (int talk = 0; talk < kTalks; ++talk) expected.push_back(rig.RunOne(request(talk, round)));
    }
  }
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    SCOPED_TRACE(seed);
    const TempFolder folder;
    FileTierOptions options;
    options.directory = folder.path() + "/kv";
    options.budget_bytes = 64LL << 20;
    options.block_bytes = static_cast<std::size_t>(Rig::BlockBytes(Folder()));
    options.space = "tier_faults_test";
    FaultyTier lower(*MakeFileTier(options), seed);
    Rig rig =
        Rig::Make(Folder(), Pool(7), {}, DTypeChoice::kAuto, nullptr, [&](Device& device, const KvLayout& layout) {
          return MakeHost(device, layout, 6, {.verify = KvVerify::kOn, .lower = &lower});
        });
    for (int pass = 0; pass < 2; ++pass) {
      std::size_t next = 0;
      for (int round = 0; round < 4; ++round) {
        std::vector<SequenceRequest> requests;
        for (int talk = 0; talk < kTalks; ++talk) requests.push_back(request(talk, round));
        for (const Collected& actual : rig.Run(std::move(requests))) {
          ASSERT_TRUE(actual.error.ok()) << actual.error;
          ASSERT_EQ(actual.hashes(), expected[next++].hashes());
        }
      }
    }
    rig.engine.reset();
    while (rig.host->stats().in_flight > 0) std::this_thread::yield();
    rig.host->CheckInvariants();
    EXPECT_GT(lower.num_gets.load(), 10) << "little came from files: the test shows nothing";
    std::size_t files = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(options.directory)) ++files;
    EXPECT_EQ(files, 2U) << "the lock and one file of blocks";
  }
}

}  // namespace
}  // namespace spillway
