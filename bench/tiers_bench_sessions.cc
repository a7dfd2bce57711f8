#include <algorithm>
#include <cstdio>

#include "bench/tiers_bench.h"
#include "bench/tiers_bench_server.h"
#include "kernels/check.h"

namespace spillway::tiers_bench {
namespace {

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
        const std::size_t prompt_blocks = kPromptTokens / kBlockTokens;
        SPILLWAY_CHECK(bytes >= static_cast<double>(prompt_blocks * server.block_bytes()))
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

}  // namespace spillway::tiers_bench
