// gpu_bench [--only SECTION]... [--json FILE] [--commit NAME] [--machine TEXT] [--batch-invariant]: the cuda device's
// speeds against what the machine can do. The limits are measured first: memory bandwidth by a device-to-device copy,
// the link by pinned copies of 64 MiB.

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "bench/gpu/measure.h"
#include "kernels/check.h"
#include "kernels/cuda/gather.h"

namespace spillway::bench {
namespace {

double Gbps(double bytes, const Measured& time) { return bytes / time.median_us * 1e-3; }

std::string Size(std::size_t bytes) {
  return bytes >= (1U << 20) ? std::to_string(bytes >> 20) + " MiB" : std::to_string(bytes >> 10) + " KiB";
}

void RunCopyBench(Bench& bench) {
  {
    constexpr std::size_t kBytes = std::size_t{2} << 30;
    const Buffer from = bench.RandomBF16(MemoryKind::kDevice, kBytes);
    const Buffer to = bench.Allocate(MemoryKind::kDevice, kBytes);
    const Measured time = bench.Time([&](int) { bench.stream().Copy(to.get(), from.get(), kBytes); });
    bench.hbm_gbps = Gbps(2.0 * kBytes, time);
    bench.Report({"copy", "device to device, 2 GiB, read + written", time, bench.hbm_gbps, "GB/s", 0});
  }
  constexpr std::size_t kTotal = std::size_t{64} << 20;
  const Buffer host = bench.RandomBF16(MemoryKind::kPinnedHost, 2 * kTotal);
  const Buffer device = bench.RandomBF16(MemoryKind::kDevice, 2 * kTotal);
  const auto other = bench.device().NewStream().value();
  const auto both_ways = [&](std::size_t span, bool up, bool down) {
    return bench.Time([&](int) {
      if (up && down) other->Wait(bench.stream().Record());
      bench.stream().Hold();  // as the transfers of the tiers are queued
      other->Hold();
      for (std::size_t at = 0; at < kTotal; at += span) {
        if (up) bench.stream().Copy(device.get() + at, host.get() + at, span);
        if (down) {
          Stream& stream = up ? *other : bench.stream();
          stream.Copy(host.get() + kTotal + at, device.get() + kTotal + at, span);
        }
      }
      other->Resume();
      bench.stream().Resume();
      if (up && down) bench.stream().Wait(other->Record());
    });
  };
  const Measured largest = both_ways(kTotal, true, false);
  bench.pinned_gbps = Gbps(kTotal, largest);
  bench.Report({"copy", "host to device, 64 MiB (the link's limit below)", largest, bench.pinned_gbps, "GB/s", 0});
  for (std::size_t span = std::size_t{16} << 10; span <= std::size_t{8} << 20; span *= 2) {
    for (const auto& [name, up, down] : {std::tuple{"host to device", true, false},
                                         {"device to host", false, true},
                                         {"both ways at once", true, true}}) {
      const Measured time = both_ways(span, up, down);
      bench.Report({"copy", std::string(name) + ", spans of " + Size(span), time,
                    Gbps(static_cast<double>(kTotal) * (up && down ? 2 : 1), time), "GB/s", bench.pinned_gbps});
    }
  }
}

void RunGatherBench(Bench& bench) {
  constexpr std::size_t kPool = std::size_t{1} << 30;
  constexpr std::size_t kMoved = std::size_t{64} << 20;
  const Buffer host = bench.RandomBF16(MemoryKind::kPinnedHost, kPool);
  const Buffer device = bench.Allocate(MemoryKind::kDevice, kMoved);
  std::mt19937_64 random(5);
  for (const std::size_t row_bytes : {128, 256, 512, 1024, 8192}) {
    const std::size_t num_rows = kMoved / row_bytes;
    std::vector<std::int64_t> sources(num_rows);
    std::vector<std::int64_t> destinations(num_rows);
    for (std::size_t i = 0; i < num_rows; ++i) {
      sources[i] = static_cast<std::int64_t>(random() % (kPool / row_bytes) * row_bytes);
      destinations[i] = static_cast<std::int64_t>(i * row_bytes);
    }
    const Buffer from = bench.Upload(sources);
    const Buffer to = bench.Upload(destinations);
    for (const int num_ctas : {4, 8, 16, 32, 64}) {
      const Measured time = bench.Time([&](int) {
        cuda::GatherRows(bench.stream(), {.source = host.get(),
                                          .destination = device.get(),
                                          .source_offsets = reinterpret_cast<const std::int64_t*>(from.get()),
                                          .destination_offsets = reinterpret_cast<const std::int64_t*>(to.get()),
                                          .num_rows_device = nullptr,
                                          .num_rows = static_cast<std::int64_t>(num_rows),
                                          .row_bytes = static_cast<std::int32_t>(row_bytes),
                                          .num_ctas = num_ctas});
      });
      bench.Report({"gather", "rows of " + std::to_string(row_bytes) + " B, " + std::to_string(num_ctas) + " CTAs",
                    time, Gbps(kMoved, time), "GB/s", bench.pinned_gbps});
    }
  }
}

// What a launch costs one by one and replayed from a graph: the gain waiting for a captured decode step.
void RunLaunchBench(Bench& bench) {
  constexpr int kLaunches = 300;  // about a decode step of 32 layers
  const cudaStream_t stream = bench.stream().handle();
  const auto launch_all = [&] {
    for (int i = 0; i < kLaunches; ++i) Check(cuda::LaunchEmpty(stream), "launch");
  };
  const Measured eager = bench.Time([&](int) { launch_all(); });
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  launch_all();
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  const Measured replayed = bench.Time([&](int) { Check(cudaGraphLaunch(executable, stream), "replay"); });
  Check(cudaGraphExecDestroy(executable), "graph");
  Check(cudaGraphDestroy(graph), "graph");
  bench.Report({"launch", "300 empty kernels, eager", eager, eager.median_us / kLaunches, "us each", 0});
  bench.Report({"launch", "300 empty kernels, one graph", replayed, replayed.median_us / kLaunches, "us each", 0});
}

}  // namespace
}  // namespace spillway::bench

int main(int argc, char** argv) {
  using spillway::bench::Bench;
  struct Section {
    const char* name;
    void (*run)(Bench&);
  };
  // In this order: the copies measure what the others are compared with.
  constexpr Section kSections[] = {
      {"copy", spillway::bench::RunCopyBench},     {"launch", spillway::bench::RunLaunchBench},
      {"gather", spillway::bench::RunGatherBench}, {"attention", spillway::bench::RunAttentionBench},
      {"gemm", spillway::bench::RunGemmBench},     {"step", spillway::bench::RunStepBench}};
  std::string json;
  std::string commit = "unknown";
  std::string machine = "unknown";
  std::vector<std::string> only;
  bool batch_invariant = false;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else if (std::strcmp(argv[i], "--commit") == 0 && i + 1 < argc) {
      commit = argv[++i];
    } else if (std::strcmp(argv[i], "--machine") == 0 && i + 1 < argc) {
      machine = argv[++i];
    } else if (std::strcmp(argv[i], "--only") == 0 && i + 1 < argc) {
      only.emplace_back(argv[++i]);
    } else if (std::strcmp(argv[i], "--batch-invariant") == 0) {
      batch_invariant = true;
    } else {
      std::fprintf(stderr,
                   "gpu_bench [--only copy|launch|gather|attention|gemm|step]... [--json FILE] [--commit NAME]\n"
                   "          [--machine TEXT] [--batch-invariant]\n");
      return 1;
    }
  }
  for (const std::string& name : only) {
    if (std::none_of(std::begin(kSections), std::end(kSections),
                     [&](const Section& each) { return name == each.name; })) {
      std::fprintf(stderr, "gpu_bench: --only %s: there is no such section\n", name.c_str());
      return 1;
    }
  }
  Bench bench(batch_invariant);
  for (const Section& section : kSections) {
    if (only.empty() || std::find(only.begin(), only.end(), section.name) != only.end()) section.run(bench);
  }
  if (!json.empty()) bench.WriteJson(json, commit, machine);
  return 0;
}
