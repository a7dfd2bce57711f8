#pragma once

// Scheduler: chooses each step's StepPlan under a token and a block budget. No device, no clock, no randomness of its
// own.
//
//   waiting   in rank order (see Sequence): by priority where the policy says so, then by arrival
//   awaiting  a running sequence is computing part of its prefix; waits again once that is published or given up
//   loading   part of the prefix is coming up from a lower tier; holds blocks
//   ready     it has come (as much of it as was sound); holds blocks
//   running   in order of admission; holds blocks
//
// A step serves decoding sequences first, then running prefills, then ready ones, then admits from waiting. A running
// sequence that finds no block revokes the newest loads, then preempts the runner of the last rank (itself if that is
// it), whose published blocks stay findable, here or below. The runner of the first rank is never preempted for
// another, and every accepted sequence fits the pool alone: so some sequence always progresses. A plan is empty only
// while transfers are about to give blocks back or bring them up.
//
// A waiting sequence that found no room is looked at again only once as many blocks are available as it lacked: what
// waits costs a step nothing.
//
// Engine thread only.

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "engine/engine.h"
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
  };

  // `store` outlives the scheduler. `chain` names blocks.
  Scheduler(KvStore& store, const KeyChain& chain, const Options& options, EngineObserver* observer);
  ~Scheduler();

  void Add(std::unique_ptr<Sequence> sequence);
  // The next step's work; changes num_planned, blocks and the queues. Sinks hear OnScheduled at first admission.
  StepPlan Plan(double now);
  // Restores have ended: loading sequences that wait for no more become ready.
  void Loaded();
  // The plan's tokens are computed: counters advance and full blocks are published. Tokens sampled from it are appended
  // afterwards by Append.
  void Computed(const StepPlan& plan);
  // The sequence goes, its blocks with it. The caller has told the sink.
  std::unique_ptr<Sequence> Remove(Sequence* sequence);

  // Every sequence: running, ready, loading, then the others in rank order.
  std::vector<Sequence*> All() const;
  Sequence* Find(std::uint64_t id) const;

  bool has_work() const { return !by_id_.empty(); }
  std::int32_t num_running() const { return static_cast<std::int32_t>(running_.size()); }
  std::int32_t num_waiting() const { return static_cast<std::int32_t>(by_id_.size() - running_.size()); }
  std::int32_t num_loading() const { return static_cast<std::int32_t>(loading_.size() + ready_.size()); }

  void CheckInvariants() const;

 private:
  // A block that running sequences will publish, and who awaits that.
  struct Claim {
    std::int32_t num_claimants = 0;
    std::vector<Sequence*> awaiting;
  };

  void PlanRunning(StepPlan& plan);
  bool Reserve(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan);
  bool RevokeNewestLoad();
  Sequence& LastRunner() const;
  void Preempt(Sequence& victim, StepPlan& plan);
  void Schedule(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan);
  static void Unschedule(Sequence& sequence, StepPlan& plan);
  bool HasRoomFor(const Sequence& sequence) const;
  bool IsIdle() const { return running_.empty() && loading_.empty() && ready_.empty(); }
  void AdmitReady(StepPlan& plan, double now);
  void Admit(StepPlan& plan, double now);
  bool AwaitClaim(Sequence& sequence, std::span<const BlockKey> missing);
  void Leave(Sequence& sequence, StepPlan& plan, std::span<const BlockKey> missing, double now);
  bool Matches(const Sequence& sequence) const;
  std::span<const BlockKey> MatchableKeys(const Sequence& sequence) const;
  bool StartLoading(Sequence& sequence, std::span<const BlockKey> below);
  void Run(Sequence& sequence, StepPlan& plan, double now);
  void Wait(Sequence& sequence);
  void BackToWaiting(Sequence& sequence);
  void GiveUpBlocks(Sequence& sequence);
  std::int32_t ChunkOf(const Sequence& sequence, const StepPlan& plan) const;
  void GrowKeys(Sequence& sequence) const;
  void ClaimKeys(Sequence& sequence);
  void Unclaim(const BlockKey& key);

  KvStore& store_;
  const KeyChain& chain_;
  const Options options_;
  EngineObserver* const observer_;
  absl::flat_hash_map<std::uint64_t, std::unique_ptr<Sequence>> by_id_;
  absl::btree_set<Sequence*, FirstInRank> waiting_;
  std::vector<Sequence*> loading_;
  std::deque<Sequence*> ready_;
  std::vector<Sequence*> running_;
  absl::flat_hash_map<BlockKey, Claim> claims_;
  std::uint64_t num_arrived_ = 0;
};

}  // namespace spillway
