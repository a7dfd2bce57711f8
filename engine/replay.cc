#include "engine/replay.h"

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "engine/sequence.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"
#include "kvstore/kv_store.h"

namespace spillway {
namespace {

// Blocks hold no bytes here: one element per row stands for them.
constexpr KvLayout kEmptyLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 1, .dtype = DType::kBF16};

Buffer EmptySlab(std::uint32_t num_blocks) {
  const std::size_t bytes = num_blocks * kEmptyLayout.block_bytes();
  return {.data = std::shared_ptr<std::byte>(new std::byte[bytes], std::default_delete<std::byte[]>()),
          .size_bytes = bytes};
}

std::unique_ptr<HostTier> MakeHost(std::uint32_t num_blocks) {
  if (num_blocks == 0) return MakeNullHostTier();
  return MakeHostTier(EmptySlab(num_blocks), {.block_bytes = kEmptyLayout.block_bytes(), .num_blocks = num_blocks});
}

using Indices = std::vector<std::size_t>;

// Where the longest known beginning of the prompt went before, unless that replica has far more than its share.
class Router {
 public:
  Router(Routing routing, std::int32_t replicas) : routing_(routing), tokens_(static_cast<std::size_t>(replicas)) {}

  std::size_t Route(const TraceRequest& request) {
    std::size_t chosen = next_++ % tokens_.size();
    if (routing_ == Routing::kPrefix) {
      chosen = static_cast<std::size_t>(std::ranges::min_element(tokens_) - tokens_.begin());
      std::uint64_t prefix = 0;
      for (const std::int32_t id : request.ids) {
        prefix = absl::HashOf(prefix, id);
        const auto found = last_.find(prefix);
        if (found == last_.end()) break;
        if (tokens_[found->second] <= MostTokens()) chosen = found->second;
      }
      prefix = 0;
      for (const std::int32_t id : request.ids) {
        prefix = absl::HashOf(prefix, id);
        last_[prefix] = chosen;
      }
    }
    tokens_[chosen] += request.prompt_tokens;
    total_ += request.prompt_tokens;
    return chosen;
  }

 private:
  // More than its share, and more than a few long prompts more.
  double MostTokens() const { return 1.25 * total_ / static_cast<double>(tokens_.size()) + 200'000; }

  const Routing routing_;
  std::size_t next_ = 0;
  std::vector<double> tokens_;  // given to each replica
  double total_ = 0;
  absl::flat_hash_map<std::uint64_t, std::size_t> last_;  // hash of a beginning -> replica
};

class Replica {
 public:
  Replica(const Trace& trace, const CostModel& model, const ReplayOptions& options, ReplayResult& result)
      : trace_(trace),
        model_(model),
        options_(options),
        result_(result),
        host_(MakeHost(options.host_blocks)),
        link_(new VirtualLink(*host_, model.LoadSeconds(kBlockTokens), options.lanes)),
        store_(KvStore::Make(
            EmptySlab(options.device_blocks), std::unique_ptr<BlockTransfers>(link_), *host_,
            {.layout = kEmptyLayout,
             .num_blocks = options.device_blocks,
             .caching = options.scheduling.enable_prefix_caching ? PrefixCaching::kOn : PrefixCaching::kOff,
             .pacing = {},
             .before_copy = nullptr})),
        scheduler_(*store_, chain_, options.scheduling, nullptr, &model) {}

  void Run(const Indices& indices, const std::function<void()>& done);

 private:
  double ArrivalOf(std::size_t index) const { return trace_.requests[index].arrival_seconds / options_.time_scale; }
  void Submit(std::size_t index);
  void Advance(double now);
  void Step(const StepPlan& plan, const std::function<void()>& done);
  void Digest(Sequence& sequence, const std::function<void()>& done);
  double WhenSomethingHappens(const Indices& indices, std::size_t next) const;

  const Trace& trace_;
  const CostModel& model_;
  const ReplayOptions& options_;
  ReplayResult& result_;
  const KeyChain chain_{"0"};
  std::unique_ptr<HostTier> host_;
  VirtualLink* const link_;  // store_ owns it
  std::unique_ptr<KvStore> store_;
  Scheduler scheduler_;
  double now_ = 0;
};

void Replica::Run(const Indices& indices, const std::function<void()>& done) {
  std::size_t next = 0;
  while (next < indices.size() || scheduler_.has_work()) {
    for (; next < indices.size() && ArrivalOf(indices[next]) <= now_; ++next) {
      if (result_.requests[indices[next]].is_refused) {
        done();
      } else {
        Submit(indices[next]);
      }
    }
    const StepPlan plan = scheduler_.has_work() ? scheduler_.Plan(now_) : StepPlan();
    if (plan.empty()) {
      if (next == indices.size() && !scheduler_.has_work()) return;
      Advance(WhenSomethingHappens(indices, next));
    } else {
      Step(plan, done);
    }
  }
  result_.restore_seconds += link_->busy_seconds(Transfer::Kind::kRestore);
  result_.store_seconds += link_->busy_seconds(Transfer::Kind::kStore);
}

// There is nothing to compute: the clock goes to the next arrival or transfer.
double Replica::WhenSomethingHappens(const Indices& indices, std::size_t next) const {
  const std::optional<double> transfer = link_->NextCompletion();
  SPILLWAY_CHECK(transfer || next < indices.size()) << "there is work and nothing will happen";
  if (next == indices.size()) return *transfer;
  const double arrival = ArrivalOf(indices[next]);
  return transfer ? std::min(*transfer, arrival) : arrival;
}

void Replica::Submit(std::size_t index) {
  const TraceRequest& request = trace_.requests[index];
  auto sequence = std::make_unique<Sequence>();
  sequence->request.id = index + 1;
  sequence->request.sampling.max_tokens = request.output_tokens;
  sequence->submitted_at = ArrivalOf(index);
  sequence->tokens = PromptOf(trace_, request, options_.vocab);
  sequence->num_prompt = sequence->size();
  scheduler_.Add(std::move(sequence));
}

void Replica::Advance(double now) {
  now_ = std::max(now_, now);
  link_->AdvanceTo(now_);
  if (store_->Collect()) scheduler_.Loaded();
}

void Replica::Step(const StepPlan& plan, const std::function<void()>& done) {
  StepWork work;
  for (const PlannedSequence& planned : plan.sequences) {
    model_.Add(work, planned.sequence->num_computed, planned.sequence->num_planned, planned.samples);
  }
  double seconds = model_.StepSeconds(work);
  if (plan.num_arriving > 0) {
    const std::int64_t arriving = std::int64_t{plan.num_arriving} * kBlockTokens;
    link_->Occupy(model_.LoadSeconds(arriving));
    seconds = model_.LoadingStepSeconds(seconds, arriving);
  }
  result_.compute_seconds += seconds;
  ++result_.num_steps;
  result_.num_preempted += plan.num_preempted;
  const double ends = now_ + seconds;
  now_ = ends;
  link_->AdvanceTo(now_);
  scheduler_.Computed(plan);
  for (const PlannedSequence& planned : plan.sequences) {
    if (planned.samples) Digest(*planned.sequence, done);
  }
  if (store_->Collect()) scheduler_.Loaded();
}

void Replica::Digest(Sequence& sequence, const std::function<void()>& done) {
  const auto index = static_cast<std::size_t>(sequence.request.id - 1);
  ReplayedRequest& replayed = result_.requests[index];
  // What it says matters to nobody, as long as no two sequences say the same.
  sequence.tokens.push_back(-1 - static_cast<std::int32_t>(index));
  if (sequence.first_token_at == 0) {
    sequence.first_token_at = replayed.first_token = now_;
    replayed.cached_tokens = sequence.num_cached;
    replayed.cached_below_tokens = sequence.num_cached_below;
  } else {
    result_.inter_token_seconds.push_back(static_cast<float>(now_ - sequence.last_token_at));
  }
  sequence.last_token_at = now_;
  if (sequence.num_outputs() < sequence.request.sampling.max_tokens) return;
  replayed.finished = now_;
  result_.seconds = std::max(result_.seconds, now_);
  scheduler_.Remove(&sequence);
  done();
}

// Requests that wait for their first token, averaged over each third of the arrivals, grow from third to third to more
// than one and a half times as many each time, and are more than a few.
bool IsOverloaded(const ReplayResult& result) {
  constexpr double kFew = 8;  // per replica, about what a burst leaves waiting
  constexpr double kGrowth = 1.5;
  std::vector<std::pair<double, int>> changes;
  double end = 0;
  std::int32_t replicas = 1;
  for (const ReplayedRequest& request : result.requests) {
    if (request.is_refused) continue;
    changes.emplace_back(request.arrived, 1);
    changes.emplace_back(request.first_token, -1);
    end = std::max(end, request.arrived);
    replicas = std::max(replicas, request.replica + 1);
  }
  std::ranges::sort(changes);
  std::array<double, 3> sums{};
  double since = 0;
  int waiting = 0;
  for (const auto& [at, change] : changes) {
    if (since >= end) break;
    const auto third = static_cast<std::size_t>(3 * since / end);
    sums[third] += waiting * (std::min(at, end) - since);
    since = at;
    waiting += change;
  }
  const double last = 3 * sums[2] / end;
  return sums[1] > kGrowth * sums[0] && sums[2] > kGrowth * sums[1] && last > kFew * replicas;
}

absl::Status Check(const ReplayOptions& options) {
  if (options.device_blocks == 0) {
    return absl::InvalidArgumentError("the replay's device tier holds no block: the weights leave no room");
  }
  if (options.replicas < 1 || options.time_scale <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("replicas is ", options.replicas, " and time_scale ",
                                                   options.time_scale, "; both must be positive"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ReplayResult> RunReplay(const Trace& trace, const CostModel& model, const ReplayOptions& options,
                                       const std::function<void(std::int64_t done, std::int64_t total)>& progress) {
  RETURN_IF_ERROR(Check(options));
  ReplayResult result;
  result.requests.resize(trace.requests.size());
  Router router(options.routing, options.replicas);
  std::vector<Indices> of_replica(static_cast<std::size_t>(options.replicas));
  for (std::size_t i = 0; i < trace.requests.size(); ++i) {
    const TraceRequest& request = trace.requests[i];
    const std::size_t replica = router.Route(request);
    const std::int64_t rows = std::int64_t{request.prompt_tokens} + request.output_tokens - 1;
    result.requests[i] = {.arrived = request.arrival_seconds / options.time_scale,
                          .replica = static_cast<std::int32_t>(replica),
                          .prompt_tokens = request.prompt_tokens,
                          .output_tokens = request.output_tokens,
                          .is_refused = rows > std::int64_t{options.device_blocks} * kBlockTokens};
    of_replica[replica].push_back(i);
  }
  std::int64_t num_done = 0;
  const auto done = [&] {
    ++num_done;
    if (progress) progress(num_done, static_cast<std::int64_t>(trace.requests.size()));
  };
  for (const Indices& indices : of_replica) Replica(trace, model, options, result).Run(indices, done);
  result.is_overloaded = IsOverloaded(result);
  return result;
}

}  // namespace spillway
