// The half of Scheduler that lets waiting sequences in.

#include <algorithm>
#include <utility>

#include "engine/scheduler.h"
#include "kernels/check.h"

namespace spillway {
namespace {

// Blocks of waiting sequences that are looked up in one step; what is beyond waits for the next one.
constexpr std::size_t kMaxLookUps = 512;
// The least that the link is given to do ahead, in seconds: it must not run dry between two steps.
constexpr double kLeastLoadWindow = 0.01;

template <typename Count>
std::int64_t TokensOf(Count num_blocks) {
  return static_cast<std::int64_t>(num_blocks) * kBlockTokens;
}

}  // namespace

void Scheduler::Admit(StepPlan& plan, double now) {
  while (!waiting_.empty() && !IsFull(plan) && plan.num_preempted == 0 && HasSeat()) {
    if (!TryAdmit(**waiting_.begin(), plan, now)) return;
  }
}

void Scheduler::AdmitByKappa(StepPlan& plan, double now) {
  Examine();
  bool is_link_served = false;
  bool is_compute_served = false;
  while ((!is_link_served || !is_compute_served) && plan.num_preempted == 0 && HasSeat()) {
    Sequence* const load = IsLinkIdleSoon() ? held_.Next() : nullptr;
    Sequence* const fresh = fresh_.empty() || IsFull(plan) ? nullptr : *fresh_.begin();
    is_link_served = load == nullptr || MustYield(*load, fresh, now) || !TryAdmit(*load, plan, now);
    if (!is_link_served) continue;  // its queues have changed
    is_compute_served = fresh == nullptr || MustYield(*fresh, held_.Next(), now) || !TryAdmit(*fresh, plan, now);
    if (!is_compute_served) is_link_served = false;  // the step is longer now, so the link has more room
  }
  if (IsFull(plan) || plan.num_preempted > 0 || !HasSeat()) return;
  if (Sequence* const next = held_.Next()) RecomputeHeld(*next, plan, now);
}

// Tells waiting sequences by the resource that they wait for.
void Scheduler::Examine() {
  for (std::size_t num_looked_up = 0; num_looked_up < kMaxLookUps && !waiting_.empty();) {
    Sequence& sequence = **waiting_.begin();
    const auto missing = MatchPrefix(sequence);
    num_looked_up += 1 + sequence.keys.size();
    if (AwaitClaim(sequence, missing)) continue;
    const Prefill prefill =
        PrefillOf(sequence, TokensOf(sequence.num_blocks()), TokensOf(CountBelow(sequence, missing)));
    const bool loads = Choose(prefill, {}).loaded > 0;
    sequence.seen_below = prefill.below;
    sequence.seen_resident = prefill.resident;
    GiveUpBlocks(sequence);
    LeaveQueue(sequence);
    sequence.place = loads ? Place::kHeld : Place::kFresh;
    if (loads) {
      held_.Add(sequence);
    } else {
      fresh_.insert(&sequence);
    }
  }
}

// Whether what is on its way up will have come by the end of the step.
bool Scheduler::IsLinkIdleSoon() const {
  if (costs_ == nullptr) return true;
  const auto tokens = static_cast<std::int64_t>(store_.num_restoring()) * kBlockTokens;
  return costs_->LoadSeconds(tokens) <= std::max(costs_->StepSeconds(work_), kLeastLoadWindow);
}

// Ageing: `other` was refused for lack of room long ago, and this one came later.
bool Scheduler::MustYield(const Sequence& sequence, const Sequence* other, double now) const {
  return other != nullptr && other->refused_at > 0 && now - other->refused_at > options_.ageing_seconds &&
         FirstInRank()(other, &sequence);
}

// Looks its prefix up and lets it go where it can: to running or loading, or to await a claim. False: no room.
bool Scheduler::TryAdmit(Sequence& sequence, StepPlan& plan, double now) {
  const std::int64_t num_available = NumAvailable();
  if (!IsIdle() && num_available < sequence.num_lacking) return false;
  const auto missing = MatchPrefix(sequence);
  if (AwaitClaim(sequence, missing)) return true;
  if (!HasRoomFor(sequence)) {
    const std::int64_t num_taken = num_available - NumAvailable();  // by the match
    sequence.num_lacking = DeviceBlocksFor(sequence) - static_cast<std::int64_t>(sequence.blocks.size()) + num_taken;
    if (sequence.refused_at == 0) sequence.refused_at = now;
    GiveUpBlocks(sequence);
    return false;
  }
  Leave(sequence, plan, missing, now);
  return true;
}

// The link is busy and the step has tokens left: the sequence whose turn comes next begins now, if computing some of
// what it was to load ends sooner.
bool Scheduler::RecomputeHeld(Sequence& sequence, StepPlan& plan, double now) {
  const Prefill prefill = PrefillOf(sequence, sequence.seen_resident, sequence.seen_below);
  return Choose(prefill, CurrentBacklog()).recomputed > 0 && TryAdmit(sequence, plan, now);
}

// Holds what the device tier has of the prefix, and a long sequence what the host tier has; returns the keys that
// follow.
std::span<const BlockKey> Scheduler::MatchPrefix(Sequence& sequence) {
  GrowKeys(sequence);
  const std::span<const BlockKey> keys = MatchableKeys(sequence);
  sequence.blocks = store_.Match(keys, sequence.tokens);
  sequence.num_matched = static_cast<std::int32_t>(sequence.blocks.size());
  if (keeper_.IsLong(sequence)) keeper_.PinPrefix(sequence, keys, NumAvailable());
  return keys.subspan(static_cast<std::size_t>(sequence.num_blocks()));
}

std::size_t Scheduler::CountBelow(const Sequence& sequence, std::span<const BlockKey> missing) const {
  const auto first = static_cast<std::size_t>(sequence.num_blocks()) * kBlockTokens;
  return store_.CountBelow(missing, std::span(sequence.tokens).subspan(first));
}

bool Scheduler::Matches(const Sequence& sequence) const {
  return options_.enable_prefix_caching && !sequence.request.bypass_prefix_cache;
}

// At least the last token is computed, since its logits are wanted.
std::span<const BlockKey> Scheduler::MatchableKeys(const Sequence& sequence) const {
  if (!Matches(sequence)) return {};
  return std::span<const BlockKey>(sequence.keys).first(static_cast<std::size_t>((sequence.size() - 1) / kBlockTokens));
}

// Does not compute what a running sequence is about to publish: awaits the last of those blocks.
bool Scheduler::AwaitClaim(Sequence& sequence, std::span<const BlockKey> missing) {
  Claim* awaited = nullptr;
  for (const BlockKey& key : missing) {
    const auto claim = claims_.find(key);
    if (claim == claims_.end()) break;
    awaited = &claim->second;
    sequence.awaited = key;
  }
  if (awaited == nullptr) return false;
  GiveUpBlocks(sequence);
  LeaveQueue(sequence);
  sequence.place = Place::kAwaiting;
  awaited->awaiting.push_back(&sequence);
  return true;
}

void Scheduler::LeaveQueue(Sequence& sequence) {
  switch (sequence.place) {
    case Place::kFresh:
      fresh_.erase(&sequence);
      break;
    case Place::kHeld:
      held_.Remove(sequence);
      break;
    default:
      waiting_.erase(&sequence);
  }
}

// To loading where all that lower tiers have of its prefix is loaded first, else to running.
void Scheduler::Leave(Sequence& sequence, StepPlan& plan, std::span<const BlockKey> missing, double now) {
  sequence.num_published = sequence.num_blocks();
  const std::int32_t num_pinned = std::max(0, sequence.num_home - sequence.num_matched);
  if (!sequence.was_scheduled) sequence.num_cached_below = num_pinned * kBlockTokens;
  sequence.num_computed = sequence.num_published * kBlockTokens;
  const Prefill prefill = PrefillOf(sequence, TokensOf(sequence.num_blocks()), TokensOf(CountBelow(sequence, missing)));
  if (prefill.below > 0) StartLoading(sequence, missing, Choose(prefill, CurrentBacklog()));
  const std::size_t num_loaded = sequence.restoring.size() + sequence.arriving.size();
  if (sequence.place == Place::kHeld) {
    const std::size_t bytes = num_loaded * store_.layout().block_bytes();
    held_.Grant(sequence, static_cast<std::int64_t>(bytes));
  }
  LeaveQueue(sequence);
  if (!sequence.was_scheduled && observer_ != nullptr && Matches(sequence)) {
    observer_->OnPrefixQuery(sequence.num_prompt, sequence.num_computed - num_pinned * kBlockTokens);
    observer_->OnPrefixQueryBelow((num_pinned + static_cast<std::int64_t>(missing.size())) * kBlockTokens,
                                  (num_pinned + static_cast<std::int64_t>(num_loaded)) * kBlockTokens);
  }
  if (!sequence.restoring.empty() && sequence.load_begin == sequence.num_published) {
    sequence.place = Place::kLoading;
    loading_.push_back(&sequence);
  } else {
    CountArriving(sequence);
    Run(sequence, plan, now);
  }
}

Prefill Scheduler::PrefillOf(const Sequence& sequence, std::int64_t resident, std::int64_t below) const {
  const std::int64_t fresh = sequence.size() - resident - below;
  std::int64_t hiding = 0;
  if (options_.layer_loads != LayerLoads::kNever && !keeper_.IsLong(sequence)) {
    hiding = std::min<std::int64_t>(fresh, options_.max_num_batched_tokens);
    if (options_.long_prefill_token_threshold > 0) {
      hiding = std::min<std::int64_t>(hiding, options_.long_prefill_token_threshold);
    }
  }
  return {.resident = resident, .below = below, .fresh = fresh, .hiding = hiding};
}

Restoration Scheduler::Choose(const Prefill& prefill, const Backlog& backlog) const {
  if (prefill.below == 0) return {};
  switch (options_.load_choice) {
    case LoadChoice::kRecompute:
      return {.recomputed = prefill.below};
    case LoadChoice::kSplit: {
      if (costs_ != nullptr) return costs_->Split(prefill, backlog);
      const std::int64_t half = prefill.below / kBlockTokens / 2 * kBlockTokens;
      return {.recomputed = half, .loaded = prefill.below - half};
    }
    case LoadChoice::kAuto:
      if (costs_ != nullptr) return costs_->Best(prefill, backlog);
      break;
    case LoadChoice::kLoad:
      break;
  }
  return {.loaded = prefill.below};
}

Backlog Scheduler::CurrentBacklog() const {
  if (costs_ == nullptr) return {};
  std::int64_t tokens = 0;
  for (const Sequence* const each : running_) {
    if (each->num_uncomputed() > 1) {
      tokens += each->num_uncomputed() - static_cast<std::int64_t>(each->restoring.size()) * kBlockTokens;
    }
  }
  return {.link_seconds = costs_->LoadSeconds(static_cast<std::int64_t>(store_.num_restoring()) * kBlockTokens),
          .compute_seconds = costs_->ComputeSeconds(0, tokens)};
}

// How many of the last blocks to load come up inside the step that follows.
std::size_t Scheduler::NumArriving(const Sequence& sequence, const Restoration& restoration) const {
  const Prefill prefill = PrefillOf(sequence, TokensOf(sequence.num_blocks()), restoration.loaded);
  if (prefill.hiding == 0 || restoration.recomputed > 0) return 0;
  std::int64_t hidden = restoration.loaded;
  if (options_.layer_loads == LayerLoads::kHidden) {
    hidden = costs_ == nullptr ? 0 : costs_->HiddenTokens(prefill, CurrentBacklog());
  }
  return static_cast<std::size_t>(hidden / kBlockTokens);
}

// Pins the host tier's copies of all these blocks, or of none.
void Scheduler::PinArriving(Sequence& sequence, std::span<const BlockKey> keys, std::size_t first_block) const {
  const auto tokens = std::span<const std::int32_t>(sequence.tokens).subspan(first_block * kBlockTokens);
  for (std::size_t i = 0; i < keys.size(); ++i) {
    std::shared_ptr<HomeBlock> pinned = store_.PinHome(keys[i], tokens.subspan(i * kBlockTokens, kBlockTokens));
    if (!pinned) {
      KvStore::Release(sequence.arriving);
      return;
    }
    sequence.arriving.push_back(std::move(pinned));
  }
}

// Asks for the tail of what lower tiers have, and holds blocks for the head.
void Scheduler::StartLoading(Sequence& sequence, std::span<const BlockKey> below, const Restoration& restoration) {
  if (restoration.loaded == 0) return;
  const auto num_head = static_cast<std::size_t>(restoration.recomputed / kBlockTokens);
  const auto num_blocks = num_head + static_cast<std::size_t>(restoration.loaded / kBlockTokens);
  const auto first = static_cast<std::size_t>(sequence.num_blocks()) * kBlockTokens;
  const auto tokens = std::span<const std::int32_t>(sequence.tokens).subspan(first);
  for (std::size_t i = 0; i < num_head; ++i) {
    if (store_.num_available() == 0) MakeAvailable();
    std::optional<BlockRef> block = store_.Take();
    if (!block) return;
    sequence.blocks.push_back(*std::move(block));
  }
  sequence.load_begin = sequence.num_blocks();
  const std::size_t num_arriving = NumArriving(sequence, restoration);
  const std::size_t first_arriving = num_blocks - num_arriving;
  PinArriving(sequence, below.subspan(first_arriving, num_arriving), first / kBlockTokens + first_arriving);
  for (std::size_t i = num_head; i < num_blocks - sequence.arriving.size(); ++i) {
    if (store_.num_available() == 0) MakeAvailable();
    auto restored = store_.Restore(below[i], tokens.subspan(i * kBlockTokens, kBlockTokens));
    if (!restored) {
      KvStore::Release(sequence.arriving);
      return;
    }
    sequence.blocks.push_back(std::move(restored->block));
    sequence.restoring.push_back(std::move(restored->restoring));
  }
  for (std::size_t i = 0; i < sequence.arriving.size(); ++i) {
    if (store_.num_available() == 0) MakeAvailable();
    std::optional<BlockRef> block = store_.Take();
    if (!block) {
      sequence.arriving.resize(i);
      return;
    }
    sequence.blocks.push_back(*std::move(block));
  }
}

}  // namespace spillway
