#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "bench/tiers_bench.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"

namespace spillway::tiers_bench {
namespace {

constexpr std::int32_t kPromptTokens = 1024;
constexpr std::int32_t kOutputTokens = 8;
constexpr std::int64_t kFourSessions = 4 * (kPromptTokens / kBlockTokens) + 8;  // blocks
constexpr double kPacedBytesPerSecond = 500e6;

// Waits for one sequence and notes when its first token came.
class Waiter : public TokenSink {
 public:
  void OnScheduled(std::int32_t num_cached) override { cached = num_cached; }
  void OnToken(const SampledToken& token) override {
    if (tokens.empty()) first_token_at = Now();
    tokens.push_back(token.token);
  }
  void OnFinish(const Finish&) override { End(); }
  void OnError(const absl::Status& status) override {
    SPILLWAY_CHECK(false) << status;
    End();
  }
  void Await() {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return is_done_; });
  }

  std::vector<std::int32_t> tokens;
  std::int32_t cached = 0;
  double first_token_at = 0;

 private:
  void End() {
    const std::lock_guard lock(mutex_);
    is_done_ = true;
    ended_.notify_one();
  }
  std::mutex mutex_;
  std::condition_variable ended_;
  bool is_done_ = false;
};

// Seconds of the steps that prefill nothing.
class StepTimes : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    const std::lock_guard lock(mutex_);
    if (report.num_prefill_tokens == 0) decode_.push_back(report.seconds);
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

  std::vector<double> Take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(decode_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<double> decode_;
};

struct Setup {
  std::string folder;
  std::int64_t device_blocks = kFourSessions;
  std::uint32_t host_blocks = 0;  // 0: no tier
  double link_bytes_per_second = 0;
  LayerLoads layer_loads = LayerLoads::kHidden;
};

class Server {
 public:
  explicit Server(const Setup& setup) : device_(*MakeCpuDevice({})) {
    std::unique_ptr<Model> model =
        *Model::Load(setup.folder, DTypeChoice::kAuto, Quantization::kNone, *device_, nullptr);
    block_bytes_ = model->kv_layout().block_bytes();
    host_ = MakeNullHostTier();
    if (setup.host_blocks > 0) {
      host_ = MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, setup.host_blocks * block_bytes_),
                           {.block_bytes = block_bytes_, .num_blocks = setup.host_blocks});
    }
    EngineOptions options;
    options.kv_cache_bytes = setup.device_blocks * static_cast<std::int64_t>(block_bytes_);
    options.max_model_len = 2 * kPromptTokens;
    options.host_tier = host_.get();
    options.link_bytes_per_second = setup.link_bytes_per_second;
    options.layer_loads = setup.layer_loads;
    engine_ = *Engine::Make(*device_, std::move(model), options, &steps_);
  }

  struct Answer {
    double first_token_seconds = 0;
    std::int32_t cached = 0;
    std::vector<std::int32_t> tokens;
  };
  Answer Ask(std::vector<std::int32_t> prompt, std::int32_t max_tokens = kOutputTokens) {
    auto waiter = std::make_shared<Waiter>();
    std::vector<SequenceRequest> one(1);
    one[0].id = next_id_++;
    one[0].prompt = std::move(prompt);
    one[0].sampling.temperature = 0;
    one[0].sampling.max_tokens = max_tokens;
    one[0].sampling.ignore_eos = true;
    one[0].sink = waiter;
    const double submitted = Now();
    SPILLWAY_CHECK(engine_->Submit(std::move(one)).ok());
    waiter->Await();
    return {waiter->first_token_at - submitted, waiter->cached, waiter->tokens};
  }
  // Until everything published so far is in the host tier.
  void AwaitStores() const {
    for (std::int64_t stored = -1; stored != engine_->status().stored_blocks;) {
      stored = engine_->status().stored_blocks;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
  EngineStatus status() const { return engine_->status(); }
  TierStats tier() const { return host_->stats(); }
  std::size_t block_bytes() const { return block_bytes_; }
  std::vector<double> TakeDecodeSteps() { return steps_.Take(); }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<HostTier> host_;
  StepTimes steps_;
  std::size_t block_bytes_ = 0;
  std::unique_ptr<Engine> engine_;
  std::uint64_t next_id_ = 1;
};

std::vector<std::int32_t> PromptOf(int session, int length = kPromptTokens) {
  std::vector<std::int32_t> prompt(static_cast<std::size_t>(length));
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = static_cast<std::int32_t>((i * 7919 + static_cast<std::size_t>(session) * 104729 + (i >> 3)) % 280);
  }
  return prompt;
}

struct Outcome {
  std::vector<double> first_token_seconds;
  std::vector<std::vector<std::int32_t>> outputs;
  double tokens_per_second = 0;
  std::int64_t cached_tokens = 0;
  EngineStatus status;
  TierStats tier;
};

// Every session once (not timed), then `rounds` rounds of returns, one session at a time.
Outcome RunSessions(const Setup& setup, int sessions, int rounds) {
  Server server(setup);
  for (int session = 0; session < sessions; ++session) server.Ask(PromptOf(session));
  Outcome outcome;
  const double begin = Now();
  for (int i = 0; i < rounds * sessions; ++i) {
    const Server::Answer answer = server.Ask(PromptOf(i % sessions));
    outcome.first_token_seconds.push_back(answer.first_token_seconds);
    outcome.cached_tokens += answer.cached;
    outcome.outputs.push_back(answer.tokens);
  }
  const double tokens = static_cast<double>(rounds) * sessions * (kPromptTokens + kOutputTokens);
  outcome.tokens_per_second = tokens / (Now() - begin);
  outcome.status = server.status();
  outcome.tier = server.tier();
  return outcome;
}

}  // namespace

nlohmann::json MeasureWorkingSets(const std::string& folder) {
  std::printf("sessions of %d tokens that return to a device tier of four\n", kPromptTokens);
  std::printf("%-8s %-10s %9s %9s %14s %9s %9s %9s %12s\n", "set", "link", "TTFT ms", "tokens/s", "cached tokens",
              "restored", "stored", "evicted", "restore GB/s");
  nlohmann::json rows = nlohmann::json::array();
  for (const int sessions : {2, 4, 8, 32}) {
    const int rounds = sessions >= 32 ? 1 : 2;
    const Outcome off = RunSessions({.folder = folder}, sessions, rounds);
    const auto show = [&](const char* link, double link_rate, bool is_on, const Outcome& outcome) {
      SPILLWAY_CHECK(outcome.outputs == off.outputs) << "outputs differ between tiers on and off";
      const EngineStatus& status = outcome.status;
      const double rate =
          status.restored_blocks == 0 ? 0 : static_cast<double>(status.restored_bytes) / status.restore_seconds;
      std::printf("%5d %% %-11s %9.2f %9.0f %14lld %9lld %9lld %9lld %12.2f\n", sessions * 25, link,
                  1e3 * Median(outcome.first_token_seconds), outcome.tokens_per_second,
                  static_cast<long long>(outcome.cached_tokens), static_cast<long long>(status.restored_blocks),
                  static_cast<long long>(status.stored_blocks), static_cast<long long>(outcome.tier.evictions),
                  rate / 1e9);
      std::fflush(stdout);
      rows.push_back({{"working_set_percent", sessions * 25},
                      {"host_tier", is_on},
                      {"link_bytes_per_second", link_rate},
                      {"ttft_seconds_median", Median(outcome.first_token_seconds)},
                      {"tokens_per_second", outcome.tokens_per_second},
                      {"cached_tokens", outcome.cached_tokens},
                      {"restored_blocks", status.restored_blocks},
                      {"stored_blocks", status.stored_blocks},
                      {"restore_bytes_per_second", rate}});
    };
    show("off", 0, false, off);
    show("unpaced", 0, true, RunSessions({.folder = folder, .host_blocks = 4096}, sessions, rounds));
    show("500 MB/s", kPacedBytesPerSecond, true,
         RunSessions({.folder = folder, .host_blocks = 4096, .link_bytes_per_second = kPacedBytesPerSecond}, sessions,
                     rounds));
  }
  std::printf("\n");
  return rows;
}

nlohmann::json MeasureReturn(const std::string& folder) {
  constexpr int kTurns = 9;
  std::printf("a session of %d tokens returns with new ones (medians of %d)\n", kPromptTokens, kTurns);
  std::printf("%-10s %5s %-8s %9s %9s %11s %9s %9s %9s\n", "link", "new", "blocks", "TTFT ms", "bytes ms", "compute ms",
              "step ms", "bound ms", "TTFT/it");
  nlohmann::json rows = nlohmann::json::array();
  for (const int added : {16, 128}) {
    // Both sessions' turns: the same prefix, other new tokens each time.
    const auto turn = [&](int session, int number) {
      std::vector<std::int32_t> prompt = PromptOf(session);
      const std::vector<std::int32_t> more = PromptOf(1000 + number, added);
      prompt.insert(prompt.end(), more.begin(), more.end());
      return prompt;
    };
    // The same turns between the same others, with the prefix on the device.
    Server ample({.folder = folder, .device_blocks = 2000});
    ample.Ask(PromptOf(0));
    std::vector<double> compute;
    for (int i = 0; i < kTurns; ++i) {
      compute.push_back(ample.Ask(turn(0, i)).first_token_seconds);
      ample.AwaitStores();
      ample.Ask(PromptOf(100 + i));
      ample.AwaitStores();
    }
    const double step = Median(ample.TakeDecodeSteps());
    const auto measure = [&](double link, LayerLoads layer_loads) {
      // One session and the segment that tells it from one that exceeds the device tier.
      Server server({.folder = folder,
                     .device_blocks = (kPromptTokens + added + kSegmentTokens) / kBlockTokens + 4,
                     .host_blocks = 4096,
                     .link_bytes_per_second = link,
                     .layer_loads = layer_loads});
      for (const int session : {0, 1, 2}) {
        server.Ask(PromptOf(session));
        server.AwaitStores();
      }
      std::vector<double> first, moved;
      for (int i = 0; i < kTurns; ++i) {
        const EngineStatus before = server.status();
        first.push_back(server.Ask(turn(0, i)).first_token_seconds);
        const EngineStatus after = server.status();
        const auto bytes = static_cast<double>(after.restored_bytes - before.restored_bytes);
        SPILLWAY_CHECK(bytes >= kPromptTokens / kBlockTokens * static_cast<double>(server.block_bytes()))
            << "the session was not away: " << bytes << " bytes were restored";
        SPILLWAY_CHECK(after.streamed_bytes == 0);
        moved.push_back(link > 0 ? bytes / link : after.restore_seconds - before.restore_seconds);
        server.AwaitStores();
        for (const int other : {1, 2}) server.Ask(PromptOf(other));  // take the device tier
        server.AwaitStores();
      }
      const double bound = 1.15 * std::max(Median(moved), Median(compute)) + step;
      const bool by_layer = layer_loads != LayerLoads::kNever;
      std::printf("%-10s %5d %-8s %9.2f %9.2f %11.2f %9.2f %9.2f %9.2f\n", link > 0 ? "500 MB/s" : "unpaced", added,
                  by_layer ? "by layer" : "whole", 1e3 * Median(first), 1e3 * Median(moved), 1e3 * Median(compute),
                  1e3 * step, 1e3 * bound, Median(first) / bound);
      std::fflush(stdout);
      rows.push_back({{"link_bytes_per_second", link},
                      {"new_tokens", added},
                      {"by_layer", by_layer},
                      {"ttft_seconds", Median(first)},
                      {"link_seconds", Median(moved)},
                      {"compute_seconds", Median(compute)},
                      {"step_seconds", step},
                      {"bound_seconds", bound}});
    };
    for (const double link : {0.0, kPacedBytesPerSecond}) {
      for (const LayerLoads layer_loads : {LayerLoads::kNever, LayerLoads::kHidden}) measure(link, layer_loads);
    }
  }
  std::printf(
      "compute: the same turn with its prefix on the device; bound: 1.15 x max(bytes, compute) + one decode step;\n"
      "whole: blocks are loaded before the step of the new tokens; by layer: those it hides come up inside it\n\n");
  return rows;
}

nlohmann::json MeasureWriteThrough(const std::string& folder) {
  constexpr int kRounds = 7;
  constexpr std::int32_t kDecoded = 160;
  std::printf("seconds of a step, all blocks on the device; write-through off and on, in turns\n");
  Server off({.folder = folder, .device_blocks = 3000});
  Server on({.folder = folder, .device_blocks = 3000, .host_blocks = 4096});
  std::vector<double> decode[2], prefill[2];
  for (int round = 0; round < kRounds; ++round) {
    for (const bool is_on : {round % 2 == 0, round % 2 != 0}) {
      Server& server = is_on ? on : off;
      server.TakeDecodeSteps();
      prefill[is_on].push_back(server.Ask(PromptOf(round + 1), kDecoded).first_token_seconds);
      double sum = 0;
      const std::vector<double> steps = server.TakeDecodeSteps();
      for (const double seconds : steps) sum += seconds;
      decode[is_on].push_back(sum / static_cast<double>(steps.size()));
    }
  }
  SPILLWAY_CHECK(on.status().stored_blocks > kRounds * kPromptTokens / kBlockTokens);
  const double decode_ratio = Median(decode[1]) / Median(decode[0]);
  const double prefill_ratio = Median(prefill[1]) / Median(prefill[0]);
  std::printf("decode  %8.3f ms off %8.3f ms on: %.3fx   (mean of %d steps, median of %d)\n", 1e3 * Median(decode[0]),
              1e3 * Median(decode[1]), decode_ratio, kDecoded - 1, kRounds);
  std::printf("prefill %8.2f ms off %8.2f ms on: %.3fx   (%d tokens, median of %d)\n", 1e3 * Median(prefill[0]),
              1e3 * Median(prefill[1]), prefill_ratio, kPromptTokens, kRounds);
  std::printf("stored %lld blocks\n\n", static_cast<long long>(on.status().stored_blocks));
  return {{"decode_seconds_off", Median(decode[0])},
          {"decode_seconds_on", Median(decode[1])},
          {"decode_ratio", decode_ratio},
          {"prefill_seconds_off", Median(prefill[0])},
          {"prefill_seconds_on", Median(prefill[1])},
          {"prefill_ratio", prefill_ratio},
          {"stored_blocks", on.status().stored_blocks}};
}

}  // namespace spillway::tiers_bench
