#include "engine/hardware.h"

#include <algorithm>

#include "kernels/kv_layout.h"

namespace spillway {
namespace {

constexpr double kGiga = 1e9;
constexpr double kTera = 1e12;

std::vector<Hardware> MakeHardware() {
  return {
      {.name = "a100",
       .label = "A100 80GB SXM, PCIe 4.0 x16",
       .flops_per_second = 312 * kTera,
       .memory_bytes = 80 * kGiga,
       .memory_bytes_per_second = 2039 * kGiga,
       .link_bytes_per_second = 25 * kGiga,
       .host_bytes = 128 * kGiga},
      {.name = "h100",
       .label = "H100 80GB SXM, PCIe 5.0 x16",
       .flops_per_second = 989 * kTera,
       .memory_bytes = 80 * kGiga,
       .memory_bytes_per_second = 3350 * kGiga,
       .link_bytes_per_second = 50 * kGiga,
       .host_bytes = 192 * kGiga},
      {.name = "h200",
       .label = "H200 141GB SXM, PCIe 5.0 x16",
       .flops_per_second = 989 * kTera,
       .memory_bytes = 141 * kGiga,
       .memory_bytes_per_second = 4800 * kGiga,
       .link_bytes_per_second = 50 * kGiga,
       .host_bytes = 192 * kGiga},
      {.name = "b200",
       .label = "B200 192GB SXM, PCIe 5.0 x16",
       .flops_per_second = 2250 * kTera,
       .memory_bytes = 192 * kGiga,
       .memory_bytes_per_second = 8000 * kGiga,
       .link_bytes_per_second = 50 * kGiga,
       .host_bytes = 256 * kGiga},
      {.name = "gh200",
       .label = "GH200 96GB, NVLink-C2C",
       .flops_per_second = 989 * kTera,
       .memory_bytes = 96 * kGiga,
       .memory_bytes_per_second = 4000 * kGiga,
       .link_bytes_per_second = 400 * kGiga,
       .host_bytes = 400 * kGiga},
      {.name = "4x8xh100",
       .label = "4 nodes of 8 x H100 80GB SXM, PCIe 5.0 x16",
       .accelerators = 8,
       .replicas = 4,
       .flops_per_second = 989 * kTera,
       .memory_bytes = 80 * kGiga,
       .memory_bytes_per_second = 3350 * kGiga,
       .link_bytes_per_second = 50 * kGiga,
       .host_bytes = 1536 * kGiga,
       .host_link_bytes_per_second = 300 * kGiga},
  };
}

}  // namespace

const std::vector<Hardware>& KnownHardware() {
  static const auto* const hardware = new std::vector<Hardware>(MakeHardware());
  return *hardware;
}

std::optional<Hardware> FindHardware(std::string_view name) {
  const auto found = std::ranges::find(KnownHardware(), name, &Hardware::name);
  if (found == KnownHardware().end()) return std::nullopt;
  return *found;
}

double LinkBytesPerSecond(const Hardware& hardware) {
  const double sum = hardware.accelerators * hardware.link_bytes_per_second;
  return hardware.host_link_bytes_per_second > 0 ? std::min(sum, hardware.host_link_bytes_per_second) : sum;
}

double DeviceTokens(const Hardware& hardware, const ModelCosts& costs) {
  const double room = hardware.accelerators * hardware.memory_bytes * hardware.memory_share - costs.weight_bytes;
  return std::max(0.0, room / costs.kv_bytes_per_token);
}

double HostTokens(const Hardware& hardware, const ModelCosts& costs) {
  return hardware.host_bytes / costs.kv_bytes_per_token;
}

CostModel CostModelOf(const Hardware& hardware, const ModelCosts& costs) {
  const double flops = hardware.accelerators * hardware.flops_per_second * hardware.compute_efficiency;
  const double memory = hardware.accelerators * hardware.memory_bytes_per_second * hardware.memory_efficiency;
  const double copy_bytes = kBlockTokens * costs.kv_bytes_per_token;
  LinkSpeed link;
  const double link_bytes_per_second = LinkBytesPerSecond(hardware);
  if (link_bytes_per_second > 0) link.Measure(copy_bytes, copy_bytes, copy_bytes / link_bytes_per_second, 1);
  return {costs,
          {.linear_flops_per_second = flops,
           .attention_flops_per_second = flops,
           .kv_bytes_per_second = memory,
           .step_floor_seconds = costs.weight_bytes / memory + hardware.step_overhead_seconds},
          link,
          copy_bytes};
}

}  // namespace spillway
