#pragma once

// The option table: one row per option of Spillway, and one per `vllm serve` flag that Spillway refuses.

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "server/options.h"

namespace spillway {

enum class ValueKind : std::uint8_t { kFlag, kCount, kBytes, kSeconds, kNumber, kText, kTextList };

using OptionTarget =
    std::variant<bool& (*)(Options&), std::int64_t& (*)(Options&), double& (*)(Options&), std::string& (*)(Options&),
                 std::optional<bool>& (*)(Options&), std::optional<std::int64_t>& (*)(Options&),
                 std::optional<double>& (*)(Options&), std::vector<std::string>& (*)(Options&)>;

// Values that a range does not hold but that mean something: "auto" for 0, say.
struct SpecialValue {
  std::string_view text;
  double value = 0;
};

struct OptionRow {
  std::string_view name;        // without dashes; also the YAML key and, in capitals after SPILLWAY_, the variable
  std::string_view alias = {};  // another spelling, without dashes; may be empty, may be one letter
  unsigned commands = 0;        // bits of Command
  ValueKind kind = ValueKind::kText;
  OptionTarget target = {};
  std::string_view unit = {};
  double bare_unit = 1;  // kBytes: what a number without a suffix counts in
  double least = std::numeric_limits<double>::lowest();
  double most = std::numeric_limits<double>::max();
  std::vector<std::string_view> choices = {};          // kText: nothing else is accepted
  std::optional<SpecialValue> special = std::nullopt;  // accepted beside the range
  std::string_view group = {};
  std::string_view help = {};
  std::string_view default_note = {};  // where the default value alone says too little
  std::string_view vllm = {};          // vLLM's flag (with dashes) or variable; empty: Spillway's own
  std::string_view environment = {};   // a variable read beside SPILLWAY_<NAME>, after it
  bool is_secret = false;
};

struct RefusedFlag {
  std::string_view name;  // vLLM's, without dashes
  std::string_view reason;
};

std::span<const OptionRow> OptionTable();
std::span<const RefusedFlag> RefusedFlags();  // option_refusals.cc

inline bool Takes(const OptionRow& row, Command command) {
  return (row.commands & static_cast<unsigned>(command)) != 0;
}

// "SPILLWAY_MAX_NUM_SEQS".
std::string VariableName(const OptionRow& row);

// Sets the row's value. `source` names where it comes from in errors: "--max-num-seqs", "SPILLWAY_MAX_NUM_SEQS", ...
absl::Status AssignOption(const OptionRow& row, const std::vector<std::string>& values, std::string_view source,
                          Options& options);
std::string ShowOption(const OptionRow& row, const Options& options);  // "" for an empty text, "unset" for none
// "1 to 65536 tokens", "auto, cpu or cuda"; empty where anything goes.
std::string DescribeRange(const OptionRow& row);

}  // namespace spillway
