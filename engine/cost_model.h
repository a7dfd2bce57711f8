#pragma once

// CostModel: what a request costs on the link and on the compute units, from measured speeds.
//
//   compute   a step takes what its matrix products take by their size, max(floor, FLOPs / rate) where that was not
//             measured, + attention: its FLOPs / rate + reading the keys and values, which the few new tokens of a
//             long sequence do not hide
//   link      bytes of cached tokens over the sustained bandwidth of copies of that size
//   kappa     tokens to load / tokens to compute; kappa_crit is where the two times are equal
//
// Pure arithmetic: no clock, no device. Speeds begin with those of a calibration (or of a described machine) and follow
// the reports of steps and transfers as exponentially weighted means. Engine thread only.

#include <cstdint>

#include "engine/model_costs.h"
#include "engine/sized_speed.h"

namespace spillway {

using LinkSpeed = SizedSpeed;  // of copies, by bytes

struct ComputeSpeed {
  double linear_flops_per_second = 0;  // matrix products of the largest steps
  double attention_flops_per_second = 0;
  double kv_bytes_per_second = 0;          // reading keys and values on the device
  double step_floor_seconds = 0;           // of a step however small: weights read once, launches
  double projection_flops_per_second = 0;  // keys and values from kept inputs; 0: as other matrix products
};

// What a step computes. Filled by CostModel::Add.
struct StepWork {
  std::int64_t num_tokens = 0;
  double linear_flops = 0;
  double attention_flops = 0;
  double kv_bytes = 0;
};

// A prefix and what follows it: `resident` tokens are on the device, the `below` after them in lower tiers, the `fresh`
// after those nowhere. `resident` and `below` are whole blocks.
struct Prefill {
  std::int64_t resident = 0;
  std::int64_t below = 0;
  std::int64_t fresh = 0;
  // Of the fresh tokens those of the first step, where the last of the loaded ones may come up inside it, layer by
  // layer (LayerLoader); 0 where all of them come up before.
  std::int64_t hiding = 0;
};

// Work that is ahead on each resource.
struct Backlog {
  double link_seconds = 0;
  double compute_seconds = 0;
};

// How the tokens below come to the device: the first `recomputed` of them from token ids, while the other `loaded`
// ones come up.
struct Restoration {
  std::int64_t recomputed = 0;
  std::int64_t loaded = 0;
  double seconds = 0;  // predicted, until the fresh tokens are computed too
};

class CostModel {
 public:
  // `products`: of steps, by FLOPs; from floor and rate where nothing is known.
  CostModel(const ModelCosts& costs, const ComputeSpeed& compute, const LinkSpeed& link, double copy_bytes,
            const SizedSpeed& products = {});

  // --- Compute ---
  // One sequence's part of a step: `tokens` new ones behind `cached`; `samples`: its last row's logits are wanted.
  void Add(StepWork& work, std::int64_t cached, std::int64_t tokens, bool samples) const;
  double StepSeconds(const StepWork& work) const;  // 0 for an empty step
  // A prefill alone, as one step. 0 where tokens is 0.
  double ComputeSeconds(std::int64_t cached, std::int64_t tokens) const;
  // Of a step that computes for `compute_seconds` while so many tokens come up inside it: a layer waits for its own.
  double LoadingStepSeconds(double compute_seconds, std::int64_t loaded) const;

  // --- Link ---
  double LoadSeconds(std::int64_t tokens) const;
  double link_bytes_per_second() const { return link_.PerSecond(copy_bytes_); }  // at the present copy size
  double copy_bytes() const { return copy_bytes_; }
  const LinkSpeed& link() const { return link_; }
  const SizedSpeed& products() const { return products_; }

  // --- Kappa ---
  // Of matrix products alone: (F / B_kv) (BW / C).
  double kappa_crit() const;
  // The ratio of loaded to new tokens at which both times are equal for `tokens` new ones, the floor and attention to
  // the loaded tokens included. Infinite from critical_chunk_tokens on.
  double KappaCritAt(std::int64_t tokens) const;
  // T*: a prefill of this many tokens hides the load of its prefix, however long.
  double critical_chunk_tokens() const;
  // P_OH: seconds of the load over seconds of the prefill.
  double LinkOverhead(std::int64_t loaded, std::int64_t tokens) const;

  // --- Load, recompute or split ---
  // Of the tokens below, all loaded, the last ones that come up inside the step of the `hiding` fresh ones: what
  // computing these hides, in whole blocks. None where the link has work ahead.
  std::int64_t HiddenTokens(const Prefill& prefill, const Backlog& backlog) const;
  Restoration Load(const Prefill& prefill, const Backlog& backlog) const;
  Restoration Recompute(const Prefill& prefill, const Backlog& backlog) const;
  // The best with at least one block on each side; the better of the two above where there are fewer than two blocks.
  Restoration Split(const Prefill& prefill, const Backlog& backlog) const;
  // The fastest of the three; of equals, the one that loads more.
  Restoration Best(const Prefill& prefill, const Backlog& backlog) const;

  // --- Streaming, see activation_recompute.h ---
  // Of `home` tokens that a step reads at home, how many to project from their inputs, at most `kept`: as many as make
  // the link and computing end together, where copies run ahead of a step that computes `work` besides.
  std::int64_t ProjectedTokens(std::int64_t home, std::int64_t kept, const StepWork& work) const;

  // --- Reports ---
  void OnStep(const StepWork& work, double seconds);
  // `bytes` came up in copies of `copy_bytes` on average, the link busy for `seconds`.
  void OnTransfer(double bytes, double copy_bytes, double seconds);

  // What a streamed step copied from home, a layer's part of a block at a time, and what it projected.
  void OnStream(double bytes, double seconds);
  void OnProjection(double flops, double seconds);

  double stream_bytes_per_second() const { return stream_bytes_per_second_; }  // 0: not reported yet
  const ModelCosts& costs() const { return costs_; }
  const ComputeSpeed& compute() const { return compute_; }

 private:
  double LinearSeconds(double flops) const { return products_.Seconds(flops); }
  double StreamSeconds(double bytes_per_token) const;
  double ReadSeconds(double tokens) const { return tokens * costs_.kv_bytes_per_token / compute_.kv_bytes_per_second; }
  Restoration With(const Prefill& prefill, const Backlog& backlog, std::int64_t recomputed) const;

  ModelCosts costs_;
  ComputeSpeed compute_;
  SizedSpeed products_;  // of steps, by FLOPs
  LinkSpeed link_;
  double copy_bytes_;
  double stream_bytes_per_second_ = 0;  // 0: not reported yet
};

// KVPR's split (row by row): of `length` cached tokens the first ones' layer inputs are sent instead of their keys and
// values, which are projected from them while the rest's come. The count at which projection and transfer end together,
// at most `limit`; 0 where an input is no smaller than the keys and values it replaces (hidden >= 2 x kv_width).
struct KvprShape {
  double hidden = 0;
  double kv_width = 0;  // kv heads x head_dim
  double element_bytes = 2;
};
struct KvprSplit {
  std::int64_t recomputed = 0;
  double time_ratio = 1;  // of the time of sending every key and value
};
KvprSplit SplitActivations(const KvprShape& shape, double flops_per_second, double link_bytes_per_second,
                           std::int64_t length, std::int64_t limit);

}  // namespace spillway
