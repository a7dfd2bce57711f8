#include "server/service.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/model.h"
#include "kernels/status_macros.h"
#include "server/sampling_check.h"
#include "server/text_output.h"

namespace spillway {
namespace {

// A few threads and one queue. Work still queued when it is destroyed is run.
class WorkPool {
 public:
  explicit WorkPool(int num_threads) {
    for (int i = 0; i < std::max(num_threads, 1); ++i) {
      threads_.emplace_back([this] {
        pthread_setname_np(pthread_self(), "service");
        Run();
      });
    }
  }
  ~WorkPool() {
    {
      const std::lock_guard lock(mutex_);
      is_closed_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void Post(std::function<void()> work) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(work));
    }
    changed_.notify_one();
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return is_closed_ || !queue_.empty(); });
      if (queue_.empty()) return;
      std::function<void()> work = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      work();
      work = nullptr;
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> queue_;
  bool is_closed_ = false;
  std::vector<std::thread> threads_;
};

class LiveGeneration;

// What generations need of the Service.
class GenerationHost {
 public:
  virtual ~GenerationHost() = default;
  virtual Engine& engine() = 0;
  virtual const Tokenizer& tokenizer() const = 0;
  virtual const ServiceOptions& options() const = 0;
  virtual const GenerationDefaults& generation_defaults() const = 0;
  virtual void Post(std::function<void()> work) = 0;
  virtual std::uint64_t NextSequenceId() = 0;
  virtual void Release(const LiveGeneration& generation) = 0;  // its request id is free again
  virtual void Ended() = 0;                                    // its listener has heard the last
};

// One request and its choices. Whatever happens to it is an event in its mailbox; one Service thread at a time drains
// it. After Close() the mailbox takes nothing more, so that late engine calls and handles touch only this object.
class LiveGeneration : public Generation, public std::enable_shared_from_this<LiveGeneration> {
 public:
  LiveGeneration(GenerationHost& host, GenerationRequest request, std::shared_ptr<GenerationListener> listener)
      : host_(host), id_(request.request_id), request_(std::move(request)), listener_(std::move(listener)) {}

  const std::string& request_id() const override { return id_; }
  void Cancel() override {
    is_cancelled_.store(true, std::memory_order_relaxed);
    Push({.kind = Event::Kind::kCancel});
  }

  // Refused: nothing but OnDone(status) happens. Else tokenizes and submits.
  void Begin(absl::Status refusal) {
    if (refusal.ok()) return Push({.kind = Event::Kind::kPrepare});
    Fail(std::move(refusal));
  }
  void Fail(absl::Status status) { Push({.kind = Event::Kind::kFail, .status = std::move(status)}); }

 private:
  struct Event {
    enum class Kind : std::uint8_t { kPrepare, kScheduled, kToken, kFinish, kFail, kCancel };
    Kind kind = Kind::kCancel;
    std::size_t choice = 0;
    std::int32_t num_cached = 0;
    SampledToken token{};
    Finish finish{};
    absl::Status status{};
  };

  // The engine's end of one choice.
  class ChoiceSink : public TokenSink {
   public:
    ChoiceSink(std::shared_ptr<LiveGeneration> owner, std::size_t choice) : owner_(std::move(owner)), choice_(choice) {}
    void OnScheduled(std::int32_t num_cached) override {
      owner_->Push({.kind = Event::Kind::kScheduled, .choice = choice_, .num_cached = num_cached});
    }
    void OnToken(const SampledToken& token) override {
      owner_->Push({.kind = Event::Kind::kToken, .choice = choice_, .token = token});
    }
    void OnFinish(const Finish& finish) override {
      owner_->Push({.kind = Event::Kind::kFinish, .choice = choice_, .finish = finish});
    }
    void OnError(const absl::Status& status) override { owner_->Fail(status); }

   private:
    const std::shared_ptr<LiveGeneration> owner_;
    const std::size_t choice_;
  };

  struct Choice {
    Choice(std::uint64_t id, const Tokenizer& tokenizer, TextOptions options)
        : sequence_id(id), text(tokenizer, std::move(options)) {}
    std::uint64_t sequence_id;
    TextOutput text;
    std::optional<std::int32_t> undecided;  // a token whose text is dropped if it ends the sequence
    std::int32_t num_tokens = 0;
    std::int32_t num_cached = 0;
    bool is_finished = false;
    OutputChunk chunk;  // what this drain has gathered
  };

  void Push(Event event) {
    const std::lock_guard lock(mutex_);
    if (is_closed_) return;
    events_.push_back(std::move(event));
    if (std::exchange(is_draining_, true)) return;
    host_.Post([self = shared_from_this()] { self->Drain(); });
  }

  // From here on: one Service thread at a time.
  void Drain() {
    std::vector<Event> events;
    while (true) {
      {
        const std::lock_guard lock(mutex_);
        events.clear();
        events.swap(events_);
        if (events.empty() || is_closed_) {
          is_draining_ = false;
          return;
        }
      }
      for (Event& event : events) {
        if (is_done_) break;
        Handle(event);
      }
      if (!is_done_) SendGathered();
    }
  }

  void Handle(Event& event) {
    switch (event.kind) {
      case Event::Kind::kPrepare:
        if (absl::Status status = Prepare(); !status.ok()) return End(status);
        break;
      case Event::Kind::kFail:
        SendGathered();
        CancelSequences();
        return End(event.status);
      case Event::Kind::kCancel:
        if (choices_.empty()) return;  // kPrepare comes yet and sees is_cancelled_
        CancelSequences();
        AbortChoices();
        break;
      default:
        HandleChoice(choices_[event.choice], event);
        break;
    }
    if (std::ranges::all_of(choices_, [](const Choice& choice) { return choice.is_finished; })) {
      SendGathered();
      End(absl::OkStatus());
    }
  }

  void HandleChoice(Choice& choice, Event& event) {
    if (choice.is_finished) return;  // ended here before it ended in the engine
    if (event.kind == Event::Kind::kScheduled) {
      choice.num_cached = event.num_cached;
    } else if (event.kind == Event::Kind::kToken) {
      AddToken(choice, std::move(event.token));
    } else {
      const Finish& finish = event.finish;
      if (finish.reason != FinishReason::kStop || request_.include_stop_in_output) Decide(choice);
      if (!choice.is_finished) {
        std::variant<std::monostate, std::int32_t, std::string> stop;
        if (finish.stop_token) stop = *finish.stop_token;
        FinishChoice(choice, finish.reason, std::move(stop), finish.is_eos);
      }
    }
  }

  void AddToken(Choice& choice, SampledToken token) {
    Decide(choice);
    if (choice.is_finished) return;
    ++choice.num_tokens;
    const std::int32_t id = token.token;
    choice.chunk.tokens.push_back(std::move(token));
    choice.undecided = id;
    if (!std::ranges::binary_search(end_tokens_, id)) Decide(choice);
  }

  // The undecided token did not end the sequence (or its text is wanted): its text counts.
  void Decide(Choice& choice) {
    if (!choice.undecided) return;
    choice.chunk.text += choice.text.Push(*std::exchange(choice.undecided, std::nullopt));
    if (choice.text.stop()) StopChoice(choice);
  }

  void StopChoice(Choice& choice) {
    host_.engine().Cancel(choice.sequence_id);
    FinishChoice(choice, FinishReason::kStop, *choice.text.stop(), false);
  }

  void FinishChoice(Choice& choice, FinishReason reason, std::variant<std::monostate, std::int32_t, std::string> stop,
                    bool is_eos) {
    choice.is_finished = true;
    if (!choice.text.stop()) {
      choice.chunk.text += choice.text.Flush();
      if (choice.text.stop()) {
        reason = FinishReason::kStop;
        stop = *choice.text.stop();
        is_eos = false;
      }
    }
    choice.chunk.finish = OutputFinish{reason, std::move(stop), is_eos, choice.num_tokens, choice.num_cached};
  }

  void AbortChoices() {
    for (Choice& choice : choices_) {
      if (!choice.is_finished) FinishChoice(choice, FinishReason::kAborted, {}, false);
    }
  }

  void SendGathered() {
    for (std::size_t index = 0; index < choices_.size(); ++index) {
      OutputChunk& chunk = choices_[index].chunk;
      if (chunk.text.empty() && chunk.tokens.empty() && !chunk.finish) continue;
      chunk.index = static_cast<std::int32_t>(index);
      listener_->OnChunk(std::exchange(chunk, {}));
    }
  }

  void CancelSequences() {
    for (const Choice& choice : choices_) {
      if (!choice.is_finished) host_.engine().Cancel(choice.sequence_id);
    }
  }

  absl::Status Prepare() {
    std::vector<std::int32_t> prompt;
    if (auto* tokens = std::get_if<std::vector<std::int32_t>>(&request_.prompt)) {
      prompt = std::move(*tokens);
    } else if (!is_cancelled_.load(std::memory_order_relaxed)) {
      auto encoded = host_.tokenizer().Encode(std::get<std::string>(request_.prompt), request_.special_tokens);
      if (absl::IsInvalidArgument(encoded.status())) {
        return InvalidField("prompt", absl::StrCat("prompt: ", encoded.status().message()));
      }
      if (!encoded.ok()) return encoded.status();
      prompt = *std::move(encoded);
      request_.prompt = std::vector<std::int32_t>();
    }
    const bool is_cancelled = is_cancelled_.load(std::memory_order_relaxed);
    Engine& engine = host_.engine();
    const ModelConfig& model = engine.model().config();
    SamplingParams sampling;
    if (!is_cancelled) {
      ASSIGN_OR_RETURN(sampling, MakeSampling(request_, host_.generation_defaults(), model.vocab,
                                              engine.options().max_model_len, prompt));
    }
    end_tokens_ = sampling.stop_token_ids;
    if (!sampling.ignore_eos) end_tokens_.insert(end_tokens_.end(), model.eos_tokens.begin(), model.eos_tokens.end());
    std::ranges::sort(end_tokens_);
    std::vector<SequenceRequest> sequences;
    for (std::int64_t index = 0; index < request_.n; ++index) {
      const std::uint64_t sequence_id = host_.NextSequenceId();
      choices_.emplace_back(sequence_id, host_.tokenizer(),
                            TextOptions{request_.skip_special_tokens ? SkipSpecial::kYes : SkipSpecial::kNo,
                                        request_.stop, request_.include_stop_in_output, sampling.min_tokens});
      choices_.back().text.Continue(prompt);
      sequences.push_back({.id = sequence_id,
                           .choice = static_cast<std::uint32_t>(index),
                           .prompt = prompt,
                           .sampling = sampling,
                           .cache_salt = SaltOf(request_),
                           .prompt_keys = {},  // the engine makes them
                           .bypass_prefix_cache = request_.bypass_prefix_cache,
                           .tenant = request_.tenant,
                           .priority = static_cast<std::int32_t>(request_.priority),
                           .sink = std::make_shared<ChoiceSink>(shared_from_this(), static_cast<std::size_t>(index))});
    }
    if (!is_cancelled) RETURN_IF_ERROR(engine.Submit(std::move(sequences)));  // else the engine never hears of it
    listener_->OnPrompt({id_, std::move(prompt)});
    if (is_cancelled) AbortChoices();
    return absl::OkStatus();
  }

  // A tenant's name has no line break, so no two pairs give the same salt.
  std::string SaltOf(const GenerationRequest& request) const {
    if (!host_.options().cache_salt_by_tenant) return request.cache_salt;
    return absl::StrCat(request.tenant, "\n", request.cache_salt);
  }

  void End(const absl::Status& status) {
    is_done_ = true;
    {
      const std::lock_guard lock(mutex_);
      is_closed_ = true;
      events_.clear();
    }
    host_.Release(*this);
    listener_->OnDone(status);
    listener_ = nullptr;
    choices_.clear();
    host_.Ended();
  }

  GenerationHost& host_;
  const std::string id_;
  std::atomic<bool> is_cancelled_ = false;

  std::mutex mutex_;  // of the mailbox
  std::vector<Event> events_;
  bool is_draining_ = false;
  bool is_closed_ = false;

  GenerationRequest request_;
  std::shared_ptr<GenerationListener> listener_;
  std::vector<Choice> choices_;
  std::vector<std::int32_t> end_tokens_;  // sorted
  bool is_done_ = false;
};

class PooledService : public Service, private GenerationHost {
 public:
  PooledService(Engine& engine, const Tokenizer& tokenizer, const ServiceOptions& options)
      : engine_(engine), tokenizer_(tokenizer), options_(options) {
    std::random_device entropy;
    id_prefix_ = absl::StrCat(absl::Hex(entropy(), absl::kZeroPad8), absl::Hex(entropy(), absl::kZeroPad8));
    pool_ = std::make_unique<WorkPool>(options.num_threads);
  }
  ~PooledService() override {
    FailAll(absl::UnavailableError("the server is stopping"));
    AwaitNone(absl::InfiniteFuture());
    pool_.reset();
  }

  std::shared_ptr<Generation> Start(GenerationRequest request, std::shared_ptr<GenerationListener> listener) override {
    const bool is_named = !request.request_id.empty();
    if (!is_named) {
      const auto number = next_request_.fetch_add(1, std::memory_order_relaxed);
      request.request_id = absl::StrCat(id_prefix_, absl::Hex(number, absl::kZeroPad8));
    }
    absl::Status refusal = Admit(request);
    auto generation =
        std::make_shared<LiveGeneration>(static_cast<GenerationHost&>(*this), std::move(request), std::move(listener));
    {
      const std::lock_guard lock(mutex_);
      ++num_live_;
      if (refusal.ok() && is_draining_) refusal = absl::UnavailableError("the server is draining");
      if (refusal.ok() && !live_.emplace(generation->request_id(), generation).second) {
        refusal = absl::AlreadyExistsError(absl::StrCat("request_id ", generation->request_id(), " is already in use"));
      }
    }
    generation->Begin(std::move(refusal));
    return generation;
  }

  void Abort(const std::string& request_id) override {
    std::shared_ptr<LiveGeneration> generation;
    {
      const std::lock_guard lock(mutex_);
      if (const auto found = live_.find(request_id); found != live_.end()) generation = found->second;
    }
    if (generation) generation->Cancel();
  }

  absl::Status CheckModel(const std::string& model) const override {
    if (model.empty() || std::ranges::count(options_.model_names, model) > 0) return absl::OkStatus();
    return absl::NotFoundError(
        absl::StrCat("The model `", model, "` does not exist; served: ", absl::StrJoin(options_.model_names, ", ")));
  }

  void Post(std::function<void()> work) override { pool_->Post(std::move(work)); }

  bool is_ready() const override {
    {
      const std::lock_guard lock(mutex_);
      if (is_draining_) return false;
    }
    return is_alive();
  }
  bool is_alive() const override { return engine_.status().is_alive; }
  std::int64_t num_live() const override {
    const std::lock_guard lock(mutex_);
    return num_live_;
  }

  void Drain(absl::Time deadline) override {
    {
      const std::lock_guard lock(mutex_);
      is_draining_ = true;
    }
    if (AwaitNone(deadline)) return;
    for (const auto& generation : Live()) generation->Cancel();
    AwaitNone(absl::InfiniteFuture());
  }

  void FailAll(const absl::Status& status) override {
    for (const auto& generation : Live()) generation->Fail(status);
  }

  Engine& engine() override { return engine_; }
  const Tokenizer& tokenizer() const override { return tokenizer_; }
  const ServiceOptions& options() const override { return options_; }
  const GenerationDefaults& generation_defaults() const override {
    static const GenerationDefaults kNone;
    return options_.takes_generation_defaults ? engine_.model().generation_defaults() : kNone;
  }

 private:
  std::uint64_t NextSequenceId() override { return next_sequence_.fetch_add(1, std::memory_order_relaxed); }
  void Release(const LiveGeneration& generation) override {
    const std::lock_guard lock(mutex_);
    const auto found = live_.find(generation.request_id());
    if (found != live_.end() && found->second.get() == &generation) live_.erase(found);
  }
  void Ended() override {
    const std::lock_guard lock(mutex_);
    if (--num_live_ == 0) none_live_.notify_all();
  }

  absl::Status Admit(const GenerationRequest& request) const {
    RETURN_IF_ERROR(CheckModel(request.model));
    const EngineStatus status = engine_.status();
    if (!status.is_alive) return absl::UnavailableError(absl::StrCat("the engine is not running: ", status.failure));
    return CheckRequest(request, options_, engine_.model().config().vocab, engine_.options());
  }

  std::vector<std::shared_ptr<LiveGeneration>> Live() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<LiveGeneration>> live;
    for (const auto& [id, generation] : live_) live.push_back(generation);
    return live;
  }

  bool AwaitNone(absl::Time deadline) {
    std::unique_lock lock(mutex_);
    const auto is_none = [this] { return num_live_ == 0; };
    if (deadline != absl::InfiniteFuture()) return none_live_.wait_until(lock, absl::ToChronoTime(deadline), is_none);
    none_live_.wait(lock, is_none);
    return true;
  }

  Engine& engine_;
  const Tokenizer& tokenizer_;
  const ServiceOptions options_;
  std::string id_prefix_;
  std::atomic<std::uint64_t> next_request_ = 0;
  std::atomic<std::uint64_t> next_sequence_ = 1;
  mutable std::mutex mutex_;
  std::condition_variable none_live_;
  std::unordered_map<std::string, std::shared_ptr<LiveGeneration>> live_;
  std::int64_t num_live_ = 0;  // until the listener has heard the last
  bool is_draining_ = false;
  std::unique_ptr<WorkPool> pool_;
};

}  // namespace

std::unique_ptr<Service> Service::Make(Engine& engine, const Tokenizer& tokenizer, const ServiceOptions& options) {
  return std::make_unique<PooledService>(engine, tokenizer, options);
}

}  // namespace spillway
