#include "engine/engine_group.h"

#include <algorithm>
#include <mutex>
#include <optional>
#include <span>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kvstore/block_key.h"

namespace spillway {
namespace {

// Prefixes whose engine is remembered; then remembering starts over.
constexpr std::size_t kMaxRemembered = 256'000;

class EngineGroup : public Engine {
 public:
  explicit EngineGroup(std::vector<std::unique_ptr<Engine>> engines)
      : engines_(std::move(engines)), chain_(engines_.front()->options().prefix_hash_seed) {}

  absl::Status Submit(std::vector<SequenceRequest> requests) override {
    if (requests.empty()) return engines_.front()->Submit(std::move(requests));
    const std::vector<BlockKey> keys = chain_.Keys(requests.front().prompt, requests.front().cache_salt);
    requests.front().prompt_keys = keys;
    const std::size_t chosen = Choose(keys);
    absl::Status status = engines_[chosen]->Submit(std::move(requests));
    if (status.ok()) Remember(keys, chosen);
    return status;
  }
  void Cancel(std::uint64_t id) override {
    for (const auto& engine : engines_) engine->Cancel(id);  // the others do not know it
  }
  EngineStatus status() const override;
  const Model& model() const override { return engines_.front()->model(); }
  const EngineOptions& options() const override { return engines_.front()->options(); }
  std::int64_t capacity_tokens() const override { return engines_.front()->capacity_tokens(); }
  bool ResetPrefixCache() override {
    bool was_idle = true;
    for (const auto& engine : engines_) was_idle = engine->ResetPrefixCache() && was_idle;
    return was_idle;
  }

 private:
  std::size_t Choose(std::span<const BlockKey> keys) const;
  void Remember(std::span<const BlockKey> keys, std::size_t engine) {
    const std::lock_guard lock(mutex_);
    if (remembered_.size() + keys.size() > kMaxRemembered) remembered_.clear();
    for (const BlockKey& key : keys) remembered_.insert_or_assign(key, engine);
  }

  const std::vector<std::unique_ptr<Engine>> engines_;
  const KeyChain chain_;
  mutable std::mutex mutex_;
  absl::flat_hash_map<BlockKey, std::size_t> remembered_;  // guarded by mutex_
};

std::size_t EngineGroup::Choose(std::span<const BlockKey> keys) const {
  std::optional<std::size_t> known;
  {
    const std::lock_guard lock(mutex_);
    for (const BlockKey& key : keys) {  // a prefix that was forgotten ends the match
      const auto found = remembered_.find(key);
      if (found == remembered_.end()) break;
      known = found->second;
    }
  }
  std::vector<std::int32_t> loads;
  bool is_one_free = false;
  std::int32_t waiting_at_known = 0;
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    const EngineStatus status = engines_[i]->status();
    loads.push_back(status.num_running + status.num_waiting);
    if (i == known) waiting_at_known = status.num_waiting;
    is_one_free = is_one_free || status.num_waiting == 0;
  }
  if (known && (waiting_at_known == 0 || !is_one_free)) return *known;
  return static_cast<std::size_t>(std::ranges::min_element(loads) - loads.begin());
}

EngineStatus EngineGroup::status() const {
  EngineStatus sum;
  for (std::size_t i = 0; i < engines_.size(); ++i) {
    const EngineStatus status = engines_[i]->status();
    sum.num_running += status.num_running;
    sum.num_waiting += status.num_waiting;
    sum.kv_blocks_total += status.kv_blocks_total;
    sum.kv_blocks_used += status.kv_blocks_used;
    sum.kv_blocks_cached += status.kv_blocks_cached;
    sum.restored_blocks += status.restored_blocks;
    sum.restored_bytes += status.restored_bytes;
    sum.restore_seconds += status.restore_seconds;
    sum.stored_blocks += status.stored_blocks;
    sum.stored_bytes += status.stored_bytes;
    sum.store_seconds += status.store_seconds;
    sum.unstored_blocks += status.unstored_blocks;
    sum.evicted_blocks += status.evicted_blocks;
    sum.compute_seconds += status.compute_seconds;
    if (i == 0) sum.cost_model = status.cost_model;
    if (status.is_alive || !sum.is_alive) continue;
    sum.is_alive = false;
    sum.failure = absl::StrCat("engine ", i, " of ", engines_.size(), ": ", status.failure);
  }
  sum.kv_usage =
      sum.kv_blocks_total > 0 ? static_cast<double>(sum.kv_blocks_used) / static_cast<double>(sum.kv_blocks_total) : 0;
  return sum;
}

}  // namespace

std::unique_ptr<Engine> MakeEngineGroup(std::vector<std::unique_ptr<Engine>> engines) {
  SPILLWAY_CHECK(!engines.empty());
  if (engines.size() == 1) return std::move(engines.front());
  return std::make_unique<EngineGroup>(std::move(engines));
}

}  // namespace spillway
