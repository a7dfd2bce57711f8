#pragma once

// How much memory this process may use, and how much of it the KV cache takes where the user does not say.

#include <cstdint>
#include <optional>
#include <string>

namespace spillway {

struct MachineMemory {
  std::int64_t available_bytes = 0;                               // MemAvailable
  std::optional<std::int64_t> cgroup_limit_bytes = std::nullopt;  // the tightest limit of the process's groups
};

// `root` is prefixed to /proc and /sys.
MachineMemory ReadMachineMemory(const std::string& root = "");

// An eighth of min(25 % of available memory, cgroup limit less weights and 2 GiB); never negative. The rest of that
// minimum is the host tier's. Where a cgroup leaves little beside the weights, it is a quarter of that which counts.
std::int64_t DefaultKvCacheBytes(const MachineMemory& memory, std::int64_t weight_bytes);
std::int64_t DefaultHostTierBytes(const MachineMemory& memory, std::int64_t weight_bytes);

}  // namespace spillway
