#include "server/option_values.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <numeric>

#include "absl/strings/ascii.h"

namespace spillway {
namespace {

struct Suffix {
  std::string_view text;
  double factor;
};

constexpr double kKi = 1024;
constexpr std::array<Suffix, 18> kSuffixes = {{{"", 1},
                                               {"B", 1},
                                               {"k", 1e3},
                                               {"m", 1e6},
                                               {"g", 1e9},
                                               {"t", 1e12},
                                               {"kB", 1e3},
                                               {"MB", 1e6},
                                               {"GB", 1e9},
                                               {"TB", 1e12},
                                               {"K", kKi},
                                               {"M", kKi* kKi},
                                               {"G", kKi* kKi* kKi},
                                               {"T", kKi* kKi* kKi* kKi},
                                               {"KiB", kKi},
                                               {"MiB", kKi* kKi},
                                               {"GiB", kKi* kKi* kKi},
                                               {"TiB", kKi* kKi* kKi* kKi}}};

std::size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

}  // namespace

std::optional<double> ParseNumber(std::string_view text) {
  double value = 0;
  if (text.starts_with('+')) text.remove_prefix(1);
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) return std::nullopt;
  return value;
}

std::optional<std::int64_t> ParseSize(std::string_view text) {
  const std::size_t digits = std::min(text.find_first_not_of("+-.0123456789"), text.size());
  const auto suffix = std::ranges::find(kSuffixes, text.substr(digits), &Suffix::text);
  const std::optional<double> number = ParseNumber(text.substr(0, digits));
  if (suffix == kSuffixes.end() || !number) return std::nullopt;
  // A fraction of a unit is cut to whole ones; a fraction without a unit is a mistake.
  const double value = *number * suffix->factor;
  if (suffix->factor == 1 && value != std::floor(value)) return std::nullopt;
  if (std::fabs(value) > 0x1p53) return std::nullopt;
  return static_cast<std::int64_t>(value);
}

std::optional<bool> ParseBool(std::string_view text) {
  const std::string lower = absl::AsciiStrToLower(std::string(text));
  if (lower == "true" || lower == "1" || lower == "yes" || lower == "on") return true;
  if (lower == "false" || lower == "0" || lower == "no" || lower == "off") return false;
  return std::nullopt;
}

std::string ShowSize(std::int64_t bytes) {
  constexpr std::array<std::string_view, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; value >= kKi && unit + 1 < kUnits.size(); ++unit) value /= kKi;
  if (unit == 0) return fmt::format("{} B", bytes);
  return fmt::format("{:.4g} {}", value, kUnits[unit]);
}

std::optional<std::string> NearestName(std::string_view name, const std::vector<std::string>& names) {
  std::optional<std::string> nearest;
  std::size_t least = std::max<std::size_t>(2, name.size() / 3) + 1;
  for (const std::string& candidate : names) {
    // A beginning of the name is nearer than any misspelling.
    const bool begins = name.size() >= 4 && candidate.starts_with(name);
    const std::size_t distance = begins ? 1 : EditDistance(name, candidate);
    if (distance < least) {
      least = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

}  // namespace spillway
