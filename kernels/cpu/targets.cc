#include "kernels/cpu/targets.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "hwy/highway.h"
#include "kernels/cpu/bf16_tiles.h"

namespace spillway::cpu {

std::string_view NameOf(Target target) {
  switch (target) {
    case Target::kScalar:
      return "scalar";
    case Target::kNeon:
      return "neon";
    case Target::kAvx2:
      return "avx2";
    case Target::kAvx512:
      return "avx512";
    case Target::kAvx512Bf16:
      return "avx512_bf16";
    case Target::kAmx:
      return "amx";
  }
  return "?";
}

bool HasAvx512(Target target) {
  return target == Target::kAvx512 || target == Target::kAvx512Bf16 || target == Target::kAmx;
}

std::vector<Target> SupportedTargets() {
  const auto supported = static_cast<std::int64_t>(hwy::SupportedTargets()) & HWY_TARGETS;
  std::vector<Target> targets;
  if ((HWY_TARGETS & HWY_SCALAR) != 0) targets.push_back(Target::kScalar);
  if ((supported & HWY_NEON) != 0) targets.push_back(Target::kNeon);
  if ((supported & HWY_AVX2) != 0) targets.push_back(Target::kAvx2);
  if ((supported & HWY_AVX3) != 0) {
    targets.push_back(Target::kAvx512);
    if (HasAvx512Bf16()) targets.push_back(Target::kAvx512Bf16);
    if (HasAmx()) targets.push_back(Target::kAmx);
  }
  return targets;
}

absl::StatusOr<Target> ChooseTarget(std::string_view name) {
  const std::vector<Target> supported = SupportedTargets();
  if (name == "auto") return supported.back();
  std::string names = "auto, reference";
  for (const Target target : supported) {
    if (NameOf(target) == name) return target;
    absl::StrAppend(&names, ", ", std::string(NameOf(target)));
  }
  return absl::InvalidArgumentError(
      absl::StrCat("cpu device: target '", std::string(name), "' is not available here; available: ", names));
}

}  // namespace spillway::cpu
