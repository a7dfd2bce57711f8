#pragma once

// SchedulingPolicy: the order in which waiting sequences are admitted, and which runner gives way. Data for the one
// Scheduler, as is LoadChoice.

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace spillway {

enum class SchedulingPolicy : std::uint8_t {
  kFcfs,      // in order of arrival
  kPriority,  // the lowest number first, ties in order of arrival; the highest number gives way first
  kKappa,     // in order of arrival within each resource: what is to load waits for the link, the rest for compute
};

inline constexpr std::array<std::string_view, 3> kSchedulingPolicyNames = {"fcfs", "priority", "kappa"};

// How what lower tiers have of a prefix comes to the device. Auto: the fastest of the three by the cost model; without
// one, load.
enum class LoadChoice : std::uint8_t { kAuto, kLoad, kRecompute, kSplit };

// Whether the tail of a load comes up layer by layer inside the step that computes what follows it (LayerLoader).
// Hidden: so much of it as that step's compute hides, by the cost model, where no other load is under way. Always: all
// that the host tier has; tests.
enum class LayerLoads : std::uint8_t { kNever, kHidden, kAlways };

inline constexpr std::array<std::string_view, 4> kLoadChoiceNames = {"auto", "load", "recompute", "split"};

inline std::string_view NameOf(SchedulingPolicy policy) {
  return kSchedulingPolicyNames[static_cast<std::size_t>(policy)];
}
inline std::optional<SchedulingPolicy> SchedulingPolicyNamed(std::string_view name) {
  for (std::size_t i = 0; i < kSchedulingPolicyNames.size(); ++i) {
    if (kSchedulingPolicyNames[i] == name) return static_cast<SchedulingPolicy>(i);
  }
  return std::nullopt;
}
inline std::optional<LoadChoice> LoadChoiceNamed(std::string_view name) {
  for (std::size_t i = 0; i < kLoadChoiceNames.size(); ++i) {
    if (kLoadChoiceNames[i] == name) return static_cast<LoadChoice>(i);
  }
  return std::nullopt;
}

}  // namespace spillway
