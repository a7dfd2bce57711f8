#include "engine/scheduler.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "kernels/check.h"

namespace spillway {
Scheduler::Scheduler(KvStore& store, const KeyChain& chain, const Options& options, EngineObserver* observer,
                     const CostModel* costs)
    : store_(store),
      keeper_(store, options.kept_inputs),
      chain_(chain),
      options_(options),
      observer_(observer),
      costs_(costs) {}

Scheduler::~Scheduler() {
  for (Sequence* const sequence : All()) Remove(sequence);
}

void Scheduler::Add(std::unique_ptr<Sequence> added) {
  Sequence& sequence = *added;
  sequence.rank = options_.policy == SchedulingPolicy::kPriority ? sequence.request.priority : 0;
  sequence.arrival = ++num_arrived_;
  by_id_[sequence.request.id] = std::move(added);
  Wait(sequence);
}

void Scheduler::Wait(Sequence& sequence) {
  sequence.place = Place::kWaiting;
  sequence.num_lacking = 0;
  sequence.refused_at = 0;
  waiting_.insert(&sequence);
}

StepPlan Scheduler::Plan(double now) {
  StepPlan plan;
  work_ = {};
  PlanRunning(plan);
  if (plan.num_preempted == 0) AdmitReady(plan, now);
  if (plan.num_preempted == 0) options_.policy == SchedulingPolicy::kKappa ? AdmitByKappa(plan, now) : Admit(plan, now);
  const auto streamed =
      std::stable_partition(plan.sequences.begin(), plan.sequences.end(),
                            [](const PlannedSequence& planned) { return planned.sequence->num_home == 0; });
  for (const PlannedSequence& planned : plan.sequences) {
    plan.num_arriving += static_cast<std::int32_t>(planned.sequence->arriving.size());
  }
  plan.num_streamed = static_cast<std::int32_t>(plan.sequences.end() - streamed);
  return plan;
}

// Decoding goes on, and nobody is to come in: that alone is what a step can be launched for before the one before it is
// known.
StepPlan Scheduler::PlanAhead(const StepPlan& running) {
  StepPlan plan;
  if (running.num_streamed > 0 || running.num_arriving > 0 || MayAdmit()) return plan;
  bool some_end = false;
  std::size_t num_live = 0;
  std::int32_t row = 0;
  for (const PlannedSequence& planned : running.sequences) {
    if (!planned.samples) return {};
    const std::int32_t sampled_row = row++;
    if (planned.sequence == nullptr) continue;
    ++num_live;
    Sequence& sequence = *planned.sequence;
    if (keeper_.IsLong(sequence)) return {};
    if (sequence.num_outputs() + 1 >= sequence.request.sampling.max_tokens) {
      some_end = true;
      continue;
    }
    while (sequence.num_blocks() < BlocksFor(sequence.size() + 1)) {
      std::optional<BlockRef> block = store_.Take();
      if (!block) return {};
      sequence.blocks.push_back(*std::move(block));
    }
    plan.sequences.push_back({.sequence = &sequence, .samples = true, .sampled_row = sampled_row});
  }
  // Another one runs; or one that waits comes in where one ends.
  if (num_live != running_.size() || (some_end && by_id_.size() > num_live)) return {};
  plan.num_tokens = static_cast<std::int32_t>(plan.sequences.size());
  return plan;
}

bool Scheduler::MayAdmit() const {
  if (!ready_.empty()) return num_running() < options_.max_num_seqs;
  return HasSeat() && (held_.size() > 0 || MayAdmit(waiting_) || MayAdmit(fresh_));
}

// Whether the first that waits might find the room that it lacked.
bool Scheduler::MayAdmit(const absl::btree_set<Sequence*, FirstInRank>& queue) const {
  return !queue.empty() && NumAvailable() >= (*queue.begin())->num_lacking;
}

void Scheduler::PlanRunning(StepPlan& plan) {
  for (Sequence* const sequence : running_) {
    sequence->num_planned = 0;
    keeper_.Keep(*sequence);
  }
  for (const bool decoding : {true, false}) {
    for (Sequence* const sequence : running_) {
      if (sequence->place != Place::kRunning) continue;  // preempted for an earlier one
      if ((sequence->num_uncomputed() == 1) != decoding || sequence->num_planned > 0) continue;
      const std::int32_t chunk = ChunkOf(*sequence, plan);
      if (chunk <= 0) continue;
      if (const std::int32_t granted = Reserve(*sequence, chunk, plan)) Schedule(*sequence, granted, plan);
    }
  }
  if (plan.num_preempted > 0)
    std::erase_if(running_, [](const Sequence* each) { return each->place != Place::kRunning; });
}

std::int32_t Scheduler::ChunkOf(const Sequence& sequence, const StepPlan& plan) const {
  const std::int32_t wanted = sequence.restoring.empty() ? sequence.num_uncomputed()
                                                         : sequence.load_begin * kBlockTokens - sequence.num_computed;
  std::int32_t chunk = std::min(wanted, options_.max_num_batched_tokens - plan.num_tokens);
  if (options_.long_prefill_token_threshold > 0) chunk = std::min(chunk, options_.long_prefill_token_threshold);
  return chunk;
}

// Holds blocks for the sequence's next num_tokens, at the cost of loads and of later runners, and returns for how many
// it does: fewer only where the sequence is long. 0: it had to go itself, or blocks are on their way back and it waits.
std::int32_t Scheduler::Reserve(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan) {
  const std::int32_t wanted = BlocksFor(sequence.num_computed + num_tokens);
  while (sequence.num_blocks() < wanted) {
    std::optional<BlockRef> block = store_.Take();
    if (block) {
      sequence.blocks.push_back(*std::move(block));
      continue;
    }
    if (MakeAvailable() || RevokeNewestLoad()) continue;
    if (store_.num_returning() > 0 || awaits_home()) return 0;
    const std::int32_t granted = sequence.num_blocks() * kBlockTokens - sequence.num_computed;
    if (granted > 0 && keeper_.IsLong(sequence)) return granted;
    Sequence& last = LastRunner();
    const bool is_alone = std::ranges::count(running_, Place::kRunning, &Sequence::place) == 1;
    SPILLWAY_CHECK(!is_alone) << "a sequence that was accepted does not fit the pool alone";
    Preempt(last, plan);
    if (&last == &sequence) return 0;
  }
  return num_tokens;
}

// The newest long sequence lets go of a segment that is home. False: there is none.
bool Scheduler::MakeAvailable() {
  const auto newest = std::find_if(running_.rbegin(), running_.rend(),
                                   [](const Sequence* sequence) { return HomeKeeper::NumDroppable(*sequence) > 0; });
  if (newest == running_.rend()) return false;
  HomeKeeper::DropSegment(**newest);
  return true;
}

// Blocks that can be had at once without revoking or preempting anybody.
std::int64_t Scheduler::NumAvailable() const {
  std::int64_t count = store_.num_available();
  for (const Sequence* const sequence : running_) count += HomeKeeper::NumDroppable(*sequence);
  return count;
}

bool Scheduler::awaits_home() const {
  return store_.num_moving_home() > 0 ||
         std::ranges::any_of(running_, [this](const Sequence* sequence) { return keeper_.AwaitsSlot(*sequence); });
}

bool Scheduler::RevokeNewestLoad() {
  if (!loading_.empty()) {
    Sequence& revoked = *loading_.back();
    loading_.pop_back();
    BackToWaiting(revoked);
    return true;
  }
  if (!ready_.empty()) {
    Sequence& revoked = *ready_.back();
    ready_.pop_back();
    BackToWaiting(revoked);
    return true;
  }
  if (!splits_.empty()) {
    GiveUpTail(*splits_.back());
    return true;
  }
  return false;
}

// The sequence computes the tail of its prefix itself.
void Scheduler::GiveUpTail(Sequence& sequence) {
  for (const auto& restoring : sequence.restoring) store_.Detach(restoring);
  sequence.restoring.clear();
  if (sequence.num_blocks() > sequence.load_begin) KvStore::Release(sequence.arriving);
  while (sequence.num_blocks() > sequence.load_begin) sequence.blocks.pop_back();
  std::erase(splits_, &sequence);
}

Sequence& Scheduler::LastRunner() const {
  Sequence* last = nullptr;
  for (Sequence* const each : running_) {
    if (each->place == Place::kRunning && (last == nullptr || FirstInRank()(last, each))) last = each;
  }
  return *last;
}

// The victim stays in running_ until the caller has walked it.
void Scheduler::Preempt(Sequence& victim, StepPlan& plan) {
  if (victim.num_planned > 0) Unschedule(victim, plan);
  ++plan.num_preempted;
  BackToWaiting(victim);
}

void Scheduler::BackToWaiting(Sequence& sequence) {
  GiveUpBlocks(sequence);
  Wait(sequence);
}

void Scheduler::GiveUpBlocks(Sequence& sequence) {
  for (std::int32_t i = sequence.num_published; i < sequence.num_claimed; ++i) {
    Unclaim(sequence.keys[static_cast<std::size_t>(i)]);
  }
  sequence.num_claimed = 0;
  if (!sequence.restoring.empty()) GiveUpTail(sequence);
  if (!sequence.blocks.empty()) {
    store_.MarkUsed(std::span<const BlockKey>(sequence.keys).first(static_cast<std::size_t>(sequence.num_published)),
                    sequence.tokens);
  }
  if (sequence.num_planned > 0) {
    std::ranges::move(sequence.blocks, std::back_inserter(retained_));
    sequence.blocks.clear();
  }
  KvStore::Release(sequence.blocks);
  KvStore::Release(sequence.home);
  KvStore::Release(sequence.arriving);
  sequence.inputs.clear();
  sequence.num_home = 0;
  if (!sequence.was_scheduled) sequence.num_cached_below = 0;
  sequence.num_computed = 0;
  sequence.num_published = 0;
}

void Scheduler::Schedule(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan) {
  sequence.num_planned = num_tokens;
  keeper_.KeepInputs(sequence);
  const bool samples = num_tokens == sequence.num_uncomputed();
  if (costs_ != nullptr) costs_->Add(work_, sequence.num_computed, num_tokens, samples);
  plan.num_tokens += num_tokens;
  if (sequence.num_uncomputed() > 1) plan.num_prefill_tokens += num_tokens;
  plan.sequences.push_back({.sequence = &sequence, .samples = samples});
}

void Scheduler::Unschedule(Sequence& sequence, StepPlan& plan) {
  std::erase_if(plan.sequences, [&](const PlannedSequence& planned) { return planned.sequence == &sequence; });
  plan.num_tokens -= sequence.num_planned;
  if (sequence.num_uncomputed() > 1) plan.num_prefill_tokens -= sequence.num_planned;
  sequence.num_planned = 0;
}

// What it needs on the device at once; its outputs are taken on credit.
std::int64_t Scheduler::DeviceBlocksFor(const Sequence& sequence) const {
  const std::int64_t num_blocks = BlocksFor(sequence.size());
  return keeper_.IsLong(sequence) ? std::min<std::int64_t>(num_blocks, HomeKeeper::kMinDeviceBlocks) : num_blocks;
}

// Room for all its known tokens. A sequence alone always has room: it was accepted because it fits.
bool Scheduler::HasRoomFor(const Sequence& sequence) const {
  const auto num_held = static_cast<std::int64_t>(sequence.blocks.size());
  return IsIdle() || (DeviceBlocksFor(sequence) <= num_held + NumAvailable() && keeper_.HasHomeFor(sequence));
}

void Scheduler::AdmitReady(StepPlan& plan, double now) {
  while (!ready_.empty() && plan.num_tokens < options_.max_num_batched_tokens &&
         num_running() < options_.max_num_seqs) {
    Sequence& sequence = *ready_.front();
    if (!running_.empty() && !HasRoomFor(sequence)) return;
    ready_.pop_front();
    Run(sequence, plan, now);
  }
}

void Scheduler::Loaded() {
  std::erase_if(loading_, [&](Sequence* const sequence) {
    if (!Settle(*sequence)) return false;
    sequence->place = Place::kReady;
    ready_.push_back(sequence);
    return true;
  });
  for (Sequence* const sequence : std::vector(splits_)) Settle(*sequence);
}

// Once the head is computed and nothing is on its way any more: what has come up soundly counts as computed, the rest
// is given up. False: it is too early.
bool Scheduler::Settle(Sequence& sequence) {
  if (sequence.num_computed < sequence.load_begin * kBlockTokens) return false;
  const auto is_pending = [](const auto& each) { return each->state == Restoring::State::kPending; };
  if (is_pending(sequence.restoring.back()) || std::ranges::any_of(sequence.restoring, is_pending)) return false;
  const auto is_lost = [](const auto& each) { return each->state == Restoring::State::kFailed; };
  const auto num_sound =
      static_cast<std::int32_t>(std::ranges::find_if(sequence.restoring, is_lost) - sequence.restoring.begin());
  if (!sequence.was_scheduled) sequence.num_cached_below += num_sound * kBlockTokens;
  for (std::int32_t i = 0; i < num_sound; ++i, ++sequence.num_published) {
    if (sequence.num_published < sequence.num_claimed) {
      Unclaim(sequence.keys[static_cast<std::size_t>(sequence.num_published)]);
    }
  }
  sequence.num_computed = sequence.num_published * kBlockTokens;
  if (num_sound == static_cast<std::int32_t>(sequence.restoring.size())) CountArriving(sequence);
  sequence.load_begin = sequence.num_computed / kBlockTokens;
  GiveUpTail(sequence);
  return true;
}

// What comes up inside the next step counts as computed already, though it is not published before.
void Scheduler::CountArriving(Sequence& sequence) {
  const auto tokens = static_cast<std::int32_t>(sequence.arriving.size()) * kBlockTokens;
  sequence.num_computed += tokens;
  if (!sequence.was_scheduled) sequence.num_cached_below += tokens;
}

void Scheduler::Run(Sequence& sequence, StepPlan& plan, double now) {
  if (!sequence.was_scheduled) {
    sequence.was_scheduled = true;
    sequence.scheduled_at = now;
    const auto num_coming = static_cast<std::int32_t>(sequence.restoring.size()) * kBlockTokens;
    sequence.num_cached = sequence.num_computed + num_coming;
    sequence.num_cached_below += num_coming;
    if (sequence.request.sink) sequence.request.sink->OnScheduled(sequence.num_cached);
  }
  sequence.place = Place::kRunning;
  running_.push_back(&sequence);
  if (!sequence.restoring.empty()) splits_.push_back(&sequence);
  ClaimKeys(sequence);
  const std::int32_t chunk = ChunkOf(sequence, plan);
  const std::int32_t granted = chunk > 0 ? Reserve(sequence, chunk, plan) : 0;
  if (granted > 0) Schedule(sequence, granted, plan);
  if (plan.num_preempted > 0)
    std::erase_if(running_, [](const Sequence* each) { return each->place != Place::kRunning; });
}

void Scheduler::Computed(const StepPlan& plan, const StepPlan* ahead) {
  KvStore::Release(retained_);
  for (const PlannedSequence& planned : plan.sequences) {
    if (planned.sequence == nullptr) continue;
    Sequence& sequence = *planned.sequence;
    sequence.num_computed += sequence.num_planned;
    sequence.num_planned = 0;
    KvStore::Release(sequence.arriving);
    GrowKeys(sequence);
    const std::int32_t full = sequence.num_computed / kBlockTokens;
    // The home copy of a long sequence's block is also the one that others may find.
    const auto write_through = keeper_.IsLong(sequence) ? WriteThrough::kNo : WriteThrough::kYes;
    for (; sequence.num_published < full; ++sequence.num_published) {
      const auto i = static_cast<std::size_t>(sequence.num_published);
      const auto tokens = std::span<const std::int32_t>(sequence.tokens).subspan(i * kBlockTokens, kBlockTokens);
      const BlockRef& block = sequence.blocks[i - static_cast<std::size_t>(sequence.num_home)];
      store_.Publish(block, sequence.keys[i], tokens, write_through);
      if (sequence.num_published < sequence.num_claimed) Unclaim(sequence.keys[i]);
    }
    keeper_.Keep(sequence);
    if (!sequence.restoring.empty()) Settle(sequence);
  }
  if (ahead == nullptr) return;
  for (const PlannedSequence& planned : ahead->sequences) planned.sequence->num_planned = 1;
}

std::unique_ptr<Sequence> Scheduler::Remove(Sequence* sequence) {
  const auto found = by_id_.find(sequence->request.id);
  SPILLWAY_CHECK(found != by_id_.end());
  std::unique_ptr<Sequence> removed = std::move(found->second);
  by_id_.erase(found);
  switch (sequence->place) {
    case Place::kWaiting:
    case Place::kFresh:
    case Place::kHeld:
      LeaveQueue(*sequence);
      break;
    case Place::kAwaiting:
      std::erase(claims_.at(sequence->awaited).awaiting, sequence);
      break;
    case Place::kLoading:
      std::erase(loading_, sequence);
      break;
    case Place::kReady:
      std::erase(ready_, sequence);
      break;
    case Place::kRunning:
      running_.erase(std::ranges::find(running_, sequence));
      break;
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

void Scheduler::ClaimKeys(Sequence& sequence) {
  if (!options_.enable_prefix_caching) return;
  sequence.num_claimed = static_cast<std::int32_t>(sequence.keys.size());
  for (std::int32_t i = sequence.num_published; i < sequence.num_claimed; ++i) {
    ++claims_[sequence.keys[static_cast<std::size_t>(i)]].num_claimants;
  }
}

void Scheduler::Unclaim(const BlockKey& key) {
  const auto claim = claims_.find(key);
  if (--claim->second.num_claimants > 0) return;
  for (Sequence* const sequence : claim->second.awaiting) Wait(*sequence);
  claims_.erase(claim);
}

std::vector<Sequence*> Scheduler::All() const {
  std::vector<Sequence*> all = running_;
  all.reserve(by_id_.size());
  all.insert(all.end(), ready_.begin(), ready_.end());
  all.insert(all.end(), loading_.begin(), loading_.end());
  const auto num_admitted = static_cast<std::ptrdiff_t>(all.size());
  all.insert(all.end(), waiting_.begin(), waiting_.end());
  all.insert(all.end(), fresh_.begin(), fresh_.end());
  held_.AppendTo(all);
  for (const auto& [key, claim] : claims_) all.insert(all.end(), claim.awaiting.begin(), claim.awaiting.end());
  std::sort(all.begin() + num_admitted, all.end(), FirstInRank());
  return all;
}

Sequence* Scheduler::Find(std::uint64_t id) const {
  const auto found = by_id_.find(id);
  return found == by_id_.end() ? nullptr : found->second.get();
}

void Scheduler::CheckInvariants() const {
  store_.CheckInvariants();
  const std::vector<Sequence*> all = All();
  SPILLWAY_CHECK(by_id_.size() == all.size());
  const auto count = [&](Place place) {
    return static_cast<std::size_t>(std::ranges::count(all, place, &Sequence::place));
  };
  SPILLWAY_CHECK(count(Place::kWaiting) == waiting_.size() && count(Place::kRunning) == running_.size());
  SPILLWAY_CHECK(count(Place::kFresh) == fresh_.size() && count(Place::kHeld) == held_.size());
  SPILLWAY_CHECK(count(Place::kLoading) == loading_.size() && count(Place::kReady) == ready_.size());
  for (const Sequence* const sequence : all) {
    const auto restoring = static_cast<std::int32_t>(sequence->restoring.size());
    const auto arriving = static_cast<std::int32_t>(sequence->arriving.size());
    HomeKeeper::CheckInvariants(*sequence);
    switch (sequence->place) {
      case Place::kWaiting:
      case Place::kFresh:
      case Place::kHeld:
      case Place::kAwaiting:
        SPILLWAY_CHECK(sequence->num_blocks() == 0 && sequence->num_computed == 0 && sequence->num_claimed == 0);
        SPILLWAY_CHECK(sequence->home.empty() && sequence->arriving.empty() && sequence->inputs.empty());
        break;
      case Place::kLoading:
      case Place::kReady:
        SPILLWAY_CHECK(sequence->num_blocks() == sequence->num_published + restoring + arriving);
        SPILLWAY_CHECK(sequence->num_claimed == 0);
        break;
      case Place::kRunning:
        SPILLWAY_CHECK(sequence->num_computed + sequence->num_planned <= sequence->num_blocks() * kBlockTokens);
        SPILLWAY_CHECK((sequence->num_published + arriving) * kBlockTokens <= sequence->num_computed);
        SPILLWAY_CHECK(restoring == 0 || sequence->num_blocks() == sequence->load_begin + restoring);
        break;
    }
  }
  SPILLWAY_CHECK(!running_.empty() || claims_.empty());
  SPILLWAY_CHECK(has_work() || store_.has_transfers() || !retained_.empty() ||
                 (store_.num_held() == 0 && store_.num_home() == 0 && store_.num_companions() == 0));
}

}  // namespace spillway
