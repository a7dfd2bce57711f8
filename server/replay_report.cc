#include "server/replay_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string_view>

#include "server/bench_report.h"
#include "server/option_values.h"

namespace spillway {
namespace {

using nlohmann::ordered_json;

// Of a request that generated more than one token.
std::optional<double> SecondsPerToken(const ReplayedRequest& request) {
  if (request.output_tokens < 2) return std::nullopt;
  return (request.finished - request.first_token) / (request.output_tokens - 1);
}

bool Meets(const ReplayedRequest& request, const Slo& slo) {
  const auto within = [](double seconds, double most_ms) { return most_ms == 0 || 1000 * seconds <= most_ms; };
  return within(request.first_token - request.arrived, slo.ttft_ms) &&
         within(SecondsPerToken(request).value_or(0), slo.tpot_ms) &&
         within(request.finished - request.arrived, slo.e2el_ms);
}

void AddTimes(ordered_json& report, std::string_view name, std::vector<double> ms,
              const std::vector<double>& percentiles) {
  std::ranges::sort(ms);
  double sum = 0;
  for (const double value : ms) sum += value;
  report[fmt::format("mean_{}_ms", name)] = ms.empty() ? 0 : sum / static_cast<double>(ms.size());
  report[fmt::format("median_{}_ms", name)] = PercentileOfSorted(ms, 50);
  for (const double percent : percentiles) {
    report[fmt::format("p{:g}_{}_ms", percent, name)] = PercentileOfSorted(ms, percent);
  }
}

struct Totals {
  std::int64_t completed = 0;
  std::int64_t refused = 0;
  std::int64_t good = 0;
  std::int64_t prompt = 0;
  std::int64_t output = 0;
  std::int64_t device_hits = 0;
  std::int64_t host_hits = 0;
  std::vector<double> ttft_ms;
  std::vector<double> tpot_ms;
  std::vector<double> e2el_ms;
};

Totals Sum(const ReplayResult& result, const Slo& slo) {
  Totals totals;
  for (const ReplayedRequest& request : result.requests) {
    if (request.is_refused) {
      ++totals.refused;
      continue;
    }
    ++totals.completed;
    totals.good += Meets(request, slo) ? 1 : 0;
    totals.prompt += request.prompt_tokens;
    totals.output += request.output_tokens;
    totals.device_hits += request.cached_tokens - request.cached_below_tokens;
    totals.host_hits += request.cached_below_tokens;
    totals.ttft_ms.push_back(1000 * (request.first_token - request.arrived));
    totals.e2el_ms.push_back(1000 * (request.finished - request.arrived));
    if (const auto tpot = SecondsPerToken(request)) totals.tpot_ms.push_back(1000 * *tpot);
  }
  return totals;
}

std::string Escaped(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '<') {
      escaped += "&lt;";
    } else if (c == '&') {
      escaped += "&amp;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

// Share of requests (up) by TTFT (right, logarithmic), one line per policy.
std::string TtftCurve(const std::vector<std::pair<std::string, ReplayResult>>& results) {
  constexpr double kWidth = 640;
  constexpr double kHeight = 280;
  constexpr double kLeastMs = 10;
  constexpr double kDecades = 5;
  constexpr std::array<std::string_view, 4> kColors = {"#1b6ca8", "#c8553d", "#588157", "#6d597a"};
  std::string svg =
      fmt::format(R"(<svg viewBox="-50 -10 {} {}" width="{}">)", kWidth + 110, kHeight + 50, kWidth + 110);
  for (int decade = 0; decade <= static_cast<int>(kDecades); ++decade) {
    const double x = decade / kDecades * kWidth;
    svg +=
        fmt::format(R"(<path d="M{0} 0V{1}" stroke="#ddd"/><text x="{0}" y="{2}" text-anchor="middle">{3:g} s</text>)",
                    x, kHeight, kHeight + 20, kLeastMs / 1000 * std::pow(10, decade));
  }
  for (const int percent : {0, 50, 95, 100}) {
    svg += fmt::format(R"(<text x="-6" y="{}" text-anchor="end">{}%</text>)", kHeight * (1 - percent / 100.0) + 4,
                       percent);
  }
  for (std::size_t i = 0; i < results.size(); ++i) {
    std::vector<double> ms = Sum(results[i].second, {}).ttft_ms;
    std::ranges::sort(ms);
    svg += fmt::format(R"(<polyline fill="none" stroke="{}" stroke-width="2" points=")", kColors[i % kColors.size()]);
    for (int percent = 0; percent <= 100; ++percent) {
      const double decades = std::log10(std::max(kLeastMs, PercentileOfSorted(ms, percent)) / kLeastMs);
      svg += fmt::format("{:.1f},{:.1f} ", std::min(1.0, decades / kDecades) * kWidth, kHeight * (1 - percent / 100.0));
    }
    svg += fmt::format(R"("/><text x="8" y="{}" fill="{}">{}</text>)", 16 + 16 * i, kColors[i % kColors.size()],
                       Escaped(results[i].first));
  }
  return svg + "</svg>";
}

std::string ShowValue(const ordered_json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) return fmt::format("{:.3f}", value.get<double>());
  return value.dump();
}

}  // namespace

absl::StatusOr<Slo> ParseSlo(const std::vector<std::string>& texts) {
  Slo slo;
  for (const std::string& text : texts) {
    const std::size_t colon = text.find(':');
    const std::string key = text.substr(0, colon);
    const double ms = colon == std::string::npos ? 0 : ParseNumber(text.substr(colon + 1)).value_or(0);
    double* const target = key == "ttft"   ? &slo.ttft_ms
                           : key == "tpot" ? &slo.tpot_ms
                           : key == "e2el" ? &slo.e2el_ms
                                           : nullptr;
    if (target == nullptr || ms <= 0) {
      return absl::InvalidArgumentError(
          fmt::format("--goodput: '{}' is not ttft:MS, tpot:MS or e2el:MS with a positive number", text));
    }
    *target = ms;
  }
  return slo;
}

ordered_json ReplayReport(const std::string& policy, const ReplayResult& result, const Slo& slo, std::int32_t replicas,
                          const std::vector<double>& percentiles) {
  const Totals totals = Sum(result, slo);
  const double seconds = std::max(result.seconds, 1e-9);
  const double engine_seconds = seconds * replicas;
  ordered_json report = {{"policy", policy},
                         {"source", "modelled"},
                         {"duration", result.seconds},
                         {"completed", totals.completed},
                         {"refused", totals.refused},
                         {"overloaded", result.is_overloaded},
                         {"total_input_tokens", totals.prompt},
                         {"total_output_tokens", totals.output},
                         {"request_throughput", static_cast<double>(totals.completed) / seconds},
                         {"output_throughput", static_cast<double>(totals.output) / seconds},
                         {"total_token_throughput", static_cast<double>(totals.prompt + totals.output) / seconds},
                         {"device_hit_tokens", totals.device_hits},
                         {"host_hit_tokens", totals.host_hits},
                         {"compute_utilisation", result.compute_seconds / engine_seconds},
                         {"link_utilisation", result.restore_seconds / engine_seconds},
                         {"store_utilisation", result.store_seconds / engine_seconds},
                         {"steps", result.num_steps},
                         {"preempted", result.num_preempted}};
  if (result.is_overloaded) return report;
  if (slo.ttft_ms > 0 || slo.tpot_ms > 0 || slo.e2el_ms > 0) {
    report["request_goodput"] = static_cast<double>(totals.good) / seconds;
    report["good_share"] =
        static_cast<double>(totals.good) / static_cast<double>(std::max<std::int64_t>(1, totals.completed));
  }
  AddTimes(report, "ttft", totals.ttft_ms, percentiles);
  AddTimes(report, "tpot", totals.tpot_ms, percentiles);
  std::vector<double> itl_ms;
  itl_ms.reserve(result.inter_token_seconds.size());
  for (const float each : result.inter_token_seconds) itl_ms.push_back(1000.0 * each);
  AddTimes(report, "itl", std::move(itl_ms), percentiles);
  AddTimes(report, "e2el", totals.e2el_ms, percentiles);
  return report;
}

std::string ShowReplay(const ordered_json& report) {
  std::string text = "Every number here is modelled.\n";
  for (const auto& [name, value] : report.items()) {
    if (name != "policies") text += fmt::format("{:<26} {}\n", name, ShowValue(value));
  }
  std::vector<std::string> names;
  for (const ordered_json& policy : report["policies"]) {
    for (const auto& [name, value] : policy.items()) {
      if (std::ranges::find(names, name) == names.end()) names.push_back(name);
    }
  }
  for (const std::string& name : names) {
    text += fmt::format("{:<26}", name);
    for (const ordered_json& policy : report["policies"]) {
      text += fmt::format(" {:>16}", policy.contains(name) ? ShowValue(policy[name]) : "overloaded");
    }
    text += "\n";
  }
  return text;
}

std::string ReplayCsv(const std::vector<std::pair<std::string, ReplayResult>>& results) {
  std::string text =
      "source,policy,replica,arrived,first_token,finished,prompt_tokens,output_tokens,cached_tokens,"
      "cached_below_tokens,refused\n";
  for (const auto& [policy, result] : results) {
    for (const ReplayedRequest& request : result.requests) {
      text +=
          fmt::format("modelled,{},{},{:.6f},{:.6f},{:.6f},{},{},{},{},{}\n", policy, request.replica, request.arrived,
                      request.first_token, request.finished, request.prompt_tokens, request.output_tokens,
                      request.cached_tokens, request.cached_below_tokens, request.is_refused ? 1 : 0);
    }
  }
  return text;
}

std::string ReplayPage(const ordered_json& report, const std::vector<std::pair<std::string, ReplayResult>>& results) {
  return fmt::format(
      "<!doctype html><meta charset=\"utf-8\"><title>Spillway replay (modelled)</title>"
      "<style>body{{font:14px sans-serif;margin:2em}}text{{font:12px sans-serif}}</style>"
      "<h1>Replay: modelled, not measured</h1><p>Time to first token: share of requests</p>{}<pre>{}</pre>\n",
      TtftCurve(results), Escaped(ShowReplay(report)));
}

}  // namespace spillway
