// The cost model against the engine: time to first token over kappa on paced links, and a replay against the same
// requests served.
//
//   papers_bench [--json FILE] [overhead] [replay TRACE]     no name: overhead

#include "bench/papers_bench.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "kernels/check.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway::papers_bench {
namespace {

int Run(const std::string& json_path, const std::string& trace_path, bool overhead, bool replay) {
  const std::string folder =
      std::filesystem::temp_directory_path() / ("spillway_papers_bench_" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  SPILLWAY_CHECK(WriteRandomLlama(folder, {.seed = 5,
                                           .layers = 8,
                                           .hidden = 512,
                                           .inner = 1408,
                                           .heads = 8,
                                           .kv_heads = 4,
                                           .head_dim = 64,
                                           .vocab = 288,
                                           .max_positions = 8192,
                                           .dtype = DType::kBF16})
                     .ok());
  nlohmann::json all;
  if (overhead) all["overhead"] = MeasureOverhead(folder);
  if (replay) all["replay"] = CompareReplay(folder, trace_path);
  std::filesystem::remove_all(folder);
  if (!json_path.empty()) std::ofstream(json_path) << all.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway::papers_bench

int main(int argc, char** argv) {
  std::string json_path;
  std::string trace_path;
  bool overhead = false;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--json" && i + 1 < argc) {
      json_path = argv[++i];
    } else if (argument == "replay" && i + 1 < argc) {
      trace_path = argv[++i];
    } else if (argument == "overhead") {
      overhead = true;
    } else {
      std::fprintf(stderr, "usage: papers_bench [--json FILE] [overhead] [replay TRACE]\n");
      return 2;
    }
  }
  if (!overhead && trace_path.empty()) overhead = true;
  return spillway::papers_bench::Run(json_path, trace_path, overhead, !trace_path.empty());
}
