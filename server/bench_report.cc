#include "server/bench_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <string_view>

#include "absl/strings/str_split.h"
#include "server/option_values.h"

namespace spillway {
namespace {

double Mean(const std::vector<double>& values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double Deviation(const std::vector<double>& values) {
  const double mean = Mean(values);
  double sum = 0;
  for (const double value : values) sum += (value - mean) * (value - mean);
  return values.empty() ? 0 : std::sqrt(sum / static_cast<double>(values.size()));
}

// mean_ttft_ms, median_ttft_ms, std_ttft_ms, p99_ttft_ms ...
void AddMetric(nlohmann::ordered_json& report, std::string_view name, const std::vector<double>& seconds,
               const std::vector<double>& percentiles) {
  std::vector<double> ms;
  ms.reserve(seconds.size());
  for (const double value : seconds) ms.push_back(1000 * value);
  report[fmt::format("mean_{}_ms", name)] = Mean(ms);
  report[fmt::format("median_{}_ms", name)] = Percentile(ms, 50);
  report[fmt::format("std_{}_ms", name)] = Deviation(ms);
  for (const double percent : percentiles) {
    report[fmt::format("p{:g}_{}_ms", percent, name)] = Percentile(ms, percent);
  }
}

}  // namespace

double Percentile(std::vector<double> values, double percent) {
  std::ranges::sort(values);
  return PercentileOfSorted(values, percent);
}

double PercentileOfSorted(const std::vector<double>& values, double percent) {
  if (values.empty()) return 0;
  const double position = percent / 100 * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(position);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (position - static_cast<double>(below)) * (values[above] - values[below]);
}

absl::StatusOr<std::vector<double>> ParsePercentiles(const std::string& text) {
  std::vector<double> percentiles;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::optional<double> percent = ParseNumber(part);
    if (!percent || *percent < 0 || *percent > 100) {
      return absl::InvalidArgumentError(
          fmt::format("--metric-percentiles: '{}' is not a list of numbers from 0 to 100", text));
    }
    percentiles.push_back(*percent);
  }
  return percentiles;
}

nlohmann::ordered_json ServeReport(const LoadOptions& options, const LoadResult& result,
                                   const std::vector<double>& percentiles) {
  std::int64_t completed = 0;
  std::int64_t input_tokens = 0;
  std::int64_t output_tokens = 0;
  std::vector<double> ttft;
  std::vector<double> tpot;
  std::vector<double> itl;
  std::vector<double> e2el;
  nlohmann::ordered_json errors = nlohmann::ordered_json::array();
  nlohmann::ordered_json output_lens = nlohmann::ordered_json::array();
  for (const LoadedRequest& request : result.requests) {
    errors.push_back(request.error);
    output_lens.push_back(request.output_tokens);
    if (!request.error.empty()) continue;
    ++completed;
    input_tokens += request.prompt_tokens;
    output_tokens += request.output_tokens;
    ttft.push_back(request.first_token_seconds);
    itl.insert(itl.end(), request.inter_token_seconds.begin(), request.inter_token_seconds.end());
    e2el.push_back(request.total_seconds);
    if (request.output_tokens > 1) {
      tpot.push_back((request.total_seconds - request.first_token_seconds) /
                     static_cast<double>(request.output_tokens - 1));
    }
  }
  const double seconds = std::max(result.seconds, 1e-9);
  nlohmann::ordered_json report;
  report["model_id"] = result.model;
  report["num_prompts"] = options.num_prompts;
  report["request_rate"] =
      std::isinf(options.request_rate) ? nlohmann::ordered_json("inf") : nlohmann::ordered_json(options.request_rate);
  report["max_concurrency"] =
      options.max_concurrency > 0 ? nlohmann::ordered_json(options.max_concurrency) : nlohmann::ordered_json();
  report["duration"] = result.seconds;
  report["completed"] = completed;
  report["failed"] = options.num_prompts - completed;
  report["total_input_tokens"] = input_tokens;
  report["total_output_tokens"] = output_tokens;
  report["request_throughput"] = static_cast<double>(completed) / seconds;
  report["output_throughput"] = static_cast<double>(output_tokens) / seconds;
  report["total_token_throughput"] = static_cast<double>(input_tokens + output_tokens) / seconds;
  AddMetric(report, "ttft", ttft, percentiles);
  AddMetric(report, "tpot", tpot, percentiles);
  AddMetric(report, "itl", itl, percentiles);
  AddMetric(report, "e2el", e2el, percentiles);
  report["output_lens"] = std::move(output_lens);
  report["errors"] = std::move(errors);
  return report;
}

std::string ShowServeReport(const nlohmann::ordered_json& report) {
  std::string text;
  for (const auto& [name, value] : report.items()) {
    if (value.is_array()) continue;
    text += fmt::format("{:<26} {}\n", name,
                        value.is_number_float() ? fmt::format("{:.3f}", value.get<double>()) : value.dump());
  }
  return text;
}

absl::Status WriteJson(const std::string& path, const nlohmann::ordered_json& report) {
  std::ofstream file(path, std::ios::trunc);
  file << report.dump(2) << "\n";
  file.close();
  if (file) return absl::OkStatus();
  return absl::UnavailableError(fmt::format("--result-filename: cannot write '{}'", path));
}

}  // namespace spillway
