// The whole engine on a seeded random Llama of 250 million parameters, beside what the machine can do, measured in the
// same run: decode of one sequence, prefill, decode of 16 and 32 sequences.
//
//   model_bench --write FOLDER     writes the model, with a tokenizer, for the below, `spillway serve` and peers
//   model_bench --model FOLDER [--json FILE] [--quantization none | int8] [--target auto] [--gemm auto]
//               [--only decode-1 | prefill-512 | prefill-4096 | decode-16 | decode-32]

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "bench/engine_load.h"
#include "bench/machine_limits.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway {
namespace {

constexpr RandomLlamaOptions kModel{.seed = 7,
                                    .layers = 16,
                                    .hidden = 1024,
                                    .inner = 2816,
                                    .heads = 16,
                                    .kv_heads = 4,
                                    .head_dim = 64,
                                    .vocab = 32768,
                                    .max_positions = 8192,
                                    .dtype = DType::kBF16,
                                    .tied = false};

// Resident memory of this process: "RssAnon:" of its own, "RssFile:" of mapped files.
double ResidentBytes(std::string_view what) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with(what)) return std::stod(line.substr(what.size())) * 1024;
  }
  return 0;
}

absl::Status WriteModel(const std::string& folder) {
  std::filesystem::create_directories(folder);
  RETURN_IF_ERROR(WriteByteTokenizer(folder, kModel.vocab));
  return WriteRandomLlama(folder, kModel);
}

// Seconds and tokens of the steps that only decoded, and of those that only prefilled.
class StepSums : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override {
    if (report.num_tokens == 0) return;
    if (report.num_prefill_tokens == 0) decode_seconds[report.num_tokens].push_back(report.seconds);
    if (report.num_prefill_tokens == report.num_tokens) prefill_seconds += report.seconds;
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

  std::map<std::int32_t, std::vector<double>> decode_seconds;  // by number of sequences
  double prefill_seconds = 0;
};

class ModelBench {
 public:
  ModelBench(const std::string& folder, const CpuDeviceOptions& options, Quantization quantization)
      : quantization_(quantization), device_(MakeCpuDevice(options).value()) {
    const double begin = Now();
    std::unique_ptr<Model> model = Model::Load(folder, DTypeChoice::kAuto, quantization, *device_, nullptr).value();
    const double seconds = Now() - begin;
    const double own_bytes = ResidentBytes("RssAnon:");
    const double file_bytes = ResidentBytes("RssFile:");
    weight_bytes_ = static_cast<double>(model->weight_bytes());
    kv_bytes_per_token_ = static_cast<double>(model->kv_layout().block_bytes()) / kBlockTokens;
    const auto num_threads = static_cast<int>(std::thread::hardware_concurrency());
    limits_ = MeasureLimits(*device_, num_threads);
    probe_ = std::make_unique<LimitProbe>(*device_, num_threads);
    json_ = {{"device", device_->description()},
             {"quantization", quantization == Quantization::kInt8 ? "int8" : "none"},
             {"read_gigabytes", limits_.read_gigabytes},
             {"bf16_gigaflops", limits_.bf16_gigaflops},
             {"bf16_gemm_gigaflops", limits_.bf16_gemm_gigaflops},
             {"weight_bytes", weight_bytes_},
             {"load_seconds", seconds},
             {"resident_own_bytes", own_bytes},
             {"resident_file_bytes", file_bytes}};
    std::printf(
        "%s, weights %.0f MB packed in %.2f s (%.2f GB/s of the file), read %.1f GB/s, bf16 peak %.0f, of a GEMM %.0f "
        "GFLOP/s\n",
        device_->description().c_str(), weight_bytes_ * 1e-6, seconds,
        static_cast<double>(std::filesystem::file_size(folder + "/model.safetensors")) / seconds * 1e-9,
        limits_.read_gigabytes, limits_.bf16_gigaflops, limits_.bf16_gemm_gigaflops);
    EngineOptions engine;
    engine.kv_cache_bytes = std::int64_t{1} << 30;
    engine.max_model_len = kModel.max_positions;
    engine.max_num_batched_tokens = 2048;
    engine.enable_prefix_caching = false;
    engine_ = Engine::Make(*device_, std::move(model), engine, &steps_).value();
    RunOnce(1, 16, 4);
  }

  void Prefill(std::int32_t length) {
    const double pairs = static_cast<double>(length) * (length + 1) / 2;
    const double attention = 4.0 * kModel.layers * kModel.heads * kModel.head_dim * pairs;
    const double flops = 2.0 * LayerParameters() * length + attention;
    std::vector<double> seconds;
    std::vector<double> shares;  // of the peak found right behind each run
    std::vector<double> gemm_shares;
    for (int run = 0; run < 9; ++run) {
      steps_ = {};
      RunOnce(1, length, 1);
      seconds.push_back(steps_.prefill_seconds);
      shares.push_back(flops / steps_.prefill_seconds * 1e-9 / probe_->Bf16Gigaflops());
      gemm_shares.push_back(flops / steps_.prefill_seconds * 1e-9 / probe_->Bf16GemmGigaflops());
    }
    const std::string name = "prefill " + std::to_string(length);
    Report(name, length / Median(seconds), "tokens/s", 100 * Median(shares), "% of bf16 peak");
    Report(name, length / Median(seconds), "tokens/s", 100 * Median(gemm_shares), "% of bf16 GEMM peak");
  }

  // The limit of one sequence: every weight and the KV read once. What a run reaches of it is told by the limits
  // measured just before and behind it.
  void Decode(int num_sequences, std::int32_t prompt, std::int32_t output) {
    std::vector<double> speeds;
    std::vector<double> shares;
    double read_before = probe_->ReadGigabytes();
    for (int run = 0; run < 5; ++run) {
      steps_ = {};
      RunOnce(num_sequences, prompt, output);
      const double read_behind = probe_->ReadGigabytes();
      const double read_gigabytes = (read_before + read_behind) / 2;
      read_before = read_behind;
      const std::vector<double>& times = steps_.decode_seconds[num_sequences];
      SPILLWAY_CHECK(times.size() > 8) << times.size() << " steps of " << num_sequences << " sequences";
      double total = 0;
      for (const double time : times) total += time;
      const double step = total / static_cast<double>(times.size());
      const double kv_seconds = num_sequences * (prompt + output / 2.0) * kv_bytes_per_token_ / read_gigabytes * 1e-9;
      const double limit = num_sequences == 1 ? weight_bytes_ / read_gigabytes * 1e-9 + kv_seconds
                                              : GemmSeconds(num_sequences) + kv_seconds;
      speeds.push_back(num_sequences / step);
      shares.push_back(100 * limit / step);
    }
    Report("decode " + std::to_string(num_sequences) + " x (" + std::to_string(prompt) + " + " +
               std::to_string(output) + ")",
           Median(speeds), "tokens/s", Median(shares),
           num_sequences == 1 ? "% of read bandwidth" : "% of GEMM(M) and KV bytes");
  }

  const nlohmann::json& json() const { return json_; }

 private:
  static double Median(std::vector<double> values) {
    std::ranges::sort(values);
    return values[values.size() / 2];
  }

  struct Matrix {
    std::int64_t rows;
    std::int64_t cols;
  };
  static std::vector<Matrix> LayerMatrices() {
    const std::int64_t width = std::int64_t{kModel.heads} * kModel.head_dim;
    const std::int64_t kv_width = std::int64_t{kModel.kv_heads} * kModel.head_dim;
    return {{width + 2 * kv_width, kModel.hidden},
            {kModel.hidden, width},
            {2 * kModel.inner, kModel.hidden},
            {kModel.hidden, kModel.inner}};
  }
  static double LayerParameters() {
    double sum = 0;
    for (const Matrix& matrix : LayerMatrices()) sum += static_cast<double>(matrix.rows * matrix.cols);
    return sum * kModel.layers;
  }

  // All matrices of the model multiplied by `num_rows` rows one after the other, and nothing else.
  double GemmSeconds(std::int64_t num_rows) {
    if (matrices_.empty()) {
      std::vector<Matrix> shapes;
      for (int layer = 0; layer < kModel.layers; ++layer) {
        for (const Matrix& matrix : LayerMatrices()) shapes.push_back(matrix);
      }
      shapes.push_back({kModel.vocab, kModel.hidden});
      const std::vector<std::uint16_t> values(static_cast<std::size_t>(kModel.vocab) * kModel.hidden, 0x3c00);
      for (const Matrix& shape : shapes) {
        const MatrixView view = {reinterpret_cast<const std::byte*>(values.data()), DType::kBF16, shape.rows,
                                 shape.cols, shape.cols};
        const Kernels& kernels = device_->kernels();
        matrices_.push_back(
            (quantization_ == Quantization::kInt8 ? kernels.PackInt8({&view, 1}) : kernels.Pack({&view, 1})).value());
      }
    }
    const std::vector<std::uint16_t> a(static_cast<std::size_t>(num_rows * kModel.inner), 0x3c00);
    std::vector<float> out(static_cast<std::size_t>(num_rows * kModel.vocab));
    const std::unique_ptr<Stream> stream = device_->NewStream().value();
    std::vector<double> seconds;
    for (int run = 0; run < 6; ++run) {
      const double begin = Now();
      for (const auto& matrix : matrices_) {
        device_->kernels().Gemm(*stream, {.a = reinterpret_cast<const std::byte*>(a.data()),
                                          .a_dtype = DType::kBF16,
                                          .num_rows = num_rows,
                                          .weight = matrix.get(),
                                          .out = out.data()});
      }
      SPILLWAY_CHECK(stream->Record()->Await().ok());
      seconds.push_back(Now() - begin);
    }
    return Median(seconds);
  }

  void RunOnce(int num_sequences, std::int32_t prompt, std::int32_t output) {
    GenerateTogether(*engine_, num_sequences, prompt, output, last_id_);
  }

  void Report(const std::string& name, double value, const char* unit, double percent, const char* of) {
    std::printf("%-24s %9.1f %s  %5.1f %s\n", name.c_str(), value, unit, percent, of);
    std::fflush(stdout);
    json_["results"].push_back({{"name", name}, {"value", value}, {"unit", unit}, {"percent", percent}, {"of", of}});
  }

  const Quantization quantization_;
  std::unique_ptr<Device> device_;
  MachineLimits limits_;
  std::unique_ptr<LimitProbe> probe_;
  double weight_bytes_ = 0;
  double kv_bytes_per_token_ = 0;
  StepSums steps_;
  std::unique_ptr<Engine> engine_;
  std::vector<std::unique_ptr<PackedMatrix>> matrices_;
  std::uint64_t last_id_ = 0;
  nlohmann::json json_;
};

int Main(int argc, char** argv) {
  CpuDeviceOptions options;
  Quantization quantization = Quantization::kNone;
  std::string json;
  std::string folder;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--json") json = argv[i + 1];
    if (flag == "--target") options.target = argv[i + 1];
    if (flag == "--gemm") options.gemm = argv[i + 1];
    if (flag == "--quantization")
      quantization = argv[i + 1] == std::string("int8") ? Quantization::kInt8 : quantization;
    if (flag == "--write") {
      const absl::Status status = WriteModel(argv[i + 1]);
      SPILLWAY_CHECK(status.ok()) << status;
      return 0;
    }
    if (flag == "--model") folder = argv[i + 1];
    if (flag == "--only") only = argv[i + 1];
  }
  SPILLWAY_CHECK(!folder.empty()) << "--model FOLDER or --write FOLDER";
  ModelBench bench(folder, options, quantization);
  const auto wants = [&](std::string_view name) { return only.empty() || only == name; };
  if (wants("decode-1")) bench.Decode(1, 32, 256);
  if (wants("prefill-512")) bench.Prefill(512);
  if (wants("prefill-4096")) bench.Prefill(4096);
  if (wants("decode-16")) bench.Decode(16, 32, 256);
  if (wants("decode-32")) bench.Decode(32, 32, 256);
  if (!json.empty()) std::ofstream(json) << bench.json().dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::Main(argc, argv); }
