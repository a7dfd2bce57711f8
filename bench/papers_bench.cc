// The cost model against the engine on paced links: time to first token over kappa; load, recompute or split; a replay
// against the same requests served.
//
//   papers_bench [--json FILE] [--links MB/s,...] [--policies fcfs,...] [overhead] [choices] [replay TRACE]
//
// No name: overhead.

#include "bench/papers_bench.h"

#include <cstdio>
#include <fstream>
#include <optional>
#include <string_view>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace spillway::papers_bench {
namespace {

constexpr RandomLlamaOptions kModel{.seed = 5,
                                    .layers = 8,
                                    .hidden = 512,
                                    .inner = 1408,
                                    .heads = 8,
                                    .kv_heads = 4,
                                    .head_dim = 64,
                                    .vocab = 288,
                                    .max_positions = 8192,
                                    .dtype = DType::kBF16};

struct Wanted {
  std::string json_path;
  std::vector<double> links = {15e6, 55e6, 110e6, 500e6};
  bool overhead = false;
  bool choices = false;
  std::string trace_path;
  std::vector<SchedulingPolicy> policies = {SchedulingPolicy::kFcfs, SchedulingPolicy::kKappa};
};

std::vector<std::string> Split(const char* list) { return absl::StrSplit(list, ','); }

// False: not understood.
bool Parse(int argc, char** argv, Wanted& wanted) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    const bool has_value = i + 1 < argc;
    if (argument == "--json" && has_value) {
      wanted.json_path = argv[++i];
    } else if (argument == "--links" && has_value) {
      wanted.links.clear();
      for (const std::string& each : Split(argv[++i])) {
        double megabytes = 0;
        if (!absl::SimpleAtod(each, &megabytes) || megabytes <= 0) return false;
        wanted.links.push_back(1e6 * megabytes);
      }
    } else if (argument == "--policies" && has_value) {
      wanted.policies.clear();
      for (const std::string& each : Split(argv[++i])) {
        const std::optional<SchedulingPolicy> policy = SchedulingPolicyNamed(each);
        if (!policy) return false;
        wanted.policies.push_back(*policy);
      }
    } else if (argument == "replay" && has_value) {
      wanted.trace_path = argv[++i];
    } else if (argument == "overhead") {
      wanted.overhead = true;
    } else if (argument == "choices") {
      wanted.choices = true;
    } else {
      return false;
    }
  }
  if (!wanted.choices && wanted.trace_path.empty()) wanted.overhead = true;
  return true;
}

void Run(const Wanted& wanted) {
  PacedRig rig(kModel, kHostBlocks);
  nlohmann::json all;
  if (wanted.overhead) all["overhead"] = MeasureOverhead(rig, wanted.links);
  if (wanted.choices) all["choices"] = MeasureChoices(rig, wanted.links);
  if (!wanted.trace_path.empty()) all["replay"] = CompareReplay(rig, wanted.trace_path, wanted.policies);
  if (!wanted.json_path.empty()) std::ofstream(wanted.json_path) << all.dump(1) << "\n";
}

}  // namespace
}  // namespace spillway::papers_bench

int main(int argc, char** argv) {
  spillway::papers_bench::Wanted wanted;
  if (!spillway::papers_bench::Parse(argc, argv, wanted)) {
    std::fprintf(stderr,
                 "usage: papers_bench [--json FILE] [--links MB/s,...] [--policies fcfs,...] [overhead] [choices] "
                 "[replay TRACE]\n");
    return 2;
  }
  spillway::papers_bench::Run(wanted);
  return 0;
}
