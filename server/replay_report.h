#pragma once

// Numbers of a replay, under the names of `vllm bench` where it has them. All are modelled, and say so.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/replay.h"

namespace spillway {

// "ttft:500 tpot:50 e2el:9000" in ms, as `vllm bench serve --goodput`; 0: not asked for.
struct Slo {
  double ttft_ms = 0;
  double tpot_ms = 0;
  double e2el_ms = 0;
};
// INVALID_ARGUMENT names --goodput.
absl::StatusOr<Slo> ParseSlo(const std::vector<std::string>& texts);

// One policy's result. Percentiles and goodput are left out where the backlog grew ("overloaded").
nlohmann::ordered_json ReplayReport(const std::string& policy, const ReplayResult& result, const Slo& slo,
                                    std::int32_t replicas, const std::vector<double>& percentiles);
// `report`: the whole run, {"policies": [...]} among its members. For people, as CSV rows per request, as a page.
std::string ShowReplay(const nlohmann::ordered_json& report);
std::string ReplayCsv(const std::vector<std::pair<std::string, ReplayResult>>& results);
std::string ReplayPage(const nlohmann::ordered_json& report,
                       const std::vector<std::pair<std::string, ReplayResult>>& results);

}  // namespace spillway
