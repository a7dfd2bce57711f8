#pragma once

// Scheduler: chooses each step's StepPlan under a token and a block budget. No device, no clock, no randomness of its
// own.
//
//   waiting  in order of arrival; preempted sequences go to the front
//   loading  part of the prefix is coming up from a lower tier; holds blocks
//   ready    it has come (as much of it as was sound); holds blocks
//   running  in order of admission; holds blocks
//
// A step serves decoding sequences first, then running prefills, then ready ones, then admits from waiting. A running
// sequence that finds no block revokes the newest loads, then preempts the newest runner (itself at last), whose
// published blocks stay findable, here or below. The oldest runner is never preempted for another, and every accepted
// sequence fits the pool alone: so some sequence always progresses. A plan is empty only while transfers are about to
// give blocks back or bring them up.
//
// Two sequences with the same prefix do not compute it twice: one waits while a running one is about to publish its
// next block.
//
// Engine thread only.

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/engine.h"
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

  // Every sequence, running first.
  std::vector<Sequence*> All() const;
  Sequence* Find(std::uint64_t id) const;

  bool has_work() const { return !by_id_.empty(); }
  std::int32_t num_running() const { return static_cast<std::int32_t>(running_.size()); }
  std::int32_t num_waiting() const { return static_cast<std::int32_t>(by_id_.size() - running_.size()); }
  std::int32_t num_loading() const { return static_cast<std::int32_t>(loading_.size() + ready_.size()); }

  void CheckInvariants() const;

 private:
  bool Reserve(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan);
  bool RevokeNewestLoad();
  void PreemptNewest(StepPlan& plan);
  void Schedule(Sequence& sequence, std::int32_t num_tokens, StepPlan& plan);
  void Unschedule(Sequence& sequence, StepPlan& plan);
  bool HasRoomFor(const Sequence& sequence, std::size_t num_held_blocks) const;
  void AdmitReady(StepPlan& plan, double now);
  void Admit(StepPlan& plan, double now);
  bool StartLoading(Sequence& sequence, std::span<const BlockKey> below);
  void Run(std::unique_ptr<Sequence> sequence, StepPlan& plan, double now);
  void BackToWaiting(std::unique_ptr<Sequence> sequence);
  void GiveUpBlocks(Sequence& sequence);
  std::int32_t ChunkOf(const Sequence& sequence, const StepPlan& plan) const;
  void GrowKeys(Sequence& sequence) const;
  void Claim(Sequence& sequence);
  void Unclaim(Sequence& sequence);

  KvStore& store_;
  const KeyChain& chain_;
  const Options options_;
  EngineObserver* const observer_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> loading_;
  std::deque<std::unique_ptr<Sequence>> ready_;
  std::vector<std::unique_ptr<Sequence>> running_;
  absl::flat_hash_map<std::uint64_t, Sequence*> by_id_;
  absl::flat_hash_map<BlockKey, std::int32_t> claims_;  // blocks that running sequences will publish
};

}  // namespace spillway
