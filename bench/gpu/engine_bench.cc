// engine_bench --folder FOLDER [--device cuda|cpu] [--layers N] [--json FILE] [--commit NAME] [--machine TEXT]: the
// engine end to end on a seeded random model of Llama-3-8B's shape, which is written to FOLDER first if that has none:
// prefill, decoding with and without CUDA graphs, with steps that overlap and one by one, sessions that come back from
// the host tier, and a sequence whose KV stays there. --layers makes it a smaller one, --device cpu runs it where there
// is no GPU; neither gives numbers worth keeping.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "bench/gpu/random_llama.h"
#include "bench/gpu/results.h"
#include "kernels/check.h"
#include "tests/support/engine_harness.h"

namespace spillway::bench {
namespace {

using testing::CollectingSink;
using testing::MakeRequest;

struct Arguments {
  std::string folder;
  std::string json;
  std::string commit = "unknown";
  std::string machine = "unknown";
  std::string device = "cuda";
  LlamaShape shape;
};

// Steps as the engine reports them.
class Steps : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    reports_.push_back(report);
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

  std::vector<StepReport> Take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(reports_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<StepReport> reports_;
};

// One model that several engines use, one after the other.
class Shared : public Model {
 public:
  explicit Shared(Model& model) : model_(model) {}
  const ModelConfig& config() const override { return model_.config(); }
  const GenerationDefaults& generation_defaults() const override { return model_.generation_defaults(); }
  DType dtype() const override { return model_.dtype(); }
  KvLayout kv_layout() const override { return model_.kv_layout(); }
  std::size_t weight_bytes() const override { return model_.weight_bytes(); }
  absl::Status Reserve(std::int64_t max_tokens, std::int64_t max_sampled) override {
    return model_.Reserve(max_tokens, max_sampled);
  }
  const float* Forward(Stream& stream, const StepArrays& arrays, const KvView& kv) override {
    return model_.Forward(stream, arrays, kv);
  }

 private:
  Model& model_;
};

std::vector<std::int32_t> Prompt(std::int64_t length, std::int64_t vocab, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(length));
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(2 + random() % static_cast<unsigned>(vocab - 2));
  return tokens;
}

class EngineBench {
 public:
  EngineBench(const Arguments& arguments, bool enforce_eager, Results& results)
      : mode_(enforce_eager ? ", eager" : ""), results_(results) {
    CudaDeviceOptions options;
    options.enforce_eager = enforce_eager;
    absl::StatusOr<std::unique_ptr<Device>> device =
        arguments.device == "cuda" ? MakeCudaDevice(options) : MakeCpuDevice({});
    if (!device.ok()) {
      std::fprintf(stderr, "%s\n", std::string(device.status().message()).c_str());
      std::exit(2);
    }
    device_ = *std::move(device);
    if (!std::filesystem::exists(arguments.folder + "/model.safetensors")) {
      WriteRandomLlama(arguments.folder, arguments.shape);
    }
    const auto begin = std::chrono::steady_clock::now();
    absl::StatusOr<std::unique_ptr<Model>> model =
        Model::Load(arguments.folder, DTypeChoice::kAuto, Quantization::kNone, *device_, nullptr);
    SPILLWAY_CHECK(model.ok()) << model.status();
    model_ = *std::move(model);
    const double us = Microseconds(begin);
    shape_ = ShapeOf(model_->config());
    results_.Report({"engine",
                     "load and pack weights" + mode_,
                     {us, 0},
                     static_cast<double>(model_->weight_bytes()) / us * 1e-3,
                     "GB/s",
                     0});
  }
  const Device& device() const { return *device_; }

  void Prefill(std::int64_t length) {
    Start(length + kBlockTokens, 0, /*overlaps=*/true);
    Run(1, length, 1, 7);
    steps_.Take();
    Run(1, length, 1, 8);
    double us = 0;
    for (const StepReport& step : steps_.Take()) us += step.seconds * 1e6;
    const auto tokens = static_cast<double>(length);
    const double pairs = tokens * (tokens + 1) / 2 * static_cast<double>(shape_.layers * shape_.heads);
    const double head = static_cast<double>(shape_.vocab * shape_.hidden);  // only the last row's
    const double flops = 2 * tokens * (static_cast<double>(shape_.product_weights()) - head) +
                         4 * static_cast<double>(shape_.head_dim) * pairs;
    const std::string what = "prefill of " + std::to_string(length) + " tokens" + mode_;
    results_.Report({"engine", what, {us, 0}, tokens / us * 1e6, "tokens/s", 0});
    results_.Report({"engine", what, {us, 0}, flops / us * 1e-6, "TFLOP/s", 0});
  }

  void Decode(int batch, std::int64_t context, std::int32_t num_tokens, bool overlaps) {
    Start(batch * (context + num_tokens + kBlockTokens), 0, overlaps);
    Run(batch, context, num_tokens, 1);
    std::vector<double> times;
    std::vector<double> idle;
    for (const StepReport& step : steps_.Take()) {
      if (step.num_prefill_tokens > 0 || step.num_generated != batch) continue;
      times.push_back(step.seconds * 1e6);
      idle.push_back(step.idle_seconds * 1e6);
    }
    SPILLWAY_CHECK(times.size() > 4) << "no " << batch << " sequences decoded together";
    times.erase(times.begin(), times.begin() + 3);  // run as they are, recorded, warmed up
    idle.erase(idle.begin(), idle.begin() + 3);
    const Measured time = Median(times);
    const Measured between = Median(idle);
    const std::string what = "decode, batch " + std::to_string(batch) + ", context " + std::to_string(context) + mode_ +
                             (overlaps ? "" : ", steps one by one");
    results_.Report({"engine", what, time, batch / time.median_us * 1e6, "tokens/s", 0});
    // From the last kernel of a step to the first one of the next.
    results_.Report(
        {"engine", what + ", idle between", between, 100 * between.median_us / time.median_us, "% of it", 0});
    const double bytes = 2.0 * static_cast<double>(shape_.product_weights()) +
                         1.0 * batch * static_cast<double>((context + num_tokens / 2) * shape_.kv_bytes_per_token());
    results_.Report({"engine", what + ", weights and KV", time, bytes / time.median_us * 1e-3, "GB/s", 0});
  }

  // Two sessions that do not fit the device together, and the first one again.
  void Return(std::int64_t context) {
    Start(context + context / 2, 3 * context, /*overlaps=*/true);
    const double cold = Run(1, context, 1, 21);
    while (engine_->status().unstored_blocks > 0) std::this_thread::yield();
    Run(1, context, 1, 22);
    const EngineStatus before = engine_->status();
    const double warm = Run(1, context, 1, 21);
    const EngineStatus after = engine_->status();
    SPILLWAY_CHECK(after.restored_blocks > before.restored_blocks) << "nothing came back from the host tier";
    const std::string what = std::to_string(context) + " tokens, first token";
    results_.Report(
        {"engine", what + ", computed", {cold, 0}, static_cast<double>(context) / cold * 1e6, "tokens/s", 0});
    results_.Report(
        {"engine", what + ", from the host tier", {warm, 0}, static_cast<double>(context) / warm * 1e6, "tokens/s", 0});
    results_.Report({"engine",
                     "restored blocks",
                     {(after.restore_seconds - before.restore_seconds) * 1e6, 0},
                     static_cast<double>(after.restored_bytes - before.restored_bytes) * 1e-9 /
                         (after.restore_seconds - before.restore_seconds),
                     "GB/s",
                     0});
  }

  // One sequence of which the device holds 4,096 tokens at most.
  void Beyond(std::int64_t context, std::int32_t num_tokens) {
    Start(std::min<std::int64_t>(4096, context / 2), context + num_tokens + kSegmentTokens, /*overlaps=*/true);
    Run(1, context, num_tokens, 31);
    std::vector<double> times;
    double prefill_us = 0;
    for (const StepReport& step : steps_.Take()) {
      if (step.num_prefill_tokens > 0) {
        prefill_us += step.seconds * 1e6;
      } else if (step.num_generated == 1) {
        times.push_back(step.seconds * 1e6);
      }
    }
    SPILLWAY_CHECK(engine_->status().streamed_bytes > 0 && times.size() > 1) << "nothing was read at home";
    const Measured time = Median(times);
    const std::string of = ", batch 1, context " + std::to_string(context) + ", KV in host memory";
    results_.Report(
        {"engine", "prefill" + of, {prefill_us, 0}, static_cast<double>(context) / prefill_us * 1e6, "tokens/s", 0});
    results_.Report({"engine", "decode" + of, time, 1 / time.median_us * 1e6, "tokens/s", 0});
    const auto kv_bytes = static_cast<double>(context * shape_.kv_bytes_per_token());
    results_.Report({"engine", "decode" + of + ", all KV", time, kv_bytes / time.median_us * 1e-3, "GB/s", 0});
  }

 private:
  static Measured Median(std::vector<double>& times) {
    std::sort(times.begin(), times.end());
    const double median = times[times.size() / 2];
    return {median, median > 0 ? (times[times.size() * 9 / 10] - times[times.size() / 10]) / median : 0};
  }
  static double Microseconds(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count();
  }

  static LlamaShape ShapeOf(const ModelConfig& config) {
    return {.layers = config.num_layers,
            .hidden = config.hidden,
            .inner = config.inner,
            .heads = config.num_heads,
            .kv_heads = config.num_kv_heads,
            .head_dim = config.head_dim,
            .vocab = config.vocab,
            .max_positions = config.max_positions};
  }

  // An engine whose device and host tiers hold so many tokens.
  void Start(std::int64_t device_tokens, std::int64_t host_tokens, bool overlaps) {
    engine_.reset();
    host_.reset();
    const std::size_t block_bytes = model_->kv_layout().block_bytes();
    EngineOptions options;
    options.overlap_steps = overlaps;
    options.kv_cache_bytes = (device_tokens / kBlockTokens + 1) * static_cast<std::int64_t>(block_bytes);
    options.max_model_len = static_cast<std::int32_t>(std::min(device_tokens + host_tokens, shape_.max_positions));
    if (host_tokens > 0) {
      const auto num_blocks = static_cast<std::uint32_t>(host_tokens / kBlockTokens);
      absl::StatusOr<Buffer> slab = device_->Allocate(MemoryKind::kPinnedHost, num_blocks * block_bytes);
      SPILLWAY_CHECK(slab.ok()) << slab.status();
      HostTierOptions host;
      host.block_bytes = block_bytes;
      host.num_blocks = num_blocks;
      host_ = MakeHostTier(*std::move(slab), host);
      options.host_tier = host_.get();
    }
    absl::StatusOr<std::unique_ptr<Engine>> engine =
        Engine::Make(*device_, std::make_unique<Shared>(*model_), options, &steps_);
    SPILLWAY_CHECK(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    steps_.Take();
  }

  // `batch` prompts of their own; microseconds until all are done.
  double Run(int batch, std::int64_t length, std::int32_t num_tokens, unsigned seed) {
    std::vector<SequenceRequest> requests;
    std::vector<std::future<testing::Collected>> results;
    for (int i = 0; i < batch; ++i) {
      requests.push_back(MakeRequest(Prompt(length, shape_.vocab, seed * 1000 + static_cast<unsigned>(i)), num_tokens));
      auto sink = std::make_shared<CollectingSink>();
      results.push_back(sink->Result());
      requests.back().sink = std::move(sink);
    }
    const auto begin = std::chrono::steady_clock::now();
    const absl::Status status = engine_->Submit(std::move(requests));
    SPILLWAY_CHECK(status.ok()) << status;
    for (auto& result : results) {
      const testing::Collected collected = result.get();
      SPILLWAY_CHECK(collected.error.ok()) << collected.error;
    }
    return Microseconds(begin);
  }

  LlamaShape shape_;  // of the model in the folder
  const std::string mode_;
  Results& results_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<Model> model_;
  Steps steps_;
  std::unique_ptr<HostTier> host_;
  std::unique_ptr<Engine> engine_;
};

int Main(const Arguments& arguments) {
  Results results;
  const bool is_cuda = arguments.device == "cuda";
  std::string description;
  {
    EngineBench bench(arguments, /*enforce_eager=*/false, results);
    description = bench.device().description();
    for (const std::int64_t length : {512, 2048, 8192}) {
      if (is_cuda || length <= 512) bench.Prefill(length);
    }
    for (const auto& [batch, context] : {std::pair{1, 1024}, {1, 32768}, {16, 1024}, {64, 1024}}) {
      if (!is_cuda && batch * context > 1024) continue;
      bench.Decode(batch, context, 48, /*overlaps=*/true);
      if (context == 1024) bench.Decode(batch, context, 48, /*overlaps=*/false);
    }
    bench.Return(is_cuda ? 16384 : 512);
    bench.Beyond(is_cuda ? 32768 : 1280, is_cuda ? 33 : 5);
  }
  if (is_cuda) {
    EngineBench bench(arguments, /*enforce_eager=*/true, results);
    for (const auto& [batch, context] : {std::pair{1, 1024}, {16, 1024}}) {
      bench.Decode(batch, context, 48, /*overlaps=*/true);
      bench.Decode(batch, context, 48, /*overlaps=*/false);
    }
  }
  if (!arguments.json.empty()) results.WriteJson(arguments.json, {description, arguments.commit, arguments.machine});
  return 0;
}

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) {
  spillway::bench::Arguments arguments;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const char* const value = argv[i + 1];
    if (name == "--folder") arguments.folder = value;
    if (name == "--json") arguments.json = value;
    if (name == "--commit") arguments.commit = value;
    if (name == "--machine") arguments.machine = value;
    if (name == "--device") arguments.device = value;
    if (name == "--layers") arguments.shape.layers = std::atoi(value);
  }
  if (arguments.folder.empty()) {
    std::fprintf(stderr,
                 "engine_bench --folder FOLDER [--device cuda|cpu] [--layers N] [--json FILE] [--commit NAME] "
                 "[--machine TEXT]\n");
    return 1;
  }
  return spillway::bench::Main(arguments);
}
