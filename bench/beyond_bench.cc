// Decoding beyond the device tier: one sequence of 32,768 tokens, its KV laid into the host tier, decoded with a device
// tier of 2,048 tokens. Prints the median seconds of a step with everything on the device (what computing takes), with
// the older blocks read in place, and staged over links of several speeds, beside the bound max(link, compute): what
// the step's bytes take on that link, or computing. The link of the unpaced staged row is plain gathers of the same
// strips, timed alone; the same of whole blocks is printed beside. Outputs are checked to be equal first.
//
// On a bus a copy takes no core. Here it takes one from computing, at the pace of those gathers, so a second bound is
// printed: max(link, what both take of the cores, shared out evenly).
//
//   beyond_bench [--json FILE]

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bench/waiter.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/block_key.h"
#include "kvstore/host_tier.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway {
namespace {

constexpr std::int32_t kPromptTokens = 32'768;
constexpr std::int32_t kOutputTokens = 34;
constexpr std::int64_t kAllBlocks = kPromptTokens / kBlockTokens + 8;
constexpr std::int64_t kFewBlocks = 2048 / kBlockTokens;

std::vector<std::int32_t> Prompt() {
  std::vector<std::int32_t> prompt(kPromptTokens);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<std::int32_t>(i * 7919 % 280);
  return prompt;
}

// As if the prompt had been computed and written through.
void LayIn(HostTier& host, const std::vector<std::int32_t>& prompt, const KvLayout& layout, const std::string& seed) {
  std::mt19937 random(1);
  std::vector<std::uint16_t> values(layout.block_bytes() / sizeof(std::uint16_t));
  for (std::uint16_t& value : values) value = BF16FromFloat(static_cast<float>(random() % 2001) / 1000.0F - 1.0F);
  const KeyChain chain(seed);
  BlockKey key = chain.root();
  for (std::size_t at = 0; at < prompt.size(); at += kBlockTokens) {
    const auto tokens = std::span(prompt).subspan(at, kBlockTokens);
    key = chain.Next(key, tokens, "");
    std::rotate(values.begin(), values.begin() + 7, values.end());
    HostSlot slot = *host.BeginWrite(key, tokens, WriteCause::kPublished);
    std::memcpy(slot.bytes(), values.data(), layout.block_bytes());
    host.Commit(std::move(slot), key, tokens);
  }
}

struct Setup {
  std::int64_t device_blocks = kFewBlocks;
  bool stages = false;
  double link_bytes_per_second = 0;
};

struct Outcome {
  std::vector<std::int32_t> tokens;
  double step_seconds = 0;
  double bytes_per_step = 0;  // read at home
};

Outcome Measure(const std::string& folder, const Setup& setup) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  std::unique_ptr<Model> model = *Model::Load(folder, DTypeChoice::kAuto, Quantization::kNone, *device, nullptr);
  const KvLayout layout = model->kv_layout();
  std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, kAllBlocks * layout.block_bytes()),
                   {.block_bytes = layout.block_bytes(), .num_blocks = static_cast<std::uint32_t>(kAllBlocks)});
  EngineOptions options;
  options.kv_cache_bytes = setup.device_blocks * static_cast<std::int64_t>(layout.block_bytes());
  options.max_model_len = kPromptTokens + 64;
  options.host_tier = host.get();
  options.stages_always = setup.stages;
  options.load_choice = LoadChoice::kLoad;  // what is laid in is not what computing would give
  options.link_bytes_per_second = setup.link_bytes_per_second;
  const std::vector<std::int32_t> prompt = Prompt();
  LayIn(*host, prompt, layout, options.prefix_hash_seed);
  std::unique_ptr<Engine> engine = *Engine::Make(*device, std::move(model), options, nullptr);

  auto waiter = std::make_shared<Waiter>();
  std::vector<SequenceRequest> one(1);
  one[0].id = 1;
  one[0].prompt = prompt;
  one[0].sampling.temperature = 0;
  one[0].sampling.max_tokens = kOutputTokens;
  one[0].sampling.ignore_eos = true;
  one[0].sink = waiter;
  SPILLWAY_CHECK(engine->Submit(std::move(one)).ok());
  waiter->Await();

  std::vector<double> steps;
  for (std::size_t i = 2; i < waiter->times.size(); ++i) steps.push_back(waiter->times[i] - waiter->times[i - 1]);
  std::ranges::sort(steps);
  return {.tokens = waiter->tokens,
          .step_seconds = steps[steps.size() / 2],
          .bytes_per_step = static_cast<double>(engine->status().streamed_bytes) / kOutputTokens};
}

// Bytes per second of gathers of `size_bytes` from blocks all over a slab into a buffer of 256 of them.
double GatherBandwidth(const KvLayout& layout, std::size_t size_bytes) {
  constexpr std::size_t kAtOnce = 256;
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  const std::size_t block_bytes = layout.block_bytes();
  const Buffer slab = *device->Allocate(MemoryKind::kPinnedHost, kAllBlocks * block_bytes);
  std::memset(slab.get(), 1, slab.size_bytes);
  const Buffer staging = *device->Allocate(MemoryKind::kDevice, kAtOnce * size_bytes);
  std::vector<const std::byte*> from;
  for (std::int64_t i = 0; i < kAllBlocks; ++i) from.push_back(slab.get() + static_cast<std::size_t>(i) * block_bytes);
  const std::unique_ptr<Stream> stream = *device->NewStream();
  double best = 0;
  for (int round = 0; round < 3; ++round) {
    double bytes = 0;
    const double begin = Now();
    for (std::size_t offset = 0; offset + size_bytes <= block_bytes; offset += size_bytes) {
      for (std::size_t at = 0; at + kAtOnce <= from.size(); at += kAtOnce) {
        stream->Gather(staging.get(), std::span(from).subspan(at, kAtOnce), offset, size_bytes);
        bytes += static_cast<double>(kAtOnce * size_bytes);
      }
    }
    SPILLWAY_CHECK(stream->Record()->Await().ok());
    best = std::max(best, bytes / (Now() - begin));
  }
  return best;
}

int Run(const std::string& json_path) {
  const std::string folder =
      std::filesystem::temp_directory_path() / ("spillway_beyond_bench_" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  SPILLWAY_CHECK(WriteRandomLlama(folder, {.seed = 5,
                                           .layers = 8,
                                           .hidden = 512,
                                           .inner = 1408,
                                           .heads = 8,
                                           .kv_heads = 4,
                                           .head_dim = 64,
                                           .vocab = 288,
                                           .max_positions = kPromptTokens + 64,
                                           .dtype = DType::kBF16})
                     .ok());
  const KvLayout layout{.num_layers = 8, .num_kv_heads = 4, .head_dim = 64, .dtype = DType::kBF16};
  const double strips = GatherBandwidth(layout, layout.layer_bytes());
  const double blocks = GatherBandwidth(layout, layout.block_bytes());
  std::printf("gathers: %zu KiB strips of a layer %.2f GB/s, %zu KiB blocks %.2f GB/s\n", layout.layer_bytes() >> 10U,
              strips / 1e9, layout.block_bytes() >> 10U, blocks / 1e9);

  const Outcome ample = Measure(folder, {.device_blocks = kAllBlocks});
  std::printf("%d tokens, all on the device: %.1f ms a step\n\n", kPromptTokens, 1e3 * ample.step_seconds);
  std::printf("%-10s %-12s %10s %12s %10s %10s %10s\n", "path", "link GB/s", "step ms", "at home MB", "GB/s",
              "of bound", "of cores");
  nlohmann::json rows = nlohmann::json::array();
  const double num_cores = std::max(1U, std::thread::hardware_concurrency());
  const auto show = [&](const char* path, const Setup& setup, double link) {
    const Outcome outcome = Measure(folder, setup);
    SPILLWAY_CHECK(outcome.tokens == ample.tokens) << "outputs differ from those of an ample device tier";
    SPILLWAY_CHECK(outcome.bytes_per_step > 0) << "nothing was read at home";
    const double bound = std::max(ample.step_seconds, link > 0 ? outcome.bytes_per_step / link : 0);
    const double copying = link > 0 ? outcome.bytes_per_step / strips / num_cores : 0;
    const double cores_bound = std::max(bound, ample.step_seconds + copying);
    const double rate = outcome.bytes_per_step / outcome.step_seconds;
    std::printf("%-10s %-12.2f %10.1f %12.1f %10.2f %9.0f%% %9.0f%%\n", path, link / 1e9, 1e3 * outcome.step_seconds,
                outcome.bytes_per_step / 1e6, rate / 1e9, 100 * bound / outcome.step_seconds,
                100 * cores_bound / outcome.step_seconds);
    rows.push_back({{"path", path},
                    {"link_bytes_per_second", link},
                    {"is_paced", setup.link_bytes_per_second > 0},
                    {"step_seconds", outcome.step_seconds},
                    {"home_bytes_per_step", outcome.bytes_per_step},
                    {"bytes_per_second", rate},
                    {"bound_seconds", bound},
                    {"cores_bound_seconds", cores_bound}});
  };
  show("in place", {}, 0);
  show("staged", {.stages = true}, strips);
  for (const double link : {8e9, 5e9, 4e9, 2e9, 750e6, 500e6}) show("paced", {.link_bytes_per_second = link}, link);
  std::filesystem::remove_all(folder);
  if (!json_path.empty()) {
    const nlohmann::json all = {{"resident_step_seconds", ample.step_seconds},
                                {"strip_gather_bytes_per_second", strips},
                                {"block_gather_bytes_per_second", blocks},
                                {"rows", rows}};
    std::ofstream(json_path) << all.dump(1) << "\n";
  }
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  const bool has_json = argc == 3 && std::strcmp(argv[1], "--json") == 0;
  if (argc != 1 && !has_json) {
    std::fprintf(stderr, "usage: beyond_bench [--json FILE]\n");
    return 2;
  }
  return spillway::Run(has_json ? argv[2] : "");
}
