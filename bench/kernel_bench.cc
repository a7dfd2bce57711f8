// Speed of the cpu device's kernels beside the machine's own limits, measured in the same run. Every kernel is compared
// with the reference before it is timed.
//
//   kernel_bench [--json FILE] [--only gemm | shapes | attention | sample | queue] [--target auto] [--gemm auto]
//   [--workers 0]

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bench/machine_limits.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/element.h"
#include "kernels/kernels.h"

namespace spillway {
namespace {

struct Result {
  std::string name;
  double microseconds = 0;
  double value = 0;
  std::string unit;
  double percent_of_limit = 0;  // 0: no limit to compare with
};

double Seconds(const std::function<void()>& run) {
  const auto begin = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double MedianOf(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

double MedianSeconds(const std::function<void()>& run) {
  run();
  std::vector<double> times(7);
  for (double& time : times) time = Seconds(run);
  return MedianOf(times);
}

// The median of several runs, and the median share of the limit: that of a run is held against the machine's limit as
// it is found right behind the run.
struct Timing {
  double seconds = 0;
  double percent_of_limit = 0;
};

Timing TimeBeside(const std::function<double()>& limit_seconds, const std::function<void()>& run) {
  run();
  std::vector<double> times(9);
  std::vector<double> percents(times.size());
  for (std::size_t i = 0; i < times.size(); ++i) {
    times[i] = Seconds(run);
    percents[i] = 100 * limit_seconds() / times[i];
  }
  return {MedianOf(times), MedianOf(percents)};
}

void Fill(DType dtype, std::int64_t size, std::uint64_t seed, std::byte* array) {
  std::mt19937_64 random(seed);
  for (std::int64_t i = 0; i < size; ++i) {
    // Uniform with the variance of a standard normal: as good for timing, and quick to make.
    StoreElement(array, dtype, i, (static_cast<float>(random() >> 40) * 0x1p-24F - 0.5F) * 3.46F);
  }
}

std::vector<std::byte> RandomArray(DType dtype, std::int64_t size, std::uint64_t seed) {
  std::vector<std::byte> array(static_cast<std::size_t>(size) * SizeOf(dtype));
  Fill(dtype, size, seed, array.data());
  return array;
}

class KernelBench {
 public:
  explicit KernelBench(const CpuDeviceOptions& options)
      : device_(MakeCpuDevice(options).value()), stream_(device_->NewStream().value()) {
    CpuDeviceOptions plain = options;
    plain.target = "reference";
    reference_ = MakeCpuDevice(plain).value();
    reference_stream_ = reference_->NewStream().value();
    const int num_threads =
        options.num_workers > 0 ? options.num_workers : static_cast<int>(std::thread::hardware_concurrency());
    const MachineLimits limits = MeasureLimits(*device_, num_threads);
    probe_ = std::make_unique<LimitProbe>(*device_, num_threads);
    std::printf("%s, %d threads\n", device_->description().c_str(), num_threads);
    Report({"read bandwidth", 0, limits.read_gigabytes, "GB/s", 0});
    Report({"copy bandwidth", 0, limits.copy_gigabytes, "GB/s", 0});
    Report({"fma peak (float)", 0, limits.fma_gigaflops, "GFLOP/s", 0});
    Report({"bf16 peak", 0, limits.bf16_gigaflops, "GFLOP/s", 0});
    Report({"bf16 GEMM peak", 0, limits.bf16_gemm_gigaflops, "GFLOP/s", 0});
  }

  void Gemm(DType dtype) {
    for (const std::int64_t num_rows : {1, 4, 16, 32, 512, 2048}) Gemm(dtype, num_rows, 2816, 1024);
  }

  // The matrices of a model of hidden 1,024 and inner 2,816, with a vocabulary of 32,768.
  void GemmShapes() {
    for (const std::int64_t num_rows : {1, 16, 32, 512, 4096}) {
      Gemm(DType::kBF16, num_rows, 1536, 1024);
      Gemm(DType::kBF16, num_rows, 1024, 1024);
      Gemm(DType::kBF16, num_rows, 5632, 1024);
      Gemm(DType::kBF16, num_rows, 1024, 2816);
      if (num_rows <= 32) Gemm(DType::kBF16, num_rows, 32768, 1024);
    }
  }

  void Gemm(DType dtype, std::int64_t num_rows, std::int64_t columns, std::int64_t depth) {
    const std::vector<std::byte> w = RandomArray(dtype, columns * depth, 1);
    // Where memory is the limit: together many times the cache of a core, and about that of many.
    const std::size_t num_matrices = num_rows >= 256 ? 4 : 1 + (std::size_t{256} << 20) / w.size();
    const MatrixView view = {w.data(), dtype, columns, depth, depth};
    std::vector<std::unique_ptr<PackedMatrix>> matrices;
    for (std::size_t i = 0; i < num_matrices; ++i) matrices.push_back(device_->kernels().Pack({&view, 1}).value());
    const auto plain = reference_->kernels().Pack({&view, 1}).value();
    const std::vector<std::byte> a = RandomArray(dtype, num_rows * depth, 2);
    std::vector<float> out(static_cast<std::size_t>(num_rows * columns));
    GemmArgs args;
    args.a = a.data();
    args.a_dtype = dtype;
    args.num_rows = num_rows;
    args.out = out.data();
    CheckGemm(args, *matrices[0], *plain);
    const auto bytes = static_cast<double>(w.size() * num_matrices);
    const double flops = 2.0 * static_cast<double>(num_rows * columns * depth) * static_cast<double>(num_matrices);
    // Whichever of the two takes longer.
    const auto limit = [&] { return std::max(bytes / probe_->ReadGigabytes(), flops / PeakOf(dtype)) * 1e-9; };
    const Timing timing = TimeBeside(limit, [&] {
      for (const auto& matrix : matrices) {
        args.weight = matrix.get();
        device_->kernels().Gemm(*stream_, args);
      }
      Finish();
    });
    const double microseconds = timing.seconds / static_cast<double>(num_matrices) * 1e6;
    const std::string name = "gemm " + std::string(NameOf(dtype)) + " M " + std::to_string(num_rows) + ", " +
                             std::to_string(columns) + " x " + std::to_string(depth);
    const bool is_read = num_rows <= 4;
    Report({name, microseconds, (is_read ? bytes : flops) / timing.seconds * 1e-9, is_read ? "GB/s" : "GFLOP/s",
            timing.percent_of_limit});
  }

  // num_sequences of `length` tokens, of which the last num_new are queries.
  void Attention(DType dtype, std::int64_t num_sequences, std::int64_t length, std::int64_t num_new,
                 int head_dim = 128) {
    constexpr int kHeads = 16;
    const KvLayout layout = {1, 4, head_dim, dtype};
    const std::int64_t blocks_per_sequence = (length + kBlockTokens - 1) / kBlockTokens;
    const std::int64_t num_blocks = num_sequences * blocks_per_sequence;
    const Buffer pool =
        device_->Allocate(MemoryKind::kDevice, static_cast<std::size_t>(num_blocks) * layout.block_bytes()).value();
    Fill(dtype, num_blocks * static_cast<std::int64_t>(layout.block_bytes() / SizeOf(dtype)), 3, pool.get());
    const std::int64_t num_tokens = num_sequences * num_new;
    const std::vector<std::byte> q = RandomArray(dtype, num_tokens * kHeads * layout.head_dim, 4);
    std::vector<float> out(static_cast<std::size_t>(num_tokens * kHeads * layout.head_dim));
    std::vector<std::int32_t> query_begin, first_position, block_begin, block_table;
    for (std::int64_t s = 0; s <= num_sequences; ++s) {
      query_begin.push_back(static_cast<std::int32_t>(s * num_new));
      first_position.push_back(static_cast<std::int32_t>(length - num_new));
      block_begin.push_back(static_cast<std::int32_t>(s * blocks_per_sequence));
    }
    for (std::int64_t b = 0; b < num_blocks; ++b) block_table.push_back(static_cast<std::int32_t>(b));
    std::shuffle(block_table.begin(), block_table.end(), std::mt19937(5));
    AttentionArgs args;
    args.q = q.data();
    args.q_dtype = dtype;
    args.num_heads = kHeads;
    args.scale = 0.088F;
    args.kv = {pool.get(), layout};
    args.num_sequences = num_sequences;
    args.num_tokens = num_tokens;
    args.query_begin = query_begin.data();
    args.first_position = first_position.data();
    args.block_begin = block_begin.data();
    args.block_table = block_table.data();
    args.out = reinterpret_cast<std::byte*>(out.data());
    CheckAttention(args, out);
    const double keys =
        static_cast<double>(num_new * (length - num_new)) + static_cast<double>(num_new * (num_new + 1)) / 2;
    const double flops = 4.0 * static_cast<double>(num_sequences) * keys * kHeads * layout.head_dim;
    const auto bytes = static_cast<double>(pool.size_bytes);
    const bool is_read = num_new == 1;
    const Timing timing =
        TimeBeside([&] { return (is_read ? bytes / probe_->ReadGigabytes() : flops / PeakOf(dtype)) * 1e-9; },
                   [&] {
                     device_->kernels().Attention(*stream_, args);
                     Finish();
                   });
    const std::string name = "attention " + std::string(NameOf(dtype)) + " " + std::to_string(num_sequences) + " x " +
                             std::to_string(num_new) + " of " + std::to_string(length) + ", head_dim " +
                             std::to_string(head_dim);
    Report({name, timing.seconds * 1e6, (is_read ? bytes : flops) / timing.seconds * 1e-9, is_read ? "GB/s" : "GFLOP/s",
            timing.percent_of_limit});
  }

  // What an operation costs before it does any work: many of them, then one wait.
  void Queue() {
    constexpr std::int64_t kHidden = 64;
    constexpr std::int64_t kManyRows = 256;
    constexpr int kCalls = 1000;
    std::vector<float> x(kManyRows * kHidden, 1.0F);
    std::vector<float> weight(kHidden, 1.0F);
    std::vector<float> out(x.size());
    RmsNormArgs args;
    args.x = x.data();
    args.weight = weight.data();
    args.epsilon = 1e-5F;
    args.hidden = kHidden;
    args.out = reinterpret_cast<std::byte*>(out.data());
    for (const std::int64_t num_rows : {std::int64_t{1}, kManyRows}) {
      args.num_rows = num_rows;
      const double seconds = MedianSeconds([&] {
                               for (int i = 0; i < kCalls; ++i) device_->kernels().RmsNorm(*stream_, args);
                               Finish();
                             }) /
                             kCalls;
      for (std::int64_t i = 0; i < num_rows * kHidden; ++i) SPILLWAY_CHECK(std::abs(out[i] - 1) < 1e-3) << "queue";
      Report({num_rows == 1 ? "queued operation, one thread" : "queued operation, all threads", seconds * 1e6,
              seconds * 1e6, "us", 0});
    }
    const double seconds = MedianSeconds([&] { Finish(); });
    Report({"wait for an idle stream", seconds * 1e6, seconds * 1e6, "us", 0});
  }

  void Samples(std::int64_t vocab) {
    SampleRow row;
    Sample(vocab, "greedy", row);
    row.temperature = 0.8F;
    Sample(vocab, "temperature", row);
    row.top_k = 50;
    row.top_p = 0.95F;
    Sample(vocab, "top_k 50 top_p 0.95", row);
    row.top_k = 0;
    Sample(vocab, "top_p 0.95", row);
    row.num_logprobs = 20;
    Sample(vocab, "top_p 0.95, 20 logprobs", row);
  }

  void WriteJson(const std::string& path) const {
    std::ofstream file(path);
    file << "{\"device\": \"" << device_->description() << "\", \"results\": [";
    for (std::size_t i = 0; i < results_.size(); ++i) {
      const Result& result = results_[i];
      file << (i == 0 ? "\n" : ",\n") << "  {\"name\": \"" << result.name
           << "\", \"microseconds\": " << result.microseconds << ", \"value\": " << result.value << ", \"unit\": \""
           << result.unit << "\", \"percent_of_limit\": " << result.percent_of_limit << "}";
    }
    file << "\n]}\n";
  }

 private:
  void Sample(std::int64_t vocab, const std::string& what, const SampleRow& row) {
    constexpr std::int64_t kRows = 16;
    std::vector<float> logits(static_cast<std::size_t>(kRows * vocab));
    std::mt19937_64 random(6);
    std::normal_distribution<float> normal(0, 3);
    for (float& logit : logits) logit = normal(random);
    std::vector<SampleRow> rows(kRows, row);
    for (std::size_t r = 0; r < rows.size(); ++r) rows[r].seed = r;
    std::vector<SampleResult> results(kRows);
    std::vector<SampleResult> expected(kRows);
    SampleArgs args;
    args.logits = logits.data();
    args.num_rows = kRows;
    args.vocab = vocab;
    args.rows = rows.data();
    args.results = expected.data();
    reference_->kernels().Sample(*reference_stream_, args);
    SPILLWAY_CHECK(reference_stream_->Record()->Await().ok());
    args.results = results.data();
    const double seconds = MedianSeconds([&] {
      device_->kernels().Sample(*stream_, args);
      Finish();
    });
    for (std::size_t r = 0; r < rows.size(); ++r) SPILLWAY_CHECK(results[r].token == expected[r].token) << what;
    Report({"sample " + std::to_string(vocab) + " x 16 " + what, seconds * 1e6, seconds / kRows * 1e6, "us/row", 0});
  }

  double PeakOf(DType dtype) const { return dtype == DType::kBF16 ? probe_->Bf16Gigaflops() : probe_->FmaGigaflops(); }

  void Finish() { SPILLWAY_CHECK(stream_->Record()->Await().ok()) << stream_->status(); }

  void Report(const Result& result) {
    std::printf("%-44s %10.1f us %9.1f %-8s", result.name.c_str(), result.microseconds, result.value,
                result.unit.c_str());
    if (result.percent_of_limit != 0) std::printf(" %5.1f %% of the limit", result.percent_of_limit);
    std::printf("\n");
    std::fflush(stdout);
    results_.push_back(result);
  }

  void CheckGemm(GemmArgs args, const PackedMatrix& fast, const PackedMatrix& plain) {
    args.num_rows = std::min<std::int64_t>(args.num_rows, 4);
    const std::size_t size = static_cast<std::size_t>(args.num_rows * fast.rows());
    args.weight = &fast;
    device_->kernels().Gemm(*stream_, args);
    Finish();
    std::vector<float> expected(size);
    const std::vector<float> actual(args.out, args.out + size);
    args.weight = &plain;
    args.out = expected.data();
    reference_->kernels().Gemm(*reference_stream_, args);
    SPILLWAY_CHECK(reference_stream_->Record()->Await().ok());
    for (std::size_t i = 0; i < size; ++i) SPILLWAY_CHECK(std::abs(actual[i] - expected[i]) < 1e-3) << "gemm, " << i;
  }

  // The last token of each sequence.
  void CheckAttention(const AttentionArgs& args, const std::vector<float>& out) {
    device_->kernels().Attention(*stream_, args);
    Finish();
    const std::size_t token = static_cast<std::size_t>(args.num_heads * args.kv.layout.head_dim);
    const auto last = static_cast<std::size_t>(args.num_tokens - 1) * token;
    const std::int64_t s = args.num_sequences - 1;
    const std::int32_t query_begin[] = {0, 1};
    const std::int32_t position = args.first_position[s] + args.query_begin[s + 1] - args.query_begin[s] - 1;
    std::vector<float> expected(token);
    AttentionArgs one = args;
    one.q = args.q + last * SizeOf(args.q_dtype);
    one.num_sequences = 1;
    one.num_tokens = 1;
    one.query_begin = query_begin;
    one.first_position = &position;
    one.block_begin = args.block_begin + s;
    one.out = reinterpret_cast<std::byte*>(expected.data());
    reference_->kernels().Attention(*reference_stream_, one);
    SPILLWAY_CHECK(reference_stream_->Record()->Await().ok());
    double error = 0;
    double norm = 0;
    for (std::size_t i = 0; i < token; ++i) {
      error += std::pow(double{out[last + i]} - expected[i], 2);
      norm += std::pow(double{expected[i]}, 2);
    }
    // Weights are rounded to bf16 where pairs of bf16 are multiplied.
    const double tolerance = args.kv.layout.dtype == DType::kBF16 ? 4e-3 : 1e-4;
    SPILLWAY_CHECK(std::sqrt(error / norm) < tolerance) << "attention: " << std::sqrt(error / norm);
  }

  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Device> reference_;
  std::unique_ptr<Stream> reference_stream_;
  std::unique_ptr<LimitProbe> probe_;
  std::vector<Result> results_;
};

int Main(int argc, char** argv) {
  CpuDeviceOptions options;
  std::string json;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--json") json = argv[i + 1];
    if (flag == "--only") only = argv[i + 1];
    if (flag == "--target") options.target = argv[i + 1];
    if (flag == "--gemm") options.gemm = argv[i + 1];
    if (flag == "--workers") options.num_workers = std::stoi(argv[i + 1]);
  }
  KernelBench bench(options);
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    if (only.empty() || only == "gemm") bench.Gemm(dtype);
    if (only.empty() || only == "attention") {
      for (const std::int64_t length : {1024, 4096, 16384, 65536}) bench.Attention(dtype, 1, length, 1);
      bench.Attention(dtype, 4, 16384, 1);
      bench.Attention(dtype, 16, 1024, 1);
      bench.Attention(dtype, 1, 512, 512);
      bench.Attention(dtype, 1, 4096, 512);
      bench.Attention(dtype, 1, 512, 512, 64);
      bench.Attention(dtype, 1, 4096, 512, 64);
    }
  }
  if (only.empty() || only == "shapes") bench.GemmShapes();
  if (only.empty() || only == "queue") bench.Queue();
  if (only.empty() || only == "sample") {
    for (const std::int64_t vocab : {32768, 128000}) bench.Samples(vocab);
  }
  if (!json.empty()) bench.WriteJson(json);
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::Main(argc, argv); }
