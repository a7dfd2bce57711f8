// What the host tier is worth: sessions return in turns to a device tier that holds only part of them. Prints, for
// working sets of 0.5, 1, 2 and 8 times the device tier, the time to first token of a returning session and total
// tokens per second with the host tier off and on, unpaced and paced; beside it the counters that prove that blocks
// were evicted and restored, and the restores' bandwidth against plain copies of the same span. Before it times
// anything it checks that outputs are equal on and off.
//
//   tiers_bench [--json FILE]

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway {
namespace {

constexpr std::int32_t kPromptTokens = 1024;
constexpr std::int32_t kOutputTokens = 8;
constexpr std::int64_t kDeviceBlocks = 4 * (kPromptTokens / kBlockTokens) + 8;  // four sessions

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

struct Setup {
  std::string folder;
  double link_bytes_per_second = 0;
  std::uint32_t host_blocks = 0;  // 0: no tier
};

struct Outcome {
  std::vector<double> first_token_seconds;
  std::vector<std::vector<std::int32_t>> outputs;
  double tokens_per_second = 0;
  EngineStatus status;
  std::int64_t cached_tokens = 0;
};

std::vector<std::int32_t> PromptOf(int session) {
  std::vector<std::int32_t> prompt(kPromptTokens);
  for (std::size_t i = 0; i < prompt.size(); ++i) {
    prompt[i] = static_cast<std::int32_t>((i * 7919 + static_cast<std::size_t>(session) * 104729) % 280);
  }
  return prompt;
}

// Every session once (not timed), then `rounds` rounds of returns, one session at a time.
Outcome Measure(const Setup& setup, int sessions, int rounds) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  std::unique_ptr<Model> model = *Model::Load(setup.folder, DTypeChoice::kAuto, *device, nullptr);
  const std::size_t block_bytes = model->kv_layout().block_bytes();
  std::unique_ptr<HostTier> host = MakeNullHostTier();
  if (setup.host_blocks > 0) {
    host = MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, setup.host_blocks * block_bytes),
                        {.block_bytes = block_bytes, .num_blocks = setup.host_blocks});
  }
  EngineOptions options;
  options.kv_cache_bytes = kDeviceBlocks * static_cast<std::int64_t>(block_bytes);
  options.max_model_len = kPromptTokens + 64;
  options.host_tier = host.get();
  options.link_bytes_per_second = setup.link_bytes_per_second;
  std::unique_ptr<Engine> engine = *Engine::Make(*device, std::move(model), options, nullptr);

  Outcome outcome;
  std::uint64_t id = 1;
  double begin = 0;
  for (int round = 0; round <= rounds; ++round) {
    if (round == 1) begin = Now();
    for (int session = 0; session < sessions; ++session) {
      auto waiter = std::make_shared<Waiter>();
      SequenceRequest request;
      request.id = id++;
      request.prompt = PromptOf(session);
      request.sampling.temperature = 0;
      request.sampling.max_tokens = kOutputTokens;
      request.sampling.ignore_eos = true;
      request.sink = waiter;
      const double submitted = Now();
      std::vector<SequenceRequest> one;
      one.push_back(std::move(request));
      SPILLWAY_CHECK(engine->Submit(std::move(one)).ok());
      waiter->Await();
      if (round == 0) continue;
      outcome.first_token_seconds.push_back(waiter->first_token_at - submitted);
      outcome.cached_tokens += waiter->cached;
      outcome.outputs.push_back(waiter->tokens);
    }
  }
  const double tokens = static_cast<double>(rounds) * sessions * (kPromptTokens + kOutputTokens);
  outcome.tokens_per_second = tokens / (Now() - begin);
  outcome.status = engine->status();
  return outcome;
}

double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Plain copies of a block's span between buffers larger than any cache.
double CopyBandwidth(std::size_t span) {
  const std::size_t count = std::max<std::size_t>(2, (std::size_t{256} << 20) / span);
  std::vector<std::byte> from(count * span, std::byte{1});
  std::vector<std::byte> to(count * span, std::byte{2});
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    const double begin = Now();
    for (std::size_t i = 0; i < count; ++i) std::memcpy(to.data() + i * span, from.data() + i * span, span);
    best = std::max(best, static_cast<double>(count * span) / (Now() - begin));
  }
  return best;
}

int Run(const std::string& json_path) {
  const std::string folder =
      std::filesystem::temp_directory_path() / ("spillway_tiers_bench_" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  const RandomLlamaOptions model{.seed = 5,
                                 .layers = 8,
                                 .hidden = 512,
                                 .inner = 1408,
                                 .heads = 8,
                                 .kv_heads = 4,
                                 .head_dim = 64,
                                 .vocab = 288,
                                 .max_positions = 4096,
                                 .dtype = DType::kBF16};
  SPILLWAY_CHECK(WriteRandomLlama(folder, model).ok());
  const std::size_t block_bytes = std::size_t{8} * 4 * 2 * 64 * 2 * kBlockTokens;
  const double copy = CopyBandwidth(block_bytes);
  std::printf("block %zu KiB; plain copy of that span %.2f GB/s; device tier %lld blocks\n\n", block_bytes >> 10,
              copy / 1e9, static_cast<long long>(kDeviceBlocks));
  std::printf("%-8s %-10s %-6s %12s %14s %14s %12s %10s\n", "set", "link", "tier", "TTFT ms", "tokens/s",
              "cached tokens", "restored", "GB/s");
  nlohmann::json rows = nlohmann::json::array();
  for (const double link : {0.0, 500e6}) {
    for (const int sessions : {2, 4, 8, 32}) {
      const int rounds = sessions >= 32 ? 1 : 3;
      const Outcome off =
          Measure({.folder = folder, .link_bytes_per_second = link, .host_blocks = 0}, sessions, rounds);
      const Outcome on =
          Measure({.folder = folder, .link_bytes_per_second = link, .host_blocks = 4096}, sessions, rounds);
      SPILLWAY_CHECK(on.outputs == off.outputs) << "outputs differ between tiers on and off";
      for (const bool is_on : {false, true}) {
        const Outcome& outcome = is_on ? on : off;
        const double restored = static_cast<double>(outcome.status.restored_bytes);
        const double rate = outcome.status.restore_seconds > 0 ? restored / outcome.status.restore_seconds : 0;
        std::printf("%-8s %-10s %-6s %12.2f %14.0f %14lld %12lld %10.2f\n",
                    (std::to_string(sessions * 25) + " %").c_str(), link > 0 ? "500 MB/s" : "unpaced",
                    is_on ? "on" : "off", 1e3 * Median(outcome.first_token_seconds), outcome.tokens_per_second,
                    static_cast<long long>(outcome.cached_tokens),
                    static_cast<long long>(outcome.status.restored_blocks), rate / 1e9);
        rows.push_back({{"working_set_percent", sessions * 25},
                        {"link_bytes_per_second", link},
                        {"host_tier", is_on},
                        {"ttft_seconds_median", Median(outcome.first_token_seconds)},
                        {"tokens_per_second", outcome.tokens_per_second},
                        {"cached_tokens", outcome.cached_tokens},
                        {"restored_blocks", outcome.status.restored_blocks},
                        {"restored_bytes", outcome.status.restored_bytes},
                        {"stored_blocks", outcome.status.stored_blocks},
                        {"restore_bytes_per_second", rate},
                        {"copy_bytes_per_second", copy}});
      }
    }
  }
  std::filesystem::remove_all(folder);
  if (!json_path.empty()) std::ofstream(json_path) << rows.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  const bool has_json = argc == 3 && std::strcmp(argv[1], "--json") == 0;
  if (argc != 1 && !has_json) {
    std::fprintf(stderr, "usage: tiers_bench [--json FILE]\n");
    return 2;
  }
  return spillway::Run(has_json ? argv[2] : "");
}
