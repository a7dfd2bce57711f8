#pragma once

// Numbers of a benchmark, under the names of `vllm bench`.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/load_generator.h"

namespace spillway {

// Linear between neighbours, as numpy's default; 0 where there is nothing. `percent` in [0, 100].
double Percentile(std::vector<double> values, double percent);
double PercentileOfSorted(const std::vector<double>& values, double percent);

// "50,90,99.9" -> numbers. INVALID_ARGUMENT names --metric-percentiles.
absl::StatusOr<std::vector<double>> ParsePercentiles(const std::string& text);

// The result of `bench serve`: counts, rates, and mean, median, std and percentiles of ttft, tpot, itl and e2el in ms.
nlohmann::ordered_json ServeReport(const LoadOptions& options, const LoadResult& result,
                                   const std::vector<double>& percentiles);
// The same for people.
std::string ShowServeReport(const nlohmann::ordered_json& report);

absl::Status WriteJson(const std::string& path, const nlohmann::ordered_json& report);

}  // namespace spillway
