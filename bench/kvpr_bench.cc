// Decoding beyond the device tier with keys and values projected from kept layer inputs (KVPR): a seeded Llama of 240
// million parameters with as many KV heads as heads, one sequence of 8,192 tokens, a device tier of 2,048, a paced
// link. Prints a step's median seconds and its bytes from home for each setting: 0 (all keys and values come over the
// link), numbers of tokens to project, auto; and for auto what it chose, beside what KVPR's closed form gains at the
// speeds that were measured. The logits of every setting are checked to be equal, bit for bit.
//
//   kvpr_bench [--link BYTES_PER_SECOND] [--settings 0,1024,auto] [--model FOLDER] [--json FILE]
//
// FOLDER keeps the model's files for the next run; they are written where they are not there.

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "bench/waiter.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kvstore/host_tier.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway {
namespace {

constexpr std::int32_t kPromptTokens = 8192;
constexpr std::int32_t kOutputTokens = 33;
constexpr std::int32_t kTimedTokens = 16;  // the last ones
constexpr std::int64_t kDeviceBlocks = 2048 / kBlockTokens;
constexpr std::int64_t kHostBlocks = 2 * kPromptTokens / kBlockTokens;
constexpr RandomLlamaOptions kModel{.seed = 7,
                                    .layers = 16,
                                    .hidden = 1024,
                                    .inner = 2816,
                                    .heads = 16,
                                    .kv_heads = 16,
                                    .head_dim = 64,
                                    .vocab = 32768,
                                    .max_positions = kPromptTokens + 64,
                                    .dtype = DType::kBF16};
constexpr KvprShape kShape{.hidden = 1024, .kv_width = 1024, .element_bytes = 2};

// What was done when a token came; as of the step before, since a status is published behind its tokens.
struct Moment {
  double time = 0;
  std::int64_t streamed_bytes = 0;
  std::int64_t projected_tokens = 0;
};

class MomentWaiter : public Waiter {
 public:
  void OnToken(const SampledToken& token) override {
    Waiter::OnToken(token);
    hashes.push_back(token.logits_hash);
    const EngineStatus status = (*engine)->status();
    moments.push_back(
        {.time = times.back(), .streamed_bytes = status.streamed_bytes, .projected_tokens = status.projected_tokens});
  }

  const std::unique_ptr<Engine>* engine = nullptr;
  std::vector<std::uint64_t> hashes;
  std::vector<Moment> moments;
};

struct Outcome {
  std::vector<std::uint64_t> hashes;
  double step_seconds = 0;
  double bytes_per_step = 0;
  double projected_per_step = 0;  // tokens
  std::optional<CostModel> costs;
};

std::vector<std::int32_t> Prompt() {
  std::vector<std::int32_t> prompt(kPromptTokens);
  for (std::size_t i = 0; i < prompt.size(); ++i) prompt[i] = static_cast<std::int32_t>(i * 7919 % 32749);
  return prompt;
}

Outcome Measure(const std::string& folder, double link_bytes_per_second, std::int32_t setting) {
  std::unique_ptr<Device> device = *MakeCpuDevice({});
  std::unique_ptr<Model> model = *Model::Load(folder, DTypeChoice::kAuto, Quantization::kNone, *device, nullptr);
  const std::size_t block_bytes = model->kv_layout().block_bytes();
  std::unique_ptr<HostTier> host =
      MakeHostTier(*device->Allocate(MemoryKind::kPinnedHost, kHostBlocks * block_bytes),
                   {.block_bytes = block_bytes, .num_blocks = static_cast<std::uint32_t>(kHostBlocks)});
  EngineOptions options;
  options.kv_cache_bytes = kDeviceBlocks * static_cast<std::int64_t>(block_bytes);
  options.max_model_len = kPromptTokens + 64;
  options.hash_logits = true;
  options.host_tier = host.get();
  options.link_bytes_per_second = link_bytes_per_second;
  options.activation_recompute = setting;
  std::unique_ptr<Engine> engine = *Engine::Make(*device, std::move(model), options, nullptr);

  auto waiter = std::make_shared<MomentWaiter>();
  waiter->engine = &engine;
  std::vector<SequenceRequest> one(1);
  one[0].id = 1;
  one[0].prompt = Prompt();
  one[0].sampling.temperature = 0;
  one[0].sampling.max_tokens = kOutputTokens;
  one[0].sampling.ignore_eos = true;
  one[0].sink = waiter;
  SPILLWAY_CHECK(engine->Submit(std::move(one)).ok());
  waiter->Await();

  const std::vector<Moment>& moments = waiter->moments;
  std::vector<double> steps;
  for (std::size_t i = moments.size() - kTimedTokens; i < moments.size(); ++i) {
    steps.push_back(moments[i].time - moments[i - 1].time);
  }
  std::ranges::sort(steps);
  const Moment& first = moments[moments.size() - 1 - kTimedTokens];
  const auto per_step = [&](std::int64_t begin, std::int64_t end) {
    return static_cast<double>(end - begin) / kTimedTokens;
  };
  return {.hashes = waiter->hashes,
          .step_seconds = steps[steps.size() / 2],
          .bytes_per_step = per_step(first.streamed_bytes, moments.back().streamed_bytes),
          .projected_per_step = per_step(first.projected_tokens, moments.back().projected_tokens),
          .costs = engine->status().cost_model};
}

struct Arguments {
  double link_bytes_per_second = 500e6;
  std::vector<std::string> settings = {"0", "auto"};
  std::string folder;
  std::string json_path;
};

class Report {
 public:
  explicit Report(double link) : link_(link) {
    std::printf("%d tokens, %lld on the device, link %.0f MB/s\n", kPromptTokens,
                static_cast<long long>(kDeviceBlocks * kBlockTokens), link / 1e6);
    std::printf("%-8s %10s %10s %12s %12s %8s\n", "setting", "ms/step", "tokens/s", "at home MB", "projected", "gain");
  }

  void Add(const std::string& setting, const Outcome& outcome) {
    SPILLWAY_CHECK(outcome.bytes_per_step > 0) << "nothing was read at home";
    if (hashes_.empty()) hashes_ = outcome.hashes;
    SPILLWAY_CHECK(outcome.hashes == hashes_) << "logits differ from those of the first setting";
    if (setting == "0") plain_seconds_ = outcome.step_seconds;
    const double gain = plain_seconds_ > 0 ? 1 - outcome.step_seconds / plain_seconds_ : 0;
    std::printf("%-8s %10.1f %10.2f %12.1f %12.0f %7.1f%%\n", setting.c_str(), 1e3 * outcome.step_seconds,
                1 / outcome.step_seconds, outcome.bytes_per_step / 1e6, outcome.projected_per_step, 100 * gain);
    nlohmann::json row = {{"setting", setting},
                          {"link_bytes_per_second", link_},
                          {"step_seconds", outcome.step_seconds},
                          {"home_bytes_per_step", outcome.bytes_per_step},
                          {"projected_tokens_per_step", outcome.projected_per_step},
                          {"gain", gain}};
    if (setting == "auto") Predict(outcome, gain, row);
    std::fflush(stdout);
    rows_.push_back(std::move(row));
  }

  const nlohmann::json& rows() const { return rows_; }

 private:
  // What the closed form gains on the tokens at home, at the speeds that the run ended with.
  void Predict(const Outcome& outcome, double gain, nlohmann::json& row) const {
    const double flops = outcome.costs->compute().projection_flops_per_second;
    const double stream = outcome.costs->stream_bytes_per_second();
    const ModelCosts& costs = outcome.costs->costs();
    const double saved = outcome.projected_per_step * (costs.kv_bytes_per_token - costs.input_bytes_per_token);
    const auto home = static_cast<std::int64_t>((outcome.bytes_per_step + saved) / costs.kv_bytes_per_token);
    const KvprSplit split = SplitActivations(kShape, flops, stream, home, home);
    std::printf(
        "         projection %.0f GFLOP/s, link %.1f MB/s: closed form %lld tokens, gain %.1f %%; measured %.2f "
        "of it\n",
        flops / 1e9, stream / 1e6, static_cast<long long>(split.recomputed), 100 * (1 - split.time_ratio),
        gain / (1 - split.time_ratio));
    row["projection_flops_per_second"] = flops;
    row["stream_bytes_per_second"] = stream;
    row["closed_form_tokens"] = split.recomputed;
    row["closed_form_gain"] = 1 - split.time_ratio;
  }

  const double link_;
  std::vector<std::uint64_t> hashes_;
  double plain_seconds_ = 0;
  nlohmann::json rows_ = nlohmann::json::array();
};

int Run(const Arguments& arguments) {
  std::string folder = arguments.folder;
  if (folder.empty()) folder = std::filesystem::temp_directory_path() / ("spillway_kvpr_" + std::to_string(::getpid()));
  if (!std::filesystem::exists(folder + "/model.safetensors")) {
    std::filesystem::create_directories(folder);
    SPILLWAY_CHECK(WriteRandomLlama(folder, kModel).ok());
  }
  Report report(arguments.link_bytes_per_second);
  for (const std::string& setting : arguments.settings) {
    const std::int32_t tokens = setting == "auto" ? kRecomputeAuto : std::atoi(setting.c_str());
    report.Add(setting, Measure(folder, arguments.link_bytes_per_second, tokens));
  }
  if (arguments.folder.empty()) std::filesystem::remove_all(folder);
  if (!arguments.json_path.empty()) std::ofstream(arguments.json_path) << report.rows().dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  spillway::Arguments arguments;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    const std::string value = argv[i + 1];
    if (flag == "--link") {
      arguments.link_bytes_per_second = std::atof(value.c_str());
    } else if (flag == "--settings") {
      arguments.settings = absl::StrSplit(value, ',');
    } else if (flag == "--model") {
      arguments.folder = value;
    } else if (flag == "--json") {
      arguments.json_path = value;
    } else {
      argc = 0;
    }
  }
  if (argc % 2 != 1 || arguments.link_bytes_per_second <= 0) {
    std::fprintf(
        stderr,
        "usage: kvpr_bench [--link BYTES_PER_SECOND] [--settings 0,1024,auto] [--model FOLDER] [--json FILE]\n");
    return 2;
  }
  return spillway::Run(arguments);
}
