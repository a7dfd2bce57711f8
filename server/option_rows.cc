#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "absl/strings/ascii.h"
#include "absl/strings/str_replace.h"
#include "server/option_table.h"
#include "server/option_values.h"

// Text <-> value of one row of the option table.

namespace spillway {
namespace {

absl::Status Bad(std::string_view source, std::string_view value, std::string_view problem) {
  return absl::InvalidArgumentError(fmt::format("{}: '{}' {}", source, value, problem));
}

std::string ShowNumber(double value) {
  if (std::isinf(value)) return "inf";
  if (value == std::floor(value) && std::fabs(value) < 0x1p53)
    return fmt::format("{}", static_cast<std::int64_t>(value));
  return fmt::format("{:g}", value);
}

std::string ShowLimit(const OptionRow& row, double value) {
  return row.kind == ValueKind::kBytes ? ShowSize(static_cast<std::int64_t>(value)) : ShowNumber(value);
}

bool IsNumeric(const OptionRow& row) {
  return row.kind == ValueKind::kCount || row.kind == ValueKind::kBytes || row.kind == ValueKind::kSeconds ||
         row.kind == ValueKind::kNumber;
}

absl::StatusOr<double> NumberOf(const OptionRow& row, const std::string& text, std::string_view source) {
  if (row.special && text == row.special->text) return row.special->value;
  std::optional<double> number;
  if (row.kind == ValueKind::kCount || row.kind == ValueKind::kBytes) {
    const std::optional<double> bare = row.bare_unit != 1 ? ParseNumber(text) : std::nullopt;
    if (bare) {
      number = std::floor(*bare * row.bare_unit);
    } else if (const auto size = ParseSize(text)) {
      number = static_cast<double>(*size);
    }
  } else {
    number = ParseNumber(text);
  }
  if (!number) {
    const bool is_whole = row.kind == ValueKind::kCount || row.kind == ValueKind::kBytes;
    return Bad(source, text, fmt::format("is not a {}number ({})", is_whole ? "whole " : "", DescribeRange(row)));
  }
  if (*number < row.least || *number > row.most) {
    return Bad(source, text, fmt::format("is out of range ({})", DescribeRange(row)));
  }
  return *number;
}

absl::Status CheckText(const OptionRow& row, const std::string& text, std::string_view source) {
  if (row.choices.empty() || std::ranges::find(row.choices, text) != row.choices.end()) return absl::OkStatus();
  return Bad(source, text, fmt::format("is not one of {}", fmt::join(row.choices, ", ")));
}

}  // namespace

std::string VariableName(const OptionRow& row) {
  return "SPILLWAY_" + absl::StrReplaceAll(absl::AsciiStrToUpper(std::string(row.name)), {{"-", "_"}});
}

absl::Status AssignOption(const OptionRow& row, const std::vector<std::string>& values, std::string_view source,
                          Options& options) {
  if (values.empty()) return absl::InvalidArgumentError(fmt::format("{}: a value is missing", source));
  const std::string& text = values.back();
  return std::visit(
      [&](auto target) -> absl::Status {
        auto& value = target(options);
        using Value = std::remove_reference_t<decltype(value)>;
        if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
          for (const std::string& each : values) {
            if (each.empty()) return absl::InvalidArgumentError(fmt::format("{}: an empty value", source));
          }
          value = values;
        } else if constexpr (std::is_same_v<Value, std::string>) {
          if (const absl::Status status = CheckText(row, text, source); !status.ok()) return status;
          value = text;
        } else if constexpr (std::is_same_v<Value, bool> || std::is_same_v<Value, std::optional<bool>>) {
          const std::optional<bool> parsed = ParseBool(text);
          if (!parsed) return Bad(source, text, "is neither true nor false");
          value = *parsed;
        } else {
          const absl::StatusOr<double> number = NumberOf(row, text, source);
          if (!number.ok()) return number.status();
          if constexpr (std::is_same_v<Value, double> || std::is_same_v<Value, std::optional<double>>) {
            value = *number;
          } else {
            value = static_cast<std::int64_t>(*number);
          }
        }
        return absl::OkStatus();
      },
      row.target);
}

std::string ShowOption(const OptionRow& row, const Options& options) {
  Options copy = options;
  return std::visit(
      [&](auto target) -> std::string {
        const auto& value = target(copy);
        using Value = std::remove_cvref_t<decltype(value)>;
        if constexpr (std::is_same_v<Value, std::vector<std::string>>) {
          return fmt::format("{}", fmt::join(value, ","));
        } else if constexpr (std::is_same_v<Value, std::string>) {
          return value;
        } else if constexpr (std::is_same_v<Value, bool>) {
          return value ? "true" : "false";
        } else if constexpr (std::is_same_v<Value, std::optional<bool>>) {
          if (!value) return "unset";
          return *value ? "true" : "false";
        } else if constexpr (std::is_same_v<Value, std::optional<double>> ||
                             std::is_same_v<Value, std::optional<std::int64_t>>) {
          return value ? ShowNumber(static_cast<double>(*value)) : "unset";
        } else {
          const auto number = static_cast<double>(value);
          if (row.special && number == row.special->value) return std::string(row.special->text);
          return ShowLimit(row, number);
        }
      },
      row.target);
}

std::string DescribeRange(const OptionRow& row) {
  if (!row.choices.empty()) return fmt::format("{}", fmt::join(row.choices, ", "));
  if (!IsNumeric(row)) return "";
  std::string text = row.least == row.most
                         ? ShowLimit(row, row.least)
                         : fmt::format("{} to {}", ShowLimit(row, row.least), ShowLimit(row, row.most));
  if (row.kind != ValueKind::kBytes && !row.unit.empty()) text += fmt::format(" {}", row.unit);
  if (row.special) text += fmt::format(", or {}", row.special->text);
  return text;
}

}  // namespace spillway
