#pragma once

// SchedulingPolicy: the order in which waiting sequences are admitted, and which runner gives way. Data for the one
// Scheduler.

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace spillway {

enum class SchedulingPolicy : std::uint8_t {
  kFcfs,      // in order of arrival
  kPriority,  // the lowest number first, ties in order of arrival; the highest number gives way first
};

inline constexpr std::array<std::string_view, 2> kSchedulingPolicyNames = {"fcfs", "priority"};

inline std::string_view NameOf(SchedulingPolicy policy) {
  return kSchedulingPolicyNames[static_cast<std::size_t>(policy)];
}
inline std::optional<SchedulingPolicy> SchedulingPolicyNamed(std::string_view name) {
  for (std::size_t i = 0; i < kSchedulingPolicyNames.size(); ++i) {
    if (kSchedulingPolicyNames[i] == name) return static_cast<SchedulingPolicy>(i);
  }
  return std::nullopt;
}

}  // namespace spillway
