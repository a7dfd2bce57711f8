#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <mutex>
#include <span>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/calibration.h"
#include "engine/cost_reports.h"
#include "engine/home_keeper.h"
#include "engine/home_reader.h"
#include "engine/input_writer.h"
#include "engine/mailbox.h"
#include "engine/model.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/step_runner.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Stop ids of one request at most; the step's metadata is sized for it.
constexpr std::size_t kMaxStopTokens = 256;

// How often a sequence looks for a home slot where what pins them all is not this engine's to wait for.
constexpr std::chrono::milliseconds kHomePoll(1);

class ThreadedEngine : public Engine {
 public:
  ThreadedEngine(std::unique_ptr<Model> model, const EngineOptions& options, EngineObserver* observer)
      : model_(std::move(model)), options_(options), observer_(observer), chain_(options.prefix_hash_seed) {}
  ~ThreadedEngine() override;

  absl::Status Start(Device& device);

  absl::Status Submit(std::vector<SequenceRequest> requests) override;
  void Cancel(std::uint64_t id) override { mailbox_.Cancel(id); }
  EngineStatus status() const override;
  const Model& model() const override { return *model_; }
  const EngineOptions& options() const override { return options_; }
  std::int64_t capacity_tokens() const override { return std::int64_t{store_->num_blocks()} * kBlockTokens; }
  bool ResetPrefixCache() override;

 private:
  void MakeKeys(std::span<SequenceRequest> requests) const;
  absl::Status CheckKeepsInputs(const Device& device) const;
  std::uint32_t MaxHomeBlocks(std::uint32_t host_share, std::uint32_t num_blocks);
  void Loop();
  bool HandleMail();  // false: stop
  // A step that is queued or running.
  struct Step {
    StepPlan plan;
    StepWork work{};
    StepRunner::Launched launched{};
    double begin = 0;
    double planned = 0;
    double queued = 0;
  };
  bool RunStep();     // false: the engine has failed
  bool LaunchNext();  // likewise; what there is to do may have to wait for
  void LaunchAhead();
  void Launch(Step& step);
  bool AwaitStep();  // likewise
  bool AwaitHomeSlot(double now);
  std::int32_t Digest(Step& step);
  void End(Sequence& sequence, const Finish& finish);
  void Report(const Sequence& sequence, FinishReason reason, bool failed);
  void Fail(const absl::Status& status);
  void PublishStatus();
  absl::Status Calibrate(Device& device);
  StepWork WorkOf(const StepPlan& plan) const;
  void ResetCaches();
  bool keeps_inputs() const { return options_.activation_recompute != kRecomputeOff; }
  InputLayout inputs() const { return InputLayoutOf(model_->config(), model_->kv_layout()); }
  bool must_stage() const { return options_.link_bytes_per_second > 0 || options_.stages_always; }
  absl::StatusOr<std::unique_ptr<HomeReader>> MakeHomeReader(Device& device, std::uint32_t max_home_blocks);
  void CollectTransfers();
  void AddLayerLoads(EngineStatus& status) const;
  void Beat() { last_beat_.store(Now(), std::memory_order_relaxed); }

  const std::unique_ptr<Model> model_;
  const EngineOptions options_;
  EngineObserver* const observer_;
  const KeyChain chain_;
  Mailbox mailbox_;

  const std::unique_ptr<HostTier> null_host_ = MakeNullHostTier();
  std::string no_home_;  // why sequences cannot exceed the device tier; empty where they can
  // Engine thread only, after Start.
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<StepRunner> runner_;
  std::optional<CostModel> cost_model_;
  CostReports reports_;
  std::optional<Step> running_;
  std::optional<Step> ahead_;           // queued behind running_
  std::shared_ptr<Event> last_end_;     // of the step before; null where the engine has slept since
  double last_digested_ = 0;            // when that was digested
  double compute_seconds_ = 0;          // in which a step ran
  bool resets_prefix_cache_ = false;    // once no step runs
  double home_slot_awaited_since_ = 0;  // 0: it is not

  // Any thread.
  std::atomic<double> last_beat_{0};
  std::atomic<bool> is_busy_{false};
  mutable std::mutex failure_mutex_;  // guards failure_
  std::string failure_;
  mutable std::mutex published_mutex_;  // guards published_; taken before the mailbox's own
  EngineStatus published_;              // what only the engine thread can tell, as of the last step
  std::thread thread_;
};

// Host slots that sequences may call home; where that is none, why.
std::uint32_t ThreadedEngine::MaxHomeBlocks(std::uint32_t host_share, std::uint32_t num_blocks) {
  const KvLayout layout = model_->kv_layout();
  const auto share =
      keeps_inputs() ? static_cast<std::uint32_t>(HomeSlotsBesideInputs(host_share, inputs(), layout)) : host_share;
  if (share < static_cast<std::uint32_t>(kSegmentBlocks)) {
    no_home_ = "no host tier to hold more";
  } else if (num_blocks < HomeKeeper::kMinDeviceBlocks) {
    no_home_ = absl::StrCat("fewer than the ", HomeKeeper::kMinDeviceBlocks,
                            " blocks on the device that it takes to hold more in the host tier");
  } else {
    return share / kSegmentBlocks * kSegmentBlocks;
  }
  return 0;
}

HomeReader::Path HomePath(HostKv host_kv, bool must_stage) {
  if (must_stage) return HomeReader::Path::kStaged;
  return host_kv == HostKv::kInPlace ? HomeReader::Path::kInPlace : HomeReader::Path::kByRows;
}

absl::Status ThreadedEngine::CheckKeepsInputs(const Device& device) const {
  if (!no_home_.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("activation recomputation: there is ", no_home_));
  }
  if (must_stage()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("activation recomputation: attention reads the host tier in place on ",
                                                 device.description(),
                                                 ", so there is no transfer to save; it takes a paced link"));
}

absl::StatusOr<std::unique_ptr<HomeReader>> ThreadedEngine::MakeHomeReader(Device& device,
                                                                           std::uint32_t max_home_blocks) {
  HomeReader::Options reading{.path = HomePath(device.host_kv(), must_stage()),
                              .home = store_->home_view(),
                              .link = store_->link(),
                              .num_heads = model_->config().num_heads,
                              .max_tokens = options_.max_num_batched_tokens,
                              .max_home_blocks = max_home_blocks,
                              .staging_blocks = options_.staging_blocks,
                              .inputs = inputs()};
  if (!keeps_inputs()) return HomeReader::Make(device, reading, nullptr);
  const std::int32_t most_blocks =
      std::min(static_cast<std::int32_t>(max_home_blocks), BlocksFor(options_.max_model_len));
  ASSIGN_OR_RETURN(std::unique_ptr<KvProjector> projector,
                   model_->MakeKvProjector(std::int64_t{most_blocks} * kBlockTokens));
  return HomeReader::Make(device, reading, std::move(projector));
}

absl::Status ThreadedEngine::Start(Device& device) {
  const KvLayout layout = model_->kv_layout();
  const auto num_blocks = static_cast<std::size_t>(options_.kv_cache_bytes) / layout.block_bytes();
  if (num_blocks == 0 || num_blocks > 0x7fffffffU) {
    return absl::InvalidArgumentError(absl::StrCat("kv_cache_bytes is ", options_.kv_cache_bytes, "; one block of ",
                                                   kBlockTokens, " tokens takes ", layout.block_bytes(), " bytes"));
  }
  if (options_.max_model_len < 2 || options_.max_num_seqs < 1 || options_.max_num_batched_tokens < 1 ||
      options_.max_queued_requests < 1 || options_.long_prefill_token_threshold < 0) {
    return absl::InvalidArgumentError(
        "max_model_len must be at least 2; max_num_seqs, max_num_batched_tokens and max_queued_requests at least 1; "
        "long_prefill_token_threshold at least 0");
  }
  if (options_.num_engines < 1 || options_.staging_blocks < kSegmentBlocks ||
      options_.staging_blocks % kSegmentBlocks != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_engines must be at least 1; staging_blocks a multiple of ", kSegmentBlocks));
  }
  HostTier& host = options_.host_tier != nullptr ? *options_.host_tier : *null_host_;
  const std::uint32_t host_share = host.num_blocks() / static_cast<std::uint32_t>(options_.num_engines);
  if (keeps_inputs()) RETURN_IF_ERROR(CheckRecomputes(model_->config()));
  const std::uint32_t max_home_blocks = MaxHomeBlocks(host_share, static_cast<std::uint32_t>(num_blocks));
  if (keeps_inputs()) RETURN_IF_ERROR(CheckKeepsInputs(device));
  const KvStoreOptions store_options{
      .layout = layout,
      .num_blocks = static_cast<std::uint32_t>(num_blocks),
      .max_home_blocks = max_home_blocks,
      .max_companions = keeps_inputs() ? host_share - max_home_blocks : 0,
      .caching = options_.enable_prefix_caching ? PrefixCaching::kOn : PrefixCaching::kOff,
      .pacing = {.bytes_per_second = options_.link_bytes_per_second, .latency_seconds = options_.link_latency_seconds},
      .max_transfer_bytes_per_second = options_.max_transfer_bytes_per_second,
      .before_copy = options_.before_copy};
  ASSIGN_OR_RETURN(store_, KvStore::Make(device, host, store_options, [this] { mailbox_.TransferDone(); }));
  const StepRunner::Limits limits{
      .max_tokens = options_.max_num_batched_tokens,
      .max_sequences = std::min(options_.max_num_seqs, options_.max_num_batched_tokens),
      .max_blocks_per_sequence = std::min(BlocksFor(options_.max_model_len), static_cast<std::int32_t>(num_blocks)),
      .max_banned_per_sequence = static_cast<std::int32_t>(kMaxStopTokens + model_->config().eos_tokens.size())};
  std::unique_ptr<HomeReader> home_reader;
  std::unique_ptr<LayerLoader> layer_loader;
  const bool can_load_layers = device.host_kv() == HostKv::kInPlace && options_.max_transfer_bytes_per_second == 0;
  if (max_home_blocks > 0 && can_load_layers && options_.layer_loads != LayerLoads::kNever) {
    layer_loader = std::make_unique<LayerLoader>(*store_->link());
  }
  const LayerLoads layer_loads = layer_loader ? options_.layer_loads : LayerLoads::kNever;
  if (max_home_blocks > 0) {
    ASSIGN_OR_RETURN(home_reader, MakeHomeReader(device, max_home_blocks));
  }
  std::unique_ptr<InputWriter> input_writer;
  if (keeps_inputs()) {
    ASSIGN_OR_RETURN(input_writer, InputWriter::Make(device, {.layout = inputs(),
                                                              .link = store_->link(),
                                                              .max_tokens = options_.max_num_batched_tokens}));
  }
  ASSIGN_OR_RETURN(runner_, StepRunner::Make(device, *model_, limits, std::move(home_reader), std::move(layer_loader),
                                             std::move(input_writer), options_.hash_logits));
  RETURN_IF_ERROR(Calibrate(device));
  scheduler_ = std::make_unique<Scheduler>(
      *store_, chain_,
      Scheduler::Options{.max_num_seqs = options_.max_num_seqs,
                         .max_num_batched_tokens = options_.max_num_batched_tokens,
                         .long_prefill_token_threshold = options_.long_prefill_token_threshold,
                         .enable_prefix_caching = options_.enable_prefix_caching,
                         .policy = options_.scheduling_policy,
                         .load_choice = options_.load_choice,
                         .layer_loads = layer_loads,
                         .kept_inputs = keeps_inputs() ? std::optional(inputs()) : std::nullopt},
      observer_, &*cost_model_);
  PublishStatus();
  Beat();
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), "engine");
    Loop();
  });
  return absl::OkStatus();
}

absl::Status ThreadedEngine::Calibrate(Device& device) {
  CalibrationOptions calibration;
  calibration.budget_seconds = options_.calibration_seconds;
  calibration.max_step_tokens = options_.max_num_batched_tokens;
  calibration.max_model_len = options_.max_model_len;
  calibration.has_link = store_->host().stats().capacity_bytes > 0;
  const double cap = options_.max_transfer_bytes_per_second;
  const double pace = options_.link_bytes_per_second;
  calibration.pacing = {.bytes_per_second = pace > 0 && cap > 0 ? std::min(pace, cap) : std::max(pace, cap),
                        .latency_seconds = options_.link_latency_seconds};
  ASSIGN_OR_RETURN(cost_model_, spillway::Calibrate(device, *model_, *runner_, *store_, calibration));
  return absl::OkStatus();
}

ThreadedEngine::~ThreadedEngine() {
  if (thread_.joinable()) {
    mailbox_.Stop();
    thread_.join();
  }
}

absl::Status ThreadedEngine::Submit(std::vector<SequenceRequest> requests) {
  for (const SequenceRequest& request : requests) {
    const auto prompt = static_cast<std::int64_t>(request.prompt.size());
    const std::int64_t wanted = prompt + request.sampling.max_tokens;
    if (prompt < 1 || request.sampling.max_tokens < 1) {
      return absl::InvalidArgumentError("a request needs at least one prompt token and max_tokens of at least 1");
    }
    if (request.sampling.stop_token_ids.size() > kMaxStopTokens) {
      return absl::InvalidArgumentError(absl::StrCat("stop_token_ids has ", request.sampling.stop_token_ids.size(),
                                                     " ids, at most ", kMaxStopTokens));
    }
    if (wanted > options_.max_model_len) {
      return absl::OutOfRangeError(absl::StrCat("prompt of ", prompt, " tokens and max_tokens ",
                                                request.sampling.max_tokens, " exceed max_model_len ",
                                                options_.max_model_len));
    }
    // The last sampled token is never computed, so it needs no row.
    const std::int64_t home_tokens = std::int64_t{store_->max_home()} * kBlockTokens;
    if (wanted - 1 > capacity_tokens() + home_tokens) {
      return absl::OutOfRangeError(absl::StrCat(
          "prompt of ", prompt, " tokens and max_tokens ", request.sampling.max_tokens,
          " can never fit the KV cache of ", capacity_tokens(), " tokens",
          no_home_.empty() ? absl::StrCat(" and the ", home_tokens, " tokens that the host tier holds beyond it")
                           : absl::StrCat("; there is ", no_home_)));
    }
  }
  if (options_.enable_prefix_caching) MakeKeys(requests);
  switch (mailbox_.Submit(requests, Now(), options_.max_queued_requests)) {
    case Mailbox::Accepted::kYes:
      return absl::OkStatus();
    case Mailbox::Accepted::kFull:
      return absl::ResourceExhaustedError(absl::StrCat("the queue is full: ", mailbox_.num_waiting(), " of ",
                                                       options_.max_queued_requests, " requests wait"));
    case Mailbox::Accepted::kClosed:
      break;
  }
  const std::lock_guard lock(failure_mutex_);
  return absl::UnavailableError(failure_.empty() ? "the engine has stopped" : failure_);
}

// Hashing a long prompt would keep the engine thread from its next step.
void ThreadedEngine::MakeKeys(std::span<SequenceRequest> requests) const {
  const SequenceRequest* last = nullptr;
  for (SequenceRequest& request : requests) {
    const bool repeats = last != nullptr && last->cache_salt == request.cache_salt && last->prompt == request.prompt;
    if (request.prompt_keys.empty()) {
      request.prompt_keys = repeats ? last->prompt_keys : chain_.Keys(request.prompt, request.cache_salt);
    }
    last = &request;
  }
}

bool ThreadedEngine::ResetPrefixCache() {
  mailbox_.ResetPrefixCache();
  const std::lock_guard lock(published_mutex_);
  return published_.num_running == 0;
}

// What came up inside steps is restored as well, a layer of a block a copy.
void ThreadedEngine::AddLayerLoads(EngineStatus& status) const {
  const std::int64_t blocks = runner_->loaded_blocks();
  if (blocks == 0) return;
  const KvLayout& layout = store_->layout();
  const std::int64_t bytes = blocks * static_cast<std::int64_t>(layout.block_bytes());
  const double seconds = runner_->load_seconds();
  status.restored_blocks += blocks;
  status.restored_bytes += bytes;
  status.restore_seconds += seconds;
  CopyStats& copies = status.restore_copies[static_cast<std::size_t>(std::bit_width(layout.layer_bytes())) - 1];
  copies.copies += blocks * layout.num_layers;
  copies.blocks += blocks;
  copies.bytes += bytes;
  copies.seconds += seconds;
}

EngineStatus ThreadedEngine::status() const {
  EngineStatus status;
  {
    const std::lock_guard lock(published_mutex_);
    status = published_;
    status.num_waiting = mailbox_.num_waiting();
  }
  const TransferStats restores = store_->transfer_stats(Transfer::Kind::kRestore);
  status.restored_blocks = restores.blocks;
  status.restored_bytes = restores.bytes;
  status.restore_seconds = restores.seconds;
  status.restore_copies = restores.by_copy_size;
  AddLayerLoads(status);
  const TransferStats stores = store_->transfer_stats(Transfer::Kind::kStore);
  status.stored_blocks = stores.blocks;
  status.stored_bytes = stores.bytes;
  status.store_seconds = stores.seconds;
  status.store_copies = stores.by_copy_size;
  status.store_batches = stores.by_batch_blocks;
  const TransferStats moves = store_->transfer_stats(Transfer::Kind::kMoveHome);
  status.moved_home_bytes = moves.bytes;
  status.move_home_seconds = moves.seconds;
  {
    const std::lock_guard lock(failure_mutex_);
    status.failure = failure_;
  }
  const double silence = Now() - last_beat_.load(std::memory_order_relaxed);
  if (status.failure.empty() && is_busy_.load() && silence > absl::ToDoubleSeconds(options_.stall_timeout)) {
    status.failure = absl::StrCat("the engine has not made a step for ", absl::FormatDuration(absl::Seconds(silence)));
  }
  status.is_alive = status.failure.empty();
  return status;
}

void ThreadedEngine::Loop() {
  while (true) {
    if (!scheduler_->has_work() && !running_) {
      scheduler_->CheckInvariants();
      is_busy_.store(false);
      last_end_ = nullptr;
      mailbox_.Await();
      Beat();
      is_busy_.store(true);
    }
    if (!HandleMail()) break;
    if ((scheduler_->has_work() || running_) && !RunStep()) return;
    PublishStatus();
    Beat();
  }
  Fail(absl::UnavailableError("the engine has stopped"));
}

bool ThreadedEngine::HandleMail() {
  Mail mail = mailbox_.Take();
  for (std::size_t i = 0; i < mail.submitted.size(); ++i) {
    auto sequence = std::make_unique<Sequence>();
    sequence->request = std::move(mail.submitted[i]);
    sequence->submitted_at = mail.submitted_at[i];
    sequence->tokens = std::move(sequence->request.prompt);
    sequence->num_prompt = sequence->size();
    sequence->keys = std::move(sequence->request.prompt_keys);
    const SamplingParams& params = sequence->request.sampling;
    sequence->banned_until_min = params.stop_token_ids;
    if (!params.ignore_eos) {
      const auto& eos = model_->config().eos_tokens;
      sequence->banned_until_min.insert(sequence->banned_until_min.end(), eos.begin(), eos.end());
    }
    scheduler_->Add(std::move(sequence));
  }
  for (const std::uint64_t id : mail.cancelled) {
    if (Sequence* const sequence = scheduler_->Find(id)) End(*sequence, {.reason = FinishReason::kAborted});
  }
  if (mail.has_transfers) CollectTransfers();
  resets_prefix_cache_ |= mail.reset_prefix_cache;
  if (!running_) ResetCaches();  // else blocks of sequences that have ended may still be held
  return !mail.stop;
}

void ThreadedEngine::ResetCaches() {
  if (!std::exchange(resets_prefix_cache_, false)) return;
  store_->EvictCold();
  store_->host().Clear();
  if (store_->host().lower() != nullptr) store_->host().lower()->Clear();
}

void ThreadedEngine::CollectTransfers() {
  if (store_->Collect()) scheduler_->Loaded();
  reports_.OnTransfers(store_->transfer_stats(Transfer::Kind::kRestore), *cost_model_);
}

StepWork ThreadedEngine::WorkOf(const StepPlan& plan) const {
  StepWork work;
  for (const PlannedSequence& planned : plan.sequences) {
    cost_model_->Add(work, planned.begin(), planned.count(), planned.samples);
  }
  return work;
}

bool ThreadedEngine::RunStep() {
  if (!running_) {
    if (!LaunchNext()) return false;
    if (!running_) return true;
  }
  if (options_.overlap_steps) LaunchAhead();
  if (!AwaitStep()) return false;
  Step step = *std::move(running_);
  running_.reset();
  const double done = Now();
  compute_seconds_ += done - std::max(step.planned, last_digested_);
  const std::int32_t num_generated = Digest(step);
  running_ = std::exchange(ahead_, std::nullopt);
  const double digested = Now();
  const double seconds = digested - std::max(step.begin, last_digested_);
  last_digested_ = digested;
  reports_.OnStep(step.plan, step.work, seconds, *runner_, *cost_model_);
  const std::shared_ptr<Event> last_end = std::exchange(last_end_, step.launched.end);
  if (observer_ != nullptr) {
    observer_->OnStep({.seconds = seconds,
                       .plan_seconds = step.planned - step.begin,
                       .launch_seconds = step.queued - step.planned,
                       .digest_seconds = digested - done,
                       .idle_seconds = last_end ? step.launched.begin->SecondsSince(*last_end) : 0,
                       .is_overlapped = step.plan.is_ahead(),
                       .num_tokens = step.plan.num_tokens,
                       .num_prefill_tokens = step.plan.num_prefill_tokens,
                       .num_generated = num_generated,
                       .num_preempted = step.plan.num_preempted});
  }
  return true;
}

bool ThreadedEngine::LaunchNext() {
  const double begin = Now();
  if (!store_->status().ok()) {
    Fail(absl::UnavailableError(absl::StrCat("the device has failed: ", store_->status().message())));
    return false;
  }
  Step step{.plan = scheduler_->Plan(begin), .begin = begin};
  PublishStatus();
  if (step.plan.empty()) {
    last_end_ = nullptr;
    if (!store_->has_transfers()) {
      SPILLWAY_CHECK(scheduler_->awaits_home()) << "there is work and no step to make of it";
      return AwaitHomeSlot(begin);
    }
    if (mailbox_.AwaitFor(absl::ToChronoNanoseconds(options_.stall_timeout))) return true;
    Fail(absl::UnavailableError(
        absl::StrCat("no transfer has ended within ", absl::FormatDuration(options_.stall_timeout))));
    return false;
  }
  home_slot_awaited_since_ = 0;
  Launch(step);
  running_ = std::move(step);
  return true;
}

// While running_ runs.
void ThreadedEngine::LaunchAhead() {
  if (resets_prefix_cache_) return;
  const double begin = Now();
  Step step{.plan = scheduler_->PlanAhead(running_->plan), .begin = begin};
  if (step.plan.empty()) return;
  Launch(step);
  ahead_ = std::move(step);
}

void ThreadedEngine::Launch(Step& step) {
  step.work = WorkOf(step.plan);
  step.plan.num_projected = NumProjected(options_.activation_recompute, step.plan, step.work, *cost_model_);
  step.planned = Now();
  step.launched = runner_->Launch(step.plan, store_->view(), [this] { mailbox_.StepDone(); });
  step.queued = Now();
}

bool ThreadedEngine::AwaitStep() {
  if (!mailbox_.AwaitStep(absl::ToChronoNanoseconds(options_.stall_timeout))) {
    Fail(absl::UnavailableError(
        absl::StrCat("the device has not finished a step within ", absl::FormatDuration(options_.stall_timeout))));
    return false;
  }
  if (const absl::Status status = runner_->status(); !status.ok()) {
    Fail(absl::UnavailableError(absl::StrCat("the device has failed: ", status.message())));
    return false;
  }
  return true;
}

// Home slots are pinned by what does not report here: other engines' transfers, writes to files. False: for too long.
bool ThreadedEngine::AwaitHomeSlot(double now) {
  if (home_slot_awaited_since_ == 0) home_slot_awaited_since_ = now;
  if (now - home_slot_awaited_since_ > absl::ToDoubleSeconds(options_.stall_timeout)) {
    Fail(absl::UnavailableError(absl::StrCat("no slot of the host tier has been released within ",
                                             absl::FormatDuration(options_.stall_timeout))));
    return false;
  }
  mailbox_.AwaitFor(kHomePoll);
  return true;
}

// Returns how many tokens it told sinks of: not those of sequences that have ended meanwhile.
std::int32_t ThreadedEngine::Digest(Step& step) {
  scheduler_->Computed(step.plan, ahead_ ? &ahead_->plan : nullptr);
  const double now = Now();
  std::size_t next = 0;
  std::int32_t num_generated = 0;
  for (const PlannedSequence& planned : step.plan.sequences) {
    if (!planned.samples) continue;
    const SampleResult& result = step.launched.results[next++];
    if (planned.sequence == nullptr) continue;
    ++num_generated;
    Sequence& sequence = *planned.sequence;
    const SamplingParams& params = sequence.request.sampling;
    SampledToken token{
        .token = result.token, .logprob = result.logprob, .rank = result.rank, .logits_hash = result.logits_hash};
    for (std::int32_t i = 0; i < result.num_top; ++i) {
      token.top.push_back({.token = result.top_tokens[i], .logprob = result.top_logprobs[i], .rank = i + 1});
    }
    sequence.tokens.push_back(token.token);
    if (sequence.first_token_at == 0) {
      sequence.first_token_at = now;
      if (observer_ != nullptr) observer_->OnFirstToken(now - sequence.submitted_at);
    } else if (observer_ != nullptr) {
      observer_->OnInterToken(now - sequence.last_token_at);
    }
    sequence.last_token_at = now;
    sequence.request.sink->OnToken(token);

    // Before min_tokens these are banned, unless every token is; then the ban is void and min_tokens still holds.
    const bool may_stop = sequence.num_outputs() > params.min_tokens || params.min_tokens == 0;
    const bool is_eos = !params.ignore_eos && std::ranges::count(model_->config().eos_tokens, token.token) > 0;
    if (may_stop && (is_eos || std::ranges::count(params.stop_token_ids, token.token) > 0)) {
      End(sequence, {.reason = FinishReason::kStop, .stop_token = token.token, .is_eos = is_eos});
    } else if (sequence.num_outputs() >= params.max_tokens || sequence.size() >= options_.max_model_len) {
      End(sequence, {.reason = FinishReason::kLength});
    }
  }
  return num_generated;
}

// What is launched for it goes on; nobody hears of what it samples.
void ThreadedEngine::End(Sequence& sequence, const Finish& finish) {
  for (std::optional<Step>* const step : {&running_, &ahead_}) {
    if (!step->has_value()) continue;
    for (PlannedSequence& planned : (*step)->plan.sequences) {
      if (planned.sequence == &sequence) planned.sequence = nullptr;
    }
  }
  const std::unique_ptr<Sequence> finished = scheduler_->Remove(&sequence);
  Report(*finished, finish.reason, /*failed=*/false);
  finished->request.sink->OnFinish(finish);
}

void ThreadedEngine::Report(const Sequence& sequence, FinishReason reason, bool failed) {
  if (observer_ == nullptr) return;
  const double now = Now();
  const double scheduled = sequence.was_scheduled ? sequence.scheduled_at : now;
  const double first = sequence.first_token_at;
  const std::int32_t computed = std::max(1, sequence.num_prompt - sequence.num_cached);
  observer_->OnSequenceDone({.reason = reason,
                             .failed = failed,
                             .prompt_tokens = sequence.num_prompt,
                             .cached_tokens = sequence.num_cached,
                             .cached_below_tokens = sequence.num_cached_below,
                             .generated_tokens = sequence.num_outputs(),
                             .max_tokens = sequence.request.sampling.max_tokens,
                             .queue_seconds = scheduled - sequence.submitted_at,
                             .first_token_seconds = first > 0 ? first - sequence.submitted_at : 0,
                             .prefill_seconds = first > 0 ? first - scheduled : 0,
                             .decode_seconds = first > 0 ? sequence.last_token_at - first : 0,
                             .total_seconds = now - sequence.submitted_at,
                             .kappa = static_cast<double>(sequence.num_cached_below) / computed,
                             .link_overhead = cost_model_->LinkOverhead(sequence.num_cached_below, computed)});
}

// Ends everything with `status`; nothing is accepted afterwards.
void ThreadedEngine::Fail(const absl::Status& status) {
  {
    const std::lock_guard lock(failure_mutex_);
    failure_ = std::string(status.message());
  }
  const Mail refused = mailbox_.Close();
  for (const SequenceRequest& request : refused.submitted) request.sink->OnError(status);
  for (Sequence* const sequence : scheduler_->All()) {
    const std::unique_ptr<Sequence> failed = scheduler_->Remove(sequence);
    Report(*failed, FinishReason::kAborted, /*failed=*/true);
    failed->request.sink->OnError(status);
  }
  mailbox_.SetWaiting(0);
  PublishStatus();
}

// Who looks sees every sequence either waiting or running.
void ThreadedEngine::PublishStatus() {
  const auto num_held = static_cast<std::int64_t>(store_->num_held());
  const std::int64_t num_blocks = store_->num_blocks();
  const std::lock_guard lock(published_mutex_);
  mailbox_.SetWaiting(scheduler_->num_waiting());
  published_ = {.num_running = scheduler_->num_running(),
                .kv_blocks_total = num_blocks,
                .kv_blocks_used = num_held,
                .kv_blocks_cached = store_->num_cold(),
                .kv_usage = static_cast<double>(num_held) / static_cast<double>(num_blocks),
                .unstored_blocks = static_cast<std::int64_t>(store_->num_unstored()),
                .restoring_blocks = static_cast<std::int64_t>(store_->num_restoring()),
                .storing_blocks = static_cast<std::int64_t>(store_->num_storing()),
                .lookups = store_->lookups(),
                .evicted_blocks = store_->num_evicted(),
                .home_blocks = store_->num_home(),
                .home_blocks_max = store_->max_home(),
                .home_buffer_bytes = runner_->home_buffer_bytes(),
                .streamed_bytes = runner_->streamed_bytes(),
                .kept_input_slots = store_->num_companions(),
                .kept_input_slots_max = store_->max_companions(),
                .projected_tokens = runner_->projected_blocks() * kBlockTokens,
                .compute_seconds = compute_seconds_,
                .cost_model = cost_model_,
                .failure = {}};
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Make(Device& device, std::unique_ptr<Model> model,
                                                     const EngineOptions& options, EngineObserver* observer) {
  auto engine = std::make_unique<ThreadedEngine>(std::move(model), options, observer);
  RETURN_IF_ERROR(engine->Start(device));
  return engine;
}

}  // namespace spillway
