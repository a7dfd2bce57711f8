#include "engine/calibration.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "engine/sequence.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

constexpr double kTick = 1e-6;            // no probe counts as shorter
constexpr double kLeastShare = 0.02;      // of a step's time that a difference between steps can tell
constexpr double kAttentionShare = 0.25;  // of the rate of matrix products, where attention was not measured
constexpr std::int32_t kLongContext = 2048;
constexpr int kCopies = 4;
constexpr int kSteps = 3;              // of one token
constexpr double kLongestFirst = 1.0;  // seconds; what takes longer is slow, not cold

std::int32_t BlocksFor(std::int32_t num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

class Calibrator {
 public:
  Calibrator(const Model& model, StepRunner& runner, KvStore& store, const CalibrationOptions& options)
      : runner_(runner),
        store_(store),
        options_(options),
        costs_(CostsOf(model.config(), model.kv_layout(), static_cast<double>(model.weight_bytes()))) {}

  absl::StatusOr<ComputeSpeed> Compute();
  absl::StatusOr<LinkSpeed> Link(Device& device);
  const ModelCosts& costs() const { return costs_; }
  SizedSpeed Products(const ComputeSpeed& speed) const;

 private:
  absl::StatusOr<double> StepSeconds(std::int32_t cached, std::int32_t tokens);
  absl::Status MeasureProducts(ComputeSpeed& speed);
  absl::Status MeasureAttention(ComputeSpeed& speed);
  absl::Status MeasureKvReads(ComputeSpeed& speed);
  bool HasTimeFor(double seconds) const { return Now() + seconds < deadline_; }
  std::int32_t longest_sequence() const {
    return std::min(options_.max_model_len, static_cast<std::int32_t>(store_.num_available()) * kBlockTokens);
  }
  double LinearFlops(std::int32_t tokens) const { return tokens * costs_.flops_per_token + costs_.flops_per_sample; }

  StepRunner& runner_;
  KvStore& store_;
  const CalibrationOptions options_;
  const ModelCosts costs_;
  double deadline_ = 0;
  struct Measured {
    std::int32_t tokens = 0;
    double seconds = 0;
  };
  std::vector<Measured> prefills_;  // with nothing cached
};

// One sequence's step: `tokens` new ones behind `cached`, whose keys and values are whatever the blocks hold.
absl::StatusOr<double> Calibrator::StepSeconds(std::int32_t cached, std::int32_t tokens) {
  Sequence sequence;
  sequence.request.sampling.temperature = 0;
  sequence.tokens.assign(static_cast<std::size_t>(cached) + static_cast<std::size_t>(tokens), 0);
  sequence.num_prompt = sequence.size();
  sequence.num_computed = cached;
  sequence.num_planned = tokens;
  for (std::int32_t i = 0; i < BlocksFor(cached + tokens); ++i) {
    std::optional<BlockRef> block = store_.Take();
    SPILLWAY_CHECK(block.has_value());
    sequence.blocks.push_back(*std::move(block));
  }
  StepPlan plan;
  plan.sequences.push_back({.sequence = &sequence, .samples = true});
  plan.num_tokens = tokens;

  const double begin = Now();
  runner_.Launch(plan, store_.view(), [] {});
  RETURN_IF_ERROR(runner_.Await());
  return std::max(kTick, Now() - begin);
}

absl::StatusOr<ComputeSpeed> Calibrator::Compute() {
  ComputeSpeed speed;
  // The first use of anything has a price that no later one pays: on a GPU kernels are loaded (81 ms for a step
  // of 1.4), and the second step of a size is recorded as a graph. So the budget begins after the first, and the least
  // counts.
  ASSIGN_OR_RETURN(speed.step_floor_seconds, StepSeconds(0, 1));
  deadline_ = Now() + options_.budget_seconds;
  const bool has_second = options_.budget_seconds > 0 && speed.step_floor_seconds < kLongestFirst;
  for (int i = 0; i < kSteps && ((i == 0 && has_second) || HasTimeFor(speed.step_floor_seconds)); ++i) {
    ASSIGN_OR_RETURN(const double again, StepSeconds(0, 1));
    speed.step_floor_seconds = std::min(speed.step_floor_seconds, again);
  }
  speed.kv_bytes_per_second = std::max(costs_.weight_bytes, costs_.kv_bytes_per_token) / speed.step_floor_seconds;
  RETURN_IF_ERROR(MeasureProducts(speed));
  speed.attention_flops_per_second = kAttentionShare * speed.linear_flops_per_second;
  RETURN_IF_ERROR(MeasureKvReads(speed));
  RETURN_IF_ERROR(MeasureAttention(speed));
  return speed;
}

// Ever longer prefills, while time allows: the longest is the furthest above the floor.
absl::Status Calibrator::MeasureProducts(ComputeSpeed& speed) {
  speed.linear_flops_per_second = LinearFlops(1) / speed.step_floor_seconds;
  prefills_.push_back({.tokens = 1, .seconds = speed.step_floor_seconds});
  const std::int32_t most = std::min({options_.max_step_tokens, longest_sequence(), 512});
  const double begin = Now();
  const double share = (deadline_ - begin) / 2;  // the rest is for attention
  for (std::int32_t tokens = std::min(32, most); tokens <= most && tokens > 1; tokens *= 2) {
    const double expected = std::max(speed.step_floor_seconds, LinearFlops(tokens) / speed.linear_flops_per_second);
    // Of the first probe nothing is known yet but that it takes less than its tokens one by one.
    if (tokens > 32 && Now() + expected > begin + share) break;
    if (tokens <= 32 && !HasTimeFor(4 * speed.step_floor_seconds)) break;
    ASSIGN_OR_RETURN(double seconds, StepSeconds(0, tokens));
    if (Now() + seconds < begin + share) {  // the first of its size touches memory that the next ones find
      ASSIGN_OR_RETURN(const double again, StepSeconds(0, tokens));
      seconds = std::min(seconds, again);
    }
    prefills_.push_back({.tokens = tokens, .seconds = seconds});
    speed.linear_flops_per_second = LinearFlops(tokens) / seconds;
  }
  return absl::OkStatus();
}

// What the prefills took but for their attention.
SizedSpeed Calibrator::Products(const ComputeSpeed& speed) const {
  SizedSpeed products;
  for (const Measured& each : prefills_) {
    const double attention = costs_.AttentionFlops(0, each.tokens) / speed.attention_flops_per_second +
                             each.tokens * costs_.kv_bytes_per_token / speed.kv_bytes_per_second;
    const double seconds = std::max(each.seconds - attention, each.seconds / 2);
    products.Measure(LinearFlops(each.tokens), LinearFlops(each.tokens), seconds, 1);
  }
  return products;
}

absl::Status Calibrator::MeasureAttention(ComputeSpeed& speed) {
  const std::int32_t tokens = std::min({options_.max_step_tokens, longest_sequence() / 2, 64});
  const std::int32_t cached = std::min(longest_sequence() - tokens, kLongContext) / kBlockTokens * kBlockTokens;
  if (tokens < kBlockTokens || cached < kBlockTokens) return absl::OkStatus();
  const double flops = costs_.AttentionFlops(cached, tokens);
  const double products = std::max(speed.step_floor_seconds, LinearFlops(tokens) / speed.linear_flops_per_second);
  if (!HasTimeFor(products + flops / speed.attention_flops_per_second)) return absl::OkStatus();
  ASSIGN_OR_RETURN(const double alone, StepSeconds(0, tokens));
  ASSIGN_OR_RETURN(const double seconds, StepSeconds(cached, tokens));
  const double extra = std::max(seconds - alone, kLeastShare * seconds);
  const double reading = cached * costs_.kv_bytes_per_token / speed.kv_bytes_per_second;
  speed.attention_flops_per_second = flops / std::max(extra - reading, extra / 2);
  return absl::OkStatus();
}

absl::Status Calibrator::MeasureKvReads(ComputeSpeed& speed) {
  const std::int32_t cached = std::min(longest_sequence() - 1, kLongContext) / kBlockTokens * kBlockTokens;
  const double bytes = cached * costs_.kv_bytes_per_token;
  if (cached < kBlockTokens || !HasTimeFor(speed.step_floor_seconds + bytes / speed.kv_bytes_per_second)) {
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const double seconds, StepSeconds(cached, 1));
  const double extra = std::max(seconds - speed.step_floor_seconds, kLeastShare * seconds);
  speed.kv_bytes_per_second = bytes / extra;
  return absl::OkStatus();
}

// Copies up of one block and of the largest span. On a paced link a copy takes at least what the pacing says.
absl::StatusOr<LinkSpeed> Calibrator::Link(Device& device) {
  const std::size_t block_bytes = store_.layout().block_bytes();
  const std::size_t most =
      std::min<std::size_t>(std::max<std::size_t>(options_.span_bytes / block_bytes, 1), store_.num_available());
  std::vector<BlockRef> blocks;  // holds what is overwritten
  while (blocks.size() < most) {
    std::optional<BlockRef> block = store_.Take();
    SPILLWAY_CHECK(block && static_cast<std::size_t>(block->id()) == blocks.size()) << "blocks were taken before";
    blocks.push_back(*std::move(block));
  }
  ASSIGN_OR_RETURN(const Buffer source, device.Allocate(MemoryKind::kPinnedHost, most * block_bytes));
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.NewStream());
  stream->Copy(store_.view().pool, source.get(), source.size_bytes);  // touches both ends
  RETURN_IF_ERROR(stream->Record()->Await());
  LinkSpeed speed;
  for (const std::size_t num_blocks : {std::size_t{1}, most}) {
    const std::size_t bytes = num_blocks * block_bytes;
    const double begin = Now();
    for (int i = 0; i < kCopies; ++i) stream->Copy(store_.view().pool, source.get(), bytes);
    RETURN_IF_ERROR(stream->Record()->Await());
    double seconds = std::max(kTick, Now() - begin) / kCopies;
    if (options_.pacing.bytes_per_second > 0) {
      const double paced =
          options_.pacing.latency_seconds + static_cast<double>(bytes) / options_.pacing.bytes_per_second;
      seconds = std::max(seconds, paced);
    }
    speed.Measure(static_cast<double>(bytes), static_cast<double>(bytes), seconds, 1);
    if (most == 1) break;
  }
  KvStore::Release(blocks);
  return speed;
}

}  // namespace

absl::StatusOr<CostModel> Calibrate(Device& device, const Model& model, StepRunner& runner, KvStore& store,
                                    const CalibrationOptions& options) {
  Calibrator calibrator(model, runner, store, options);
  LinkSpeed link;
  if (options.has_link) {
    ASSIGN_OR_RETURN(link, calibrator.Link(device));
  }
  ASSIGN_OR_RETURN(const ComputeSpeed compute, calibrator.Compute());
  return CostModel(calibrator.costs(), compute, link, static_cast<double>(store.layout().block_bytes()),
                   calibrator.Products(compute));
}

}  // namespace spillway
