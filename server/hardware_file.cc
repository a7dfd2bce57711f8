#include "server/hardware_file.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <yaml-cpp/yaml.h>

#include <array>
#include <filesystem>
#include <optional>
#include <string_view>
#include <vector>

#include "kernels/status_macros.h"
#include "server/option_values.h"

namespace spillway {
namespace {

struct Field {
  std::string_view name;
  double Hardware::*value;
  double least;
  double most;
};

constexpr double kMuch = 1e18;
constexpr std::array<Field, 12> kFields = {{
    {"accelerators", &Hardware::accelerators, 1, 4096},
    {"replicas", &Hardware::replicas, 1, 4096},
    {"flops_per_second", &Hardware::flops_per_second, 1e6, kMuch},
    {"memory_bytes", &Hardware::memory_bytes, 1e6, kMuch},
    {"memory_bytes_per_second", &Hardware::memory_bytes_per_second, 1e6, kMuch},
    {"link_bytes_per_second", &Hardware::link_bytes_per_second, 1e3, kMuch},
    {"host_bytes", &Hardware::host_bytes, 0, kMuch},
    {"compute_efficiency", &Hardware::compute_efficiency, 0.001, 1},
    {"memory_efficiency", &Hardware::memory_efficiency, 0.001, 1},
    {"memory_share", &Hardware::memory_share, 0.001, 1},
    {"step_overhead_seconds", &Hardware::step_overhead_seconds, 0, 10},
    {"host_link_bytes_per_second", &Hardware::host_link_bytes_per_second, 0, kMuch},
}};

template <typename... Values>
absl::Status Invalid(fmt::format_string<Values...> text, Values&&... values) {
  return absl::InvalidArgumentError(fmt::format(text, std::forward<Values>(values)...));
}

std::vector<std::string_view> KnownNames() {
  std::vector<std::string_view> names;
  for (const Hardware& known : KnownHardware()) names.push_back(known.name);
  return names;
}

absl::Status SetField(const std::string& path, const std::string& key, const std::string& text, Hardware& hardware) {
  if (key == "name" || key == "label") {
    (key == "name" ? hardware.name : hardware.label) = text;
    return absl::OkStatus();
  }
  std::vector<std::string_view> names = {"based_on", "name", "label"};
  for (const Field& field : kFields) {
    if (field.name != key) {
      names.push_back(field.name);
      continue;
    }
    const std::optional<double> value = ParseNumber(text);
    if (!value || *value < field.least || *value > field.most) {
      return Invalid("--hardware: {}: {}: '{}' is not a number from {:g} to {:g}", path, key, text, field.least,
                     field.most);
    }
    hardware.*field.value = *value;
    return absl::OkStatus();
  }
  return Invalid("--hardware: {}: no such key '{}'; keys are {}", path, key, fmt::join(names, ", "));
}

absl::StatusOr<Hardware> ReadFile(const std::string& path) {
  YAML::Node root;
  try {
    root = YAML::LoadFile(path);
  } catch (const YAML::Exception& error) {
    return Invalid("--hardware: {}: {}", path, error.what());
  }
  if (!root.IsMap()) return Invalid("--hardware: {}: not a map of keys and values", path);
  Hardware hardware;
  if (const YAML::Node base = root["based_on"]) {
    const std::string name = base.IsScalar() ? base.Scalar() : "";
    const std::optional<Hardware> known = FindHardware(name);
    if (!known) {
      return Invalid("--hardware: {}: based_on: '{}' is not one of {}", path, name, fmt::join(KnownNames(), ", "));
    }
    hardware = *known;
    hardware.label = path;
  }
  hardware.name = std::filesystem::path(path).stem().string();
  for (const auto& entry : root) {
    if (!entry.first.IsScalar() || !entry.second.IsScalar()) {
      return Invalid("--hardware: {}: wanted plain keys and values", path);
    }
    if (entry.first.Scalar() == "based_on") continue;
    RETURN_IF_ERROR(SetField(path, entry.first.Scalar(), entry.second.Scalar(), hardware));
  }
  if (hardware.flops_per_second == 0 || hardware.memory_bytes == 0 || hardware.memory_bytes_per_second == 0) {
    return Invalid("--hardware: {}: flops_per_second, memory_bytes and memory_bytes_per_second are needed", path);
  }
  return hardware;
}

}  // namespace

absl::StatusOr<Hardware> ReadHardware(const std::string& name_or_path) {
  if (const std::optional<Hardware> known = FindHardware(name_or_path)) return *known;
  std::error_code error;
  if (std::filesystem::is_regular_file(name_or_path, error)) return ReadFile(name_or_path);
  return Invalid("--hardware: '{}' is neither a file nor one of {}", name_or_path, fmt::join(KnownNames(), ", "));
}

}  // namespace spillway
