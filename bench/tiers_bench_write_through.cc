#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "bench/tiers_bench.h"
#include "bench/tiers_bench_server.h"
#include "kernels/check.h"

namespace spillway::tiers_bench {
namespace {

constexpr int kRounds = 240;
constexpr std::int32_t kDecoded = 33;
constexpr std::int32_t kChunk = 512;
constexpr std::uint32_t kHostBlocks = 1024;  // some sessions fill it; from then on it evicts

// `kAgain` is set up like `kOff`: what the two differ by is the machine.
enum Kind : std::uint8_t { kOff, kAgain, kOn };
constexpr std::size_t kNumKinds = 3;

// What one turn took: a new prompt, computed in steps of kChunk tokens, then kDecoded tokens. The blocks of a step are
// written through while the next steps run: those of the last prompt step during the first that decode.
struct Turn {
  double prefill = 0;  // to the first token
  double step = 0;     // of decoding, the mean
  double whole = 0;
  double cpu = 0;  // of all threads
};

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

Turn TakeTurn(Server& server, int number) {
  server.TakeDecodeSteps();
  const double cpu = CpuSeconds();
  const double begin = Now();
  Turn turn;
  turn.prefill = server.Ask(PromptOf(number), kDecoded).first_token_seconds;
  turn.whole = Now() - begin;
  turn.cpu = CpuSeconds() - cpu;
  const std::vector<double> steps = server.TakeDecodeSteps();
  for (const double seconds : steps) turn.step += seconds / static_cast<double>(steps.size());
  return turn;
}

using Rounds = std::vector<std::array<Turn, kNumKinds>>;

// The median over the rounds of one kind's share of kOff in the same round, and the interval that holds it with 95 %.
struct Ratio {
  double median = 0;
  double low = 0;
  double high = 0;
};
Ratio RatioOf(const Rounds& rounds, Kind kind, double Turn::*field) {
  std::vector<double> ratios;
  for (const auto& round : rounds) ratios.push_back(round[kind].*field / (round[kOff].*field));
  std::ranges::sort(ratios);
  const auto count = static_cast<double>(ratios.size());
  const auto at = [&](double rank) { return ratios[static_cast<std::size_t>(std::clamp(rank, 0.0, count - 1))]; };
  const double half = 0.98 * std::sqrt(count);  // of ranks, as a coin that is thrown so often
  return {.median = at(count / 2), .low = at(std::floor(count / 2 - half)), .high = at(std::ceil(count / 2 + half))};
}

double MedianOf(const Rounds& rounds, Kind kind, double Turn::*field) {
  std::vector<double> values;
  for (const auto& round : rounds) values.push_back(round[kind].*field);
  return Median(values);
}

nlohmann::json Show(const Rounds& rounds, const char* what, double Turn::*field) {
  const Ratio on = RatioOf(rounds, kOn, field);
  const Ratio again = RatioOf(rounds, kAgain, field);
  std::printf("%-9s %10.3f %10.3f %8.3f (%.3f to %.3f) %8.3f (%.3f to %.3f)\n", what,
              1e3 * MedianOf(rounds, kOff, field), 1e3 * MedianOf(rounds, kOn, field), on.median, on.low, on.high,
              again.median, again.low, again.high);
  return {{"off_seconds", MedianOf(rounds, kOff, field)},
          {"on_seconds", MedianOf(rounds, kOn, field)},
          {"ratio", {on.median, on.low, on.high}},
          {"control", {again.median, again.low, again.high}}};
}

}  // namespace

nlohmann::json MeasureWriteThrough(const std::string& folder) {
  Server off({.folder = folder, .device_blocks = 1024, .max_step_tokens = kChunk});
  Server again({.folder = folder, .device_blocks = 1024, .max_step_tokens = kChunk});
  Server on({.folder = folder, .device_blocks = 1024, .host_blocks = kHostBlocks, .max_step_tokens = kChunk});
  const std::array<Server*, kNumKinds> servers = {&off, &again, &on};
  int number = 0;
  const auto measure = [&](const char* when, int count) {
    const EngineStatus before = on.status();
    Rounds rounds(static_cast<std::size_t>(count));
    for (auto& round : rounds) {
      ++number;
      for (std::size_t i = 0; i < kNumKinds; ++i) {
        const std::size_t kind = (i + static_cast<std::size_t>(number)) % kNumKinds;
        round[kind] = TakeTurn(*servers[kind], number);
        on.AwaitStores();
      }
    }
    const EngineStatus after = on.status();
    const double turns = count;
    const auto blocks = static_cast<double>(after.stored_blocks - before.stored_blocks);
    const auto bytes = static_cast<double>(after.stored_bytes - before.stored_bytes);
    const double seconds = after.store_seconds - before.store_seconds;
    SPILLWAY_CHECK(blocks >= turns * kPromptTokens / kBlockTokens) << "blocks were not written through";
    std::printf("%s, %d rounds\n%-9s %10s %10s %26s %26s\n", when, count, "", "off ms", "on ms", "on / off",
                "off / off");
    nlohmann::json row = {{"when", when},
                          {"prefill", Show(rounds, "prefill", &Turn::prefill)},
                          {"decode_step", Show(rounds, "a step", &Turn::step)},
                          {"turn", Show(rounds, "whole", &Turn::whole)},
                          {"cpu", Show(rounds, "cpu", &Turn::cpu)},
                          {"stored_bytes", bytes},
                          {"store_seconds", seconds}};
    std::printf("stored a turn: %.0f blocks, %.2f MB in %.2f ms, %.2f GB/s\n\n", blocks / turns, bytes / turns / 1e6,
                1e3 * seconds / turns, bytes / seconds / 1e9);
    std::fflush(stdout);
    return row;
  };
  std::printf(
      "a new prompt of %d tokens in steps of %d, then %d decoded; engines with write-through off, off again and on "
      "take\n"
      "turns; medians of each round's ratio and the interval that holds them with 95 %%\n",
      kPromptTokens, kChunk, kDecoded);
  nlohmann::json rows = nlohmann::json::array();
  const int sessions = static_cast<int>(kHostBlocks) * kBlockTokens / (kPromptTokens + kDecoded);
  rows.push_back(measure("the host tier's memory is touched for the first time", sessions));
  rows.push_back(measure("and later", kRounds));
  SPILLWAY_CHECK(on.tier().evictions > 0);
  return rows;
}

}  // namespace spillway::tiers_bench
