#include "server/machine_memory.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace spillway {
namespace {

namespace fs = std::filesystem;

// A file that holds one number; nullopt where it is absent or says "max".
std::optional<std::int64_t> ReadLimit(const fs::path& file) {
  std::ifstream in(file);
  std::int64_t bytes = 0;
  if (!(in >> bytes)) return std::nullopt;
  constexpr std::int64_t kUnlimited = std::int64_t{1} << 60;  // cgroup v1 writes a huge number for none
  return bytes < kUnlimited ? std::optional(bytes) : std::nullopt;
}

void Tighten(std::optional<std::int64_t>& limit, std::optional<std::int64_t> other) {
  if (other) limit = std::min(limit.value_or(*other), *other);
}

// A group's limit and those of the groups around it.
void TightenUpwards(std::optional<std::int64_t>& limit, const fs::path& mount, fs::path group, const char* file) {
  for (group = group.relative_path();; group = group.parent_path()) {
    Tighten(limit, ReadLimit(mount / group / file));
    if (group.empty()) return;
  }
}

std::optional<std::int64_t> CgroupLimit(const fs::path& root) {
  std::optional<std::int64_t> limit;
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // "0::/path", or "9:memory:/path" of version 1
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const fs::path group = line.substr(second + 1);
    if (controllers.empty()) {
      TightenUpwards(limit, root / "sys/fs/cgroup", group, "memory.max");
    } else if (controllers == "memory") {
      TightenUpwards(limit, root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes");
    }
  }
  return limit;
}

}  // namespace

MachineMemory ReadMachineMemory(const std::string& root) {
  const fs::path base = root.empty() ? "/" : root;
  MachineMemory memory;
  std::ifstream info(base / "proc/meminfo");
  for (std::string line; std::getline(info, line);) {
    if (!line.starts_with("MemAvailable:")) continue;
    std::istringstream fields(line.substr(line.find(':') + 1));
    std::int64_t kib = 0;
    if (fields >> kib) memory.available_bytes = kib * 1024;
  }
  memory.cgroup_limit_bytes = CgroupLimit(base);
  return memory;
}

namespace {

std::int64_t BytesForKv(const MachineMemory& memory, std::int64_t weight_bytes) {
  std::int64_t bytes = memory.available_bytes / 4;
  if (memory.cgroup_limit_bytes) {
    const std::int64_t left = *memory.cgroup_limit_bytes - weight_bytes;
    bytes = std::min(bytes, std::max(left - (std::int64_t{2} << 30), left / 4));
  }
  return std::max<std::int64_t>(bytes, 0);
}

}  // namespace

std::int64_t DefaultKvCacheBytes(const MachineMemory& memory, std::int64_t weight_bytes) {
  return BytesForKv(memory, weight_bytes) / 8;
}

std::int64_t DefaultHostTierBytes(const MachineMemory& memory, std::int64_t weight_bytes) {
  return BytesForKv(memory, weight_bytes) - DefaultKvCacheBytes(memory, weight_bytes);
}

}  // namespace spillway
