#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "kernels/check.h"

namespace spillway {
namespace {

std::int32_t BlocksFor(std::int32_t num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

}  // namespace

Scheduler::Scheduler(KvStore& store, const KeyChain& chain, const Options& options, EngineObserver* observer)
    : store_(store), chain_(chain), options_(options), observer_(observer) {}

Scheduler::~Scheduler() {
  for (Sequence* const sequence : All()) Remove(sequence);
}

void Scheduler::Add(std::unique_ptr<Sequence> sequence) {
  by_id_[sequence->request.id] = sequence.get();
  waiting_.push_back(std::move(sequence));
}

StepPlan Scheduler::Plan(double now) {
  StepPlan plan;
  for (const auto& sequence : running_) sequence->num_planned = 0;
  // Preemption shortens running_ from its end while these loops walk it.
  for (const bool decoding : {true, false}) {
    for (std::size_t i = 0; i < running_.size(); ++i) {
      Sequence& sequence = *running_[i];
      if ((sequence.num_uncomputed() == 1) != decoding || sequence.num_planned > 0) continue;
      const std::int32_t chunk = ChunkOf(sequence, plan);
      if (chunk > 0 && Reserve(sequence, chunk, plan)) Schedule(sequence, chunk, plan);
    }
  }
  if (plan.num_preempted == 0) AdmitReady(plan, now);
  if (plan.num_preempted == 0) Admit(plan, now);
  return plan;
}

std::int32_t Scheduler::ChunkOf(const Sequence& sequence, const StepPlan& plan) const {
  std::int32_t chunk = std::min(sequence.num_uncomputed(), options_.max_num_batched_tokens - plan.num_tokens);
  if (options_.long_prefill_token_threshold > 0) chunk = std::min(chunk, options_.long_prefill_token_threshold);
  return chunk;
}

// Holds blocks for the sequence's next num_tokens, at the cost of loads and of newer runners. False: it had to go
// itself, or blocks are on their way back and it waits for them.
bool Scheduler::Reserve(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan) {
  const auto wanted = static_cast<std::size_t>(BlocksFor(sequence.num_computed + num_tokens));
  while (sequence.blocks.size() < wanted) {
    std::optional<BlockRef> block = store_.Take();
    if (block) {
      sequence.blocks.push_back(*std::move(block));
      continue;
    }
    if (RevokeNewestLoad()) continue;
    if (store_.num_returning() > 0) return false;
    const bool is_newest = running_.back().get() == &sequence;
    SPILLWAY_CHECK(!is_newest || running_.size() > 1) << "a sequence that was accepted does not fit the pool alone";
    PreemptNewest(plan);
    if (is_newest) return false;
  }
  return true;
}

bool Scheduler::RevokeNewestLoad() {
  if (!loading_.empty()) {
    std::unique_ptr<Sequence> revoked = std::move(loading_.back());
    loading_.pop_back();
    BackToWaiting(std::move(revoked));
    return true;
  }
  if (!ready_.empty()) {
    std::unique_ptr<Sequence> revoked = std::move(ready_.back());
    ready_.pop_back();
    BackToWaiting(std::move(revoked));
    return true;
  }
  return false;
}

void Scheduler::PreemptNewest(StepPlan& plan) {
  std::unique_ptr<Sequence> victim = std::move(running_.back());
  running_.pop_back();
  if (victim->num_planned > 0) Unschedule(*victim, plan);
  ++plan.num_preempted;
  BackToWaiting(std::move(victim));
}

void Scheduler::BackToWaiting(std::unique_ptr<Sequence> sequence) {
  GiveUpBlocks(*sequence);
  waiting_.push_front(std::move(sequence));
}

void Scheduler::GiveUpBlocks(Sequence& sequence) {
  Unclaim(sequence);
  for (const auto& restoring : sequence.restoring) store_.Detach(restoring);
  sequence.restoring.clear();
  KvStore::Release(sequence.blocks);
  if (!sequence.was_scheduled) sequence.num_cached_below = 0;
  sequence.num_computed = 0;
  sequence.num_published = 0;
}

void Scheduler::Schedule(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan) {
  sequence.num_planned = num_tokens;
  plan.num_tokens += num_tokens;
  if (sequence.num_uncomputed() > 1) plan.num_prefill_tokens += num_tokens;
  plan.sequences.push_back({.sequence = &sequence, .samples = num_tokens == sequence.num_uncomputed()});
}

void Scheduler::Unschedule(Sequence& sequence, StepPlan& plan) {
  std::erase_if(plan.sequences, [&](const PlannedSequence& planned) { return planned.sequence == &sequence; });
  plan.num_tokens -= sequence.num_planned;
  if (sequence.num_uncomputed() > 1) plan.num_prefill_tokens -= sequence.num_planned;
  sequence.num_planned = 0;
}

// Room for all its known tokens; its outputs are taken on credit. A sequence alone always has room: it was accepted
// because it fits the pool.
bool Scheduler::HasRoomFor(const Sequence& sequence, std::size_t num_held_blocks) const {
  if (running_.empty() && loading_.empty() && ready_.empty()) return true;
  return static_cast<std::size_t>(BlocksFor(sequence.size())) <= num_held_blocks + store_.num_available();
}

void Scheduler::AdmitReady(StepPlan& plan, double now) {
  while (!ready_.empty() && plan.num_tokens < options_.max_num_batched_tokens &&
         num_running() < options_.max_num_seqs) {
    if (!running_.empty() && !HasRoomFor(*ready_.front(), ready_.front()->blocks.size())) return;
    std::unique_ptr<Sequence> sequence = std::move(ready_.front());
    ready_.pop_front();
    Run(std::move(sequence), plan, now);
  }
}

void Scheduler::Admit(StepPlan& plan, double now) {
  for (std::size_t i = 0; i < waiting_.size();) {
    if (plan.num_tokens >= options_.max_num_batched_tokens || num_running() + num_loading() >= options_.max_num_seqs)
      return;
    Sequence& sequence = *waiting_[i];
    GrowKeys(sequence);
    // At least the last token is computed, since its logits are wanted.
    const bool matches = options_.enable_prefix_caching && !sequence.request.bypass_prefix_cache;
    const auto matchable = matches ? static_cast<std::size_t>((sequence.size() - 1) / kBlockTokens) : 0;
    const auto keys = std::span<const BlockKey>(sequence.keys).first(matchable);
    sequence.blocks = store_.Match(keys, sequence.tokens);
    const auto missing = keys.subspan(sequence.blocks.size());
    if (!missing.empty() && claims_.contains(missing.front())) {
      KvStore::Release(sequence.blocks);
      ++i;  // a running sequence will publish that block; others may pass meanwhile
      continue;
    }
    if (!HasRoomFor(sequence, sequence.blocks.size())) {
      KvStore::Release(sequence.blocks);
      return;
    }
    sequence.num_published = static_cast<std::int32_t>(sequence.blocks.size());
    sequence.num_computed = sequence.num_published * kBlockTokens;
    if (!sequence.was_scheduled && observer_ != nullptr && matches) {
      observer_->OnPrefixQuery(sequence.num_prompt, sequence.num_computed);
    }
    std::unique_ptr<Sequence> admitted = std::move(waiting_[i]);
    waiting_.erase(waiting_.begin() + static_cast<std::ptrdiff_t>(i));
    const bool is_loading = StartLoading(sequence, missing);
    if (!sequence.was_scheduled && observer_ != nullptr && matches) {
      observer_->OnPrefixQueryBelow(static_cast<std::int64_t>(missing.size()) * kBlockTokens,
                                    static_cast<std::int64_t>(sequence.restoring.size()) * kBlockTokens);
    }
    if (is_loading) {
      loading_.push_back(std::move(admitted));
    } else {
      Run(std::move(admitted), plan, now);
    }
  }
}

// Brings up what lower tiers have of the blocks that follow; false if they have nothing.
bool Scheduler::StartLoading(Sequence& sequence, std::span<const BlockKey> below) {
  const auto first = static_cast<std::size_t>(sequence.num_computed);
  const auto tokens = std::span<const std::int32_t>(sequence.tokens).subspan(first);
  const std::size_t count = store_.CountBelow(below, tokens);
  for (std::size_t i = 0; i < count; ++i) {
    auto restored = store_.Restore(below[i], tokens.subspan(i * kBlockTokens, kBlockTokens));
    if (!restored) break;
    sequence.blocks.push_back(std::move(restored->block));
    sequence.restoring.push_back(std::move(restored->restoring));
  }
  return !sequence.restoring.empty();
}

void Scheduler::Loaded() {
  for (std::size_t i = 0; i < loading_.size();) {
    Sequence& sequence = *loading_[i];
    const auto is_pending = [](const auto& each) { return each->state == Restoring::State::kPending; };
    if (std::ranges::any_of(sequence.restoring, is_pending)) {
      ++i;
      continue;
    }
    const auto is_lost = [](const auto& each) { return each->state == Restoring::State::kFailed; };
    const auto lost = std::ranges::find_if(sequence.restoring, is_lost);
    const auto num_sound = static_cast<std::int32_t>(lost - sequence.restoring.begin());
    sequence.num_published += num_sound;
    if (!sequence.was_scheduled) sequence.num_cached_below = num_sound * kBlockTokens;
    sequence.num_computed = sequence.num_published * kBlockTokens;
    sequence.restoring.clear();
    while (static_cast<std::int32_t>(sequence.blocks.size()) > sequence.num_published) sequence.blocks.pop_back();
    ready_.push_back(std::move(loading_[i]));
    loading_.erase(loading_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void Scheduler::Run(std::unique_ptr<Sequence> admitted, StepPlan& plan, double now) {
  Sequence& sequence = *admitted;
  if (!sequence.was_scheduled) {
    sequence.was_scheduled = true;
    sequence.scheduled_at = now;
    sequence.num_cached = sequence.num_computed;
    if (sequence.request.sink) sequence.request.sink->OnScheduled(sequence.num_cached);
  }
  running_.push_back(std::move(admitted));
  Claim(sequence);
  const std::int32_t chunk = ChunkOf(sequence, plan);
  if (Reserve(sequence, chunk, plan)) Schedule(sequence, chunk, plan);
}

void Scheduler::Computed(const StepPlan& plan) {
  for (const PlannedSequence& planned : plan.sequences) {
    Sequence& sequence = *planned.sequence;
    sequence.num_computed += sequence.num_planned;
    sequence.num_planned = 0;
    GrowKeys(sequence);
    const std::int32_t full = sequence.num_computed / kBlockTokens;
    for (; sequence.num_published < full; ++sequence.num_published) {
      const auto i = static_cast<std::size_t>(sequence.num_published);
      const auto tokens = std::span<const std::int32_t>(sequence.tokens).subspan(i * kBlockTokens, kBlockTokens);
      store_.Publish(sequence.blocks[i], sequence.keys[i], tokens);
      if (sequence.num_published < sequence.num_claimed && --claims_[sequence.keys[i]] == 0)
        claims_.erase(sequence.keys[i]);
    }
  }
}

std::unique_ptr<Sequence> Scheduler::Remove(Sequence* sequence) {
  by_id_.erase(sequence->request.id);
  const auto is_it = [&](const std::unique_ptr<Sequence>& each) { return each.get() == sequence; };
  std::unique_ptr<Sequence> removed;
  if (const auto running = std::ranges::find_if(running_, is_it); running != running_.end()) {
    removed = std::move(*running);
    running_.erase(running);
  } else if (const auto loading = std::ranges::find_if(loading_, is_it); loading != loading_.end()) {
    removed = std::move(*loading);
    loading_.erase(loading);
  } else if (const auto ready = std::ranges::find_if(ready_, is_it); ready != ready_.end()) {
    removed = std::move(*ready);
    ready_.erase(ready);
  } else {
    const auto waiting = std::ranges::find_if(waiting_, is_it);
    SPILLWAY_CHECK(waiting != waiting_.end());
    removed = std::move(*waiting);
    waiting_.erase(waiting);
  }
  GiveUpBlocks(*removed);
  return removed;
}

void Scheduler::GrowKeys(Sequence& sequence) const {
  if (!options_.enable_prefix_caching) {
    sequence.keys.resize(static_cast<std::size_t>(sequence.size() / kBlockTokens));
    return;
  }
  while (static_cast<std::int32_t>(sequence.keys.size() + 1) * kBlockTokens <= sequence.size()) {
    const std::size_t i = sequence.keys.size();
    const BlockKey& parent = i == 0 ? chain_.root() : sequence.keys.back();
    const auto tokens = std::span<const std::int32_t>(sequence.tokens).subspan(i * kBlockTokens, kBlockTokens);
    sequence.keys.push_back(chain_.Next(parent, tokens, sequence.request.cache_salt));
  }
}

void Scheduler::Claim(Sequence& sequence) {
  if (!options_.enable_prefix_caching) return;
  sequence.num_claimed = static_cast<std::int32_t>(sequence.keys.size());
  for (std::int32_t i = sequence.num_published; i < sequence.num_claimed; ++i)
    ++claims_[sequence.keys[static_cast<std::size_t>(i)]];
}

void Scheduler::Unclaim(Sequence& sequence) {
  for (std::int32_t i = sequence.num_published; i < sequence.num_claimed; ++i) {
    const BlockKey& key = sequence.keys[static_cast<std::size_t>(i)];
    if (--claims_[key] == 0) claims_.erase(key);
  }
  sequence.num_claimed = 0;
}

std::vector<Sequence*> Scheduler::All() const {
  std::vector<Sequence*> all;
  all.reserve(by_id_.size());
  for (const auto& sequence : running_) all.push_back(sequence.get());
  for (const auto& sequence : ready_) all.push_back(sequence.get());
  for (const auto& sequence : loading_) all.push_back(sequence.get());
  for (const auto& sequence : waiting_) all.push_back(sequence.get());
  return all;
}

Sequence* Scheduler::Find(std::uint64_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : found->second;
}

void Scheduler::CheckInvariants() const {
  store_.CheckInvariants();
  SPILLWAY_CHECK(by_id_.size() == running_.size() + ready_.size() + loading_.size() + waiting_.size());
  for (const auto& sequence : waiting_) {
    SPILLWAY_CHECK(sequence->blocks.empty() && sequence->num_computed == 0 && sequence->num_claimed == 0);
  }
  for (const auto& sequence : loading_) {
    const auto published = static_cast<std::size_t>(sequence->num_published);
    SPILLWAY_CHECK(sequence->blocks.size() == published + sequence->restoring.size() && sequence->num_claimed == 0);
  }
  for (const auto& sequence : running_) {
    const auto held = static_cast<std::int32_t>(sequence->blocks.size()) * kBlockTokens;
    SPILLWAY_CHECK(sequence->num_computed + sequence->num_planned <= held);
    SPILLWAY_CHECK(sequence->num_published * kBlockTokens <= sequence->num_computed);
  }
  SPILLWAY_CHECK(!running_.empty() || claims_.empty());
  SPILLWAY_CHECK(has_work() || store_.has_transfers() || store_.num_held() == 0);
}

}  // namespace spillway
