// What the host tier is worth and what it costs. Checks outputs before it times, forces evictions, and prints the
// counters that prove them.
//
//   tiers_bench [--json FILE] [copies] [working-sets] [return] [write-through]     no name: all

#include "bench/tiers_bench.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "kernels/check.h"
#include "tests/support/checkpoint_writer.h"

namespace spillway::tiers_bench {

double Median(std::vector<double> values) {
  SPILLWAY_CHECK(!values.empty());
  std::ranges::sort(values);
  return values[values.size() / 2];
}

namespace {

constexpr std::string_view kParts[] = {"copies", "working-sets", "return", "write-through"};

int Run(const std::string& json_path, const std::vector<std::string_view>& parts) {
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
  nlohmann::json all;
  const auto wanted = [&](std::string_view part) { return parts.empty() || std::ranges::count(parts, part) > 0; };
  if (wanted("copies")) all["copies"] = MeasureCopies();
  if (wanted("working-sets")) all["working_sets"] = MeasureWorkingSets(folder);
  if (wanted("return")) all["return"] = MeasureReturn(folder);
  if (wanted("write-through")) all["write_through"] = MeasureWriteThrough(folder);
  std::filesystem::remove_all(folder);
  if (!json_path.empty()) std::ofstream(json_path) << all.dump(1) << "\n";
  return 0;
}

}  // namespace
}  // namespace spillway::tiers_bench

int main(int argc, char** argv) {
  using spillway::tiers_bench::kParts;
  std::string json_path;
  std::vector<std::string_view> parts;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--json" && i + 1 < argc) {
      json_path = argv[++i];
    } else if (std::ranges::count(kParts, argument) > 0) {
      parts.push_back(argument);
    } else {
      std::fprintf(stderr, "usage: tiers_bench [--json FILE] [copies] [working-sets] [return] [write-through]\n");
      return 2;
    }
  }
  return spillway::tiers_bench::Run(json_path, parts);
}
