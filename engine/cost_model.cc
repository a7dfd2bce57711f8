#include "engine/cost_model.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/check.h"
#include "kernels/kv_layout.h"

namespace spillway {
namespace {

// Weight of a new report against what is known. The same for what was faster and what was slower, or predictions would
// lie beside the middle of what a disturbed machine does.
constexpr double kReportWeight = 0.1;
constexpr double kStepWeight = 0.2;
// A report further off than this counts as if it were this far off: a page fault or a suspended process is not a speed.
constexpr double kMaxSurprise = 2;
constexpr double kLargest = 1e30;  // more FLOPs than any step has: the speed of the largest that is known

// max(floor, FLOPs / rate), of steps of at least one token.
SizedSpeed Roofline(double flops_per_token, const ComputeSpeed& compute) {
  SizedSpeed products;
  const double rate = compute.linear_flops_per_second;
  const double knee = std::max(flops_per_token, compute.step_floor_seconds * rate);
  products.Measure(1, knee, 1 / rate, 1);
  if (knee >= 2 * flops_per_token) products.Measure(flops_per_token, flops_per_token, compute.step_floor_seconds, 1);
  return products;
}

// A report of a speed of which the first counts whole.
void Follow(double& speed, double report) {
  if (speed <= 0) {
    speed = report;
  } else {
    speed *= std::pow(std::clamp(report / speed, 1 / kMaxSurprise, kMaxSurprise), kReportWeight);
  }
}

}  // namespace

CostModel::CostModel(const ModelCosts& costs, const ComputeSpeed& compute, const LinkSpeed& link, double copy_bytes,
                     const SizedSpeed& products)
    : costs_(costs),
      compute_(compute),
      products_(products.is_known() ? products : Roofline(costs.flops_per_token, compute)),
      link_(link),
      copy_bytes_(copy_bytes) {
  SPILLWAY_CHECK(compute.linear_flops_per_second > 0 && compute.attention_flops_per_second > 0 &&
                 compute.kv_bytes_per_second > 0 && compute.step_floor_seconds >= 0);
  SPILLWAY_CHECK(costs.flops_per_token > 0 && costs.kv_bytes_per_token > 0);
}

void CostModel::Add(StepWork& work, std::int64_t cached, std::int64_t tokens, bool samples) const {
  work.num_tokens += tokens;
  work.linear_flops += static_cast<double>(tokens) * costs_.flops_per_token + (samples ? costs_.flops_per_sample : 0);
  work.attention_flops += costs_.AttentionFlops(static_cast<double>(cached), static_cast<double>(tokens));
  work.kv_bytes += static_cast<double>(cached + tokens) * costs_.kv_bytes_per_token;
}

double CostModel::StepSeconds(const StepWork& work) const {
  if (work.num_tokens == 0) return 0;
  return LinearSeconds(work.linear_flops) + work.attention_flops / compute_.attention_flops_per_second +
         work.kv_bytes / compute_.kv_bytes_per_second;
}

double CostModel::ComputeSeconds(std::int64_t cached, std::int64_t tokens) const {
  StepWork work;
  if (tokens > 0) Add(work, cached, tokens, /*samples=*/true);
  return StepSeconds(work);
}

// Layers take turns: all but the first of the shorter part are hidden behind the longer one.
double CostModel::LoadingStepSeconds(double compute_seconds, std::int64_t loaded) const {
  const double load = LoadSeconds(loaded);
  return std::max(load, compute_seconds) + std::min(load, compute_seconds) / costs_.num_layers;
}

double CostModel::LoadSeconds(std::int64_t tokens) const {
  if (tokens <= 0) return 0;
  const double bytes_per_second = link_bytes_per_second();
  if (bytes_per_second <= 0) return std::numeric_limits<double>::infinity();  // there is no link
  return static_cast<double>(tokens) * costs_.kv_bytes_per_token / bytes_per_second;
}

double CostModel::kappa_crit() const {
  return costs_.flops_per_token / costs_.kv_bytes_per_token * link_bytes_per_second() /
         compute_.linear_flops_per_second;
}

// Load K tokens: K B / BW. Compute T behind them: max(floor, T F / C) + T (K + T / 2) A / C_a + (K + T) B / R. Equal at
// K.
double CostModel::KappaCritAt(std::int64_t tokens) const {
  const auto count = static_cast<double>(tokens);
  const double attention_per_loaded =
      count * costs_.attention_flops_per_key / compute_.attention_flops_per_second + ReadSeconds(1);
  const double load_per_loaded = LoadSeconds(1);
  if (attention_per_loaded >= load_per_loaded) return std::numeric_limits<double>::infinity();
  const double compute_alone = LinearSeconds(count * costs_.flops_per_token) +
                               costs_.AttentionFlops(0, count) / compute_.attention_flops_per_second +
                               ReadSeconds(count);
  return compute_alone / (load_per_loaded - attention_per_loaded) / count;
}

double CostModel::critical_chunk_tokens() const {
  if (costs_.attention_flops_per_key <= 0) return std::numeric_limits<double>::infinity();
  return std::max(0.0, LoadSeconds(1) - ReadSeconds(1)) * compute_.attention_flops_per_second /
         costs_.attention_flops_per_key;
}

double CostModel::LinkOverhead(std::int64_t loaded, std::int64_t tokens) const {
  const double compute = ComputeSeconds(loaded, tokens);
  return compute > 0 ? LoadSeconds(loaded) / compute : 0;
}

Restoration CostModel::With(const Prefill& prefill, const Backlog& backlog, std::int64_t recomputed) const {
  const std::int64_t loaded = prefill.below - recomputed;
  const double link = loaded > 0 ? backlog.link_seconds + LoadSeconds(loaded) : 0;
  const double head = backlog.compute_seconds + ComputeSeconds(prefill.resident, recomputed);
  return {.recomputed = recomputed,
          .loaded = loaded,
          .seconds = std::max(link, head) + ComputeSeconds(prefill.resident + prefill.below, prefill.fresh)};
}

std::int64_t CostModel::HiddenTokens(const Prefill& prefill, const Backlog& backlog) const {
  if (prefill.hiding == 0 || prefill.below == 0 || backlog.link_seconds > 0) return 0;
  const double share = ComputeSeconds(prefill.resident + prefill.below, prefill.hiding) / LoadSeconds(prefill.below);
  if (share >= 1) return prefill.below;
  const std::int64_t num_blocks = prefill.below / kBlockTokens;
  return static_cast<std::int64_t>(share * static_cast<double>(num_blocks)) * kBlockTokens;
}

Restoration CostModel::Load(const Prefill& prefill, const Backlog& backlog) const {
  const std::int64_t hidden = HiddenTokens(prefill, backlog);
  if (hidden == 0) return With(prefill, backlog, 0);
  Restoration load = With({.resident = prefill.resident, .below = prefill.below - hidden}, backlog, 0);
  load.loaded = prefill.below;
  const std::int64_t cached = prefill.resident + prefill.below;
  const double step = ComputeSeconds(cached, prefill.hiding);
  load.seconds += ComputeSeconds(cached, prefill.fresh) + LoadingStepSeconds(step, hidden) - step;
  return load;
}

Restoration CostModel::Recompute(const Prefill& prefill, const Backlog& backlog) const {
  // One prefill over both, not two.
  return {.recomputed = prefill.below,
          .loaded = 0,
          .seconds = backlog.compute_seconds + ComputeSeconds(prefill.resident, prefill.below + prefill.fresh)};
}

Restoration CostModel::Split(const Prefill& prefill, const Backlog& backlog) const {
  const std::int64_t blocks = prefill.below / kBlockTokens;
  if (blocks < 2) {
    const Restoration load = Load(prefill, backlog);
    const Restoration recompute = Recompute(prefill, backlog);
    return recompute.seconds < load.seconds ? recompute : load;
  }
  // Recomputing grows with the head and loading shrinks: the best is where they cross, or one block before.
  std::int64_t low = 1;
  std::int64_t high = blocks - 1;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    const double head = backlog.compute_seconds + ComputeSeconds(prefill.resident, middle * kBlockTokens);
    const double tail = backlog.link_seconds + LoadSeconds(prefill.below - middle * kBlockTokens);
    if (head >= tail) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const Restoration at = With(prefill, backlog, low * kBlockTokens);
  if (low == 1) return at;
  const Restoration before = With(prefill, backlog, (low - 1) * kBlockTokens);
  return before.seconds <= at.seconds ? before : at;
}

Restoration CostModel::Best(const Prefill& prefill, const Backlog& backlog) const {
  Restoration best = Load(prefill, backlog);
  for (const Restoration& other : {Split(prefill, backlog), Recompute(prefill, backlog)}) {
    if (other.seconds < best.seconds) best = other;
  }
  return best;
}

// Each part of the prediction takes its share of the surprise.
void CostModel::OnStep(const StepWork& work, double seconds) {
  const double predicted = StepSeconds(work);
  if (predicted <= 0 || seconds <= 0) return;
  const double surprise = std::clamp(seconds / predicted, 1 / kMaxSurprise, kMaxSurprise);
  const auto factor = [&](double part) { return std::pow(surprise, kStepWeight * part / predicted); };
  const double linear = LinearSeconds(work.linear_flops);
  // Weighed already; so a size that is new begins with what was predicted for it.
  products_.Measure(work.linear_flops, work.linear_flops, linear * factor(linear), 1);
  compute_.step_floor_seconds = LinearSeconds(costs_.flops_per_token + costs_.flops_per_sample);
  compute_.linear_flops_per_second = products_.PerSecond(kLargest);
  compute_.attention_flops_per_second /= factor(work.attention_flops / compute_.attention_flops_per_second);
  compute_.kv_bytes_per_second /= factor(work.kv_bytes / compute_.kv_bytes_per_second);
}

void CostModel::OnTransfer(double bytes, double copy_bytes, double seconds) {
  if (bytes <= 0 || copy_bytes <= 0 || seconds <= 0) return;
  link_.Measure(bytes, copy_bytes, seconds, kReportWeight);
  copy_bytes_ += kReportWeight * (copy_bytes - copy_bytes_);
}

double CostModel::StreamSeconds(double bytes_per_token) const {
  const double speed = stream_bytes_per_second_ > 0 ? stream_bytes_per_second_ : link_bytes_per_second();
  return speed > 0 ? bytes_per_token / speed : 0;
}

// The link carries home x kv - l (kv - input), computing takes work + l x projection. Equal at l.
std::int64_t CostModel::ProjectedTokens(std::int64_t home, std::int64_t kept, const StepWork& work) const {
  const double saved = StreamSeconds(costs_.kv_bytes_per_token - costs_.input_bytes_per_token);
  if (saved <= 0) return 0;
  const double flops_per_second = compute_.projection_flops_per_second > 0 ? compute_.projection_flops_per_second
                                                                           : compute_.linear_flops_per_second;
  const double projection = costs_.projection_flops_per_token / flops_per_second;
  const double spare = static_cast<double>(home) * StreamSeconds(costs_.kv_bytes_per_token) - StepSeconds(work);
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(spare / (saved + projection)), 0, kept);
}

void CostModel::OnStream(double bytes, double seconds) {
  if (bytes <= 0 || seconds <= 0) return;
  Follow(stream_bytes_per_second_, bytes / seconds);
}

void CostModel::OnProjection(double flops, double seconds) {
  if (flops <= 0 || seconds <= 0) return;
  Follow(compute_.projection_flops_per_second, flops / seconds);
}

// Sending l inputs and length - l keys and values takes l h p + 2 (length - l) w p bytes, projecting 4 l h w FLOPs.
// Time falls with l while the projection hides under the transfer of the rest, and is least where they are equal.
KvprSplit SplitActivations(const KvprShape& shape, double flops_per_second, double link_bytes_per_second,
                           std::int64_t length, std::int64_t limit) {
  if (shape.hidden >= 2 * shape.kv_width || length <= 0) return {};
  const auto all = static_cast<double>(length);
  const double crossing = all * shape.element_bytes * flops_per_second /
                          (2 * shape.hidden * link_bytes_per_second + shape.element_bytes * flops_per_second);
  const std::int64_t recomputed = std::min(limit, static_cast<std::int64_t>(crossing));
  const double saved = static_cast<double>(recomputed) / all * (1 - shape.hidden / (2 * shape.kv_width));
  return {.recomputed = recomputed, .time_ratio = 1 - saved};
}

}  // namespace spillway
