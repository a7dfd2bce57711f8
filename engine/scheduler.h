#pragma once

// Scheduler: chooses each step's StepPlan under a token and a block budget. No device, no clock, no randomness of its
// own.
//
//   waiting   in rank order (see Sequence): by priority where the policy says so, then by arrival
//   fresh     (kappa) looked at: lower tiers have nothing of its prefix that is worth loading; waits for compute
//   held      (kappa) looked at: part of its prefix is to be loaded; waits for its tenant's turn on the link
//   awaiting  a running sequence is computing part of its prefix; waits again once that is published or given up
//   loading   part of the prefix is coming up from a lower tier; holds blocks
//   ready     it has come (as much of it as was sound); holds blocks
//   running   in order of admission; holds blocks. A split one computes the head of its prefix while the tail comes up
//
// A step serves decoding sequences first, then running prefills, then ready ones, then admits from waiting. A running
// sequence that finds no block takes those of long sequences that have a home copy (HomeKeeper), then revokes the
// newest loads and split tails, then preempts the runner of the last rank (itself if that is it), whose published
// blocks stay findable, here or below; a long prefill makes do with a shorter chunk before it preempts. The runner of
// the first rank is never preempted for another, and every accepted sequence fits the pool and its home alone: so some
// sequence always progresses. A plan is empty only while transfers are about to give blocks back or bring them up, or
// while what pins all home slots is about to let them go.
//
// What lower tiers have of a prefix is loaded, recomputed from its tokens, or split, as LoadChoice says; a lost block
// is computed, and what follows it.
//
// Policy kappa plans the link with the step. A load is started only while the link has less to do than the step will
// take, so that both stay busy and what waits for the link holds no blocks; fresh sequences fill the step meanwhile.
// Tokens that would be left over in a step go to recomputing the head of the next load, where that ends sooner. Ageing:
// a sequence that was refused for lack of room is passed by later ones for ageing_seconds at most. From then on nothing
// later is admitted before it: it runs when those admitted before it have given back the blocks it lacks.
//
// A waiting sequence that found no room is looked at again only once as many blocks are available as it lacked: what
// waits costs a step nothing.
//
// Engine thread only.

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "engine/cost_model.h"
#include "engine/engine.h"
#include "engine/home_keeper.h"
#include "engine/link_share.h"
#include "engine/scheduling_policy.h"
#include "engine/sequence.h"
#include "engine/step_plan.h"
#include "kvstore/kv_store.h"

namespace spillway {

class Scheduler {
 public:
  struct Options {
    std::int32_t max_num_seqs = 256;
    std::int32_t max_num_batched_tokens = 2048;
    std::int32_t long_prefill_token_threshold = 0;  // 0 = the budget
    bool enable_prefix_caching = true;
    SchedulingPolicy policy = SchedulingPolicy::kFcfs;
    LoadChoice load_choice = LoadChoice::kLoad;
    LayerLoads layer_loads = LayerLoads::kNever;
    double ageing_seconds = 1;
    std::optional<InputLayout> kept_inputs{};  // of long sequences, see HomeKeeper
  };

  // `store` and `costs` outlive the scheduler. `chain` names blocks. `costs`: null where speeds are unknown; then what
  // can be loaded is, at once.
  Scheduler(KvStore& store, const KeyChain& chain, const Options& options, EngineObserver* observer,
            const CostModel* costs = nullptr);
  ~Scheduler();

  void Add(std::unique_ptr<Sequence> sequence);
  // The next step's work; changes num_planned, blocks and the queues. Sinks hear OnScheduled at first admission.
  StepPlan Plan(double now);
  // Restores have ended: loading sequences that wait for no more become ready.
  void Loaded();
  // The plan of the step after `running`, which samples a token for each of its sequences: those that do not end with
  // it compute that token. Empty where Plan might do anything else then: that is left to Plan, once `running` is done.
  // It revokes and preempts nobody; of the sequences it changes only what blocks they hold.
  StepPlan PlanAhead(const StepPlan& running);
  // The plan's tokens are computed: counters advance and full blocks are published. The caller appends the tokens
  // sampled from it afterwards. `ahead` is what PlanAhead made of `plan`, where that was launched: it runs now.
  void Computed(const StepPlan& plan, const StepPlan* ahead = nullptr);
  // The sequence goes, its blocks with it, or, while a step that is planned for it runs, when that is Computed. The
  // caller has told the sink.
  std::unique_ptr<Sequence> Remove(Sequence* sequence);

  // Every sequence: running, ready, loading, then the others in rank order.
  std::vector<Sequence*> All() const;
  Sequence* Find(std::uint64_t id) const;

  bool has_work() const { return !by_id_.empty(); }
  std::int32_t num_running() const { return static_cast<std::int32_t>(running_.size()); }
  std::int32_t num_waiting() const { return static_cast<std::int32_t>(by_id_.size() - running_.size()); }
  std::int32_t num_loading() const { return static_cast<std::int32_t>(loading_.size() + ready_.size()); }

  // Blocks of running sequences are about to have a home copy, whereupon others can have theirs.
  bool awaits_home() const;

  void CheckInvariants() const;

 private:
  // A block that running sequences will publish, and who awaits that.
  struct Claim {
    std::int32_t num_claimants = 0;
    std::vector<Sequence*> awaiting;
  };

  void PlanRunning(StepPlan& plan);
  bool MayAdmit() const;
  bool MayAdmit(const absl::btree_set<Sequence*, FirstInRank>& queue) const;
  std::int32_t Reserve(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan);
  bool MakeAvailable();
  std::int64_t NumAvailable() const;
  std::int64_t DeviceBlocksFor(const Sequence& sequence) const;
  bool RevokeNewestLoad();
  Sequence& LastRunner() const;
  void Preempt(Sequence& victim, StepPlan& plan);
  void Schedule(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan);
  static void Unschedule(Sequence& sequence, StepPlan& plan);
  bool HasRoomFor(const Sequence& sequence) const;
  bool IsIdle() const { return running_.empty() && loading_.empty() && ready_.empty(); }
  void AdmitReady(StepPlan& plan, double now);
  bool Settle(Sequence& sequence);
  void GiveUpTail(Sequence& sequence);
  static void CountArriving(Sequence& sequence);

  // scheduler_admission.cc
  void Admit(StepPlan& plan, double now);
  void AdmitByKappa(StepPlan& plan, double now);
  void Examine();
  bool IsFull(const StepPlan& plan) const { return plan.num_tokens >= options_.max_num_batched_tokens; }
  bool HasSeat() const { return num_running() + num_loading() < options_.max_num_seqs; }
  bool IsLinkIdleSoon() const;
  bool MustYield(const Sequence& sequence, const Sequence* other, double now) const;
  bool TryAdmit(Sequence& sequence, StepPlan& plan, double now);
  bool RecomputeHeld(Sequence& sequence, StepPlan& plan, double now);
  std::span<const BlockKey> MatchPrefix(Sequence& sequence);
  std::size_t CountBelow(const Sequence& sequence, std::span<const BlockKey> missing) const;
  bool AwaitClaim(Sequence& sequence, std::span<const BlockKey> missing);
  void Leave(Sequence& sequence, StepPlan& plan, std::span<const BlockKey> missing, double now);
  void LeaveQueue(Sequence& sequence);
  bool Matches(const Sequence& sequence) const;
  std::span<const BlockKey> MatchableKeys(const Sequence& sequence) const;
  Prefill PrefillOf(const Sequence& sequence, std::int64_t resident, std::int64_t below) const;
  Restoration Choose(const Prefill& prefill, const Backlog& backlog) const;
  Backlog CurrentBacklog() const;
  std::size_t NumArriving(const Sequence& sequence, const Restoration& restoration) const;
  void PinArriving(Sequence& sequence, std::span<const BlockKey> keys, std::size_t first_block) const;
  void StartLoading(Sequence& sequence, std::span<const BlockKey> below, const Restoration& restoration);

  void Run(Sequence& sequence, StepPlan& plan, double now);
  void Wait(Sequence& sequence);
  void BackToWaiting(Sequence& sequence);
  void GiveUpBlocks(Sequence& sequence);
  std::int32_t ChunkOf(const Sequence& sequence, const StepPlan& plan) const;
  void GrowKeys(Sequence& sequence) const;
  void ClaimKeys(Sequence& sequence);
  void Unclaim(const BlockKey& key);

  KvStore& store_;
  const HomeKeeper keeper_;
  const KeyChain& chain_;
  const Options options_;
  EngineObserver* const observer_;
  absl::flat_hash_map<std::uint64_t, std::unique_ptr<Sequence>> by_id_;
  const CostModel* const costs_;
  absl::btree_set<Sequence*, FirstInRank> waiting_;
  absl::btree_set<Sequence*, FirstInRank> fresh_;
  LinkShare held_;
  std::vector<Sequence*> loading_;
  std::deque<Sequence*> ready_;
  std::vector<Sequence*> running_;
  std::vector<Sequence*> splits_;   // of running_: those with restores
  std::vector<BlockRef> retained_;  // of sequences that ended while a step was reading and writing them
  absl::flat_hash_map<BlockKey, Claim> claims_;
  StepWork work_;  // of the step being planned
  std::uint64_t num_arrived_ = 0;
};

}  // namespace spillway
