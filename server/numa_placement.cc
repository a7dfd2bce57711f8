#include "server/numa_placement.h"

#include <fmt/format.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"

namespace spillway {
namespace {

namespace fs = std::filesystem;

// As in linux/mempolicy.h.
constexpr int kPreferred = 1;
constexpr int kInterleave = 3;
constexpr int kMaxNodes = 1024;

// "0-3,8": the numbers. Empty where the file is absent or is not such a list.
std::vector<int> ReadList(const fs::path& file) {
  std::ifstream in(file);
  std::string text;
  std::getline(in, text);
  std::vector<int> numbers;
  const std::vector<std::string> parts = absl::StrSplit(text, ',');
  for (const std::string& part : parts) {
    const std::vector<std::string> ends = absl::StrSplit(part, '-');
    int first = 0;
    int last = 0;
    if (!absl::SimpleAtoi(ends.front(), &first) || !absl::SimpleAtoi(ends.back(), &last)) return {};
    for (int number = first; number <= last; ++number) numbers.push_back(number);
  }
  return numbers;
}

std::vector<int> CoresOfThisProcess() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

}  // namespace

std::vector<int> LocalNodes(const std::vector<int>& cores, const std::string& root) {
  const fs::path nodes = fs::path(root.empty() ? "/" : root) / "sys/devices/system/node";
  std::vector<int> local;
  for (const int node : ReadList(nodes / "has_memory")) {
    if (node >= kMaxNodes) continue;
    const std::vector<int> of_node = ReadList(nodes / fmt::format("node{}", node) / "cpulist");
    const bool is_local = std::ranges::any_of(of_node, [&](int core) { return std::ranges::count(cores, core) > 0; });
    if (is_local) local.push_back(node);
  }
  if (local.empty()) local.push_back(0);
  return local;
}

absl::StatusOr<std::string> PlaceOnLocalNodes(std::byte* begin, std::size_t size_bytes, const std::string& root) {
  const fs::path nodes = fs::path(root.empty() ? "/" : root) / "sys/devices/system/node";
  if (ReadList(nodes / "has_memory").size() <= 1) return "one node";
  const std::vector<int> local = LocalNodes(CoresOfThisProcess(), root);
  constexpr std::size_t kBits = 8 * sizeof(unsigned long);
  unsigned long mask[kMaxNodes / kBits] = {};
  for (const int node : local)
    mask[static_cast<std::size_t>(node) / kBits] |= 1UL << static_cast<std::size_t>(node) % kBits;
  const int policy = local.size() == 1 ? kPreferred : kInterleave;
  const std::string names = fmt::format("{}", fmt::join(local, ","));
  if (syscall(SYS_mbind, begin, size_bytes, policy, mask, kMaxNodes, 0) != 0) {
    return absl::FailedPreconditionError(
        fmt::format("mbind to nodes {} of {} bytes: {}", names, size_bytes, std::strerror(errno)));
  }
  return policy == kPreferred ? fmt::format("node {}", names) : fmt::format("interleaved over nodes {}", names);
}

}  // namespace spillway
