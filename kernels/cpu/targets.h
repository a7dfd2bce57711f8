#pragma once

// The SIMD targets that the bodies are compiled for. A device picks its tables of bodies once, by target; nothing here
// is process-global, so devices of different targets live side by side.

#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace spillway::cpu {

// kAvx512Bf16 and kAmx are kAvx512 with attention of their own over bf16 (attention_bf16.cc).
enum class Target : std::uint8_t { kScalar, kNeon, kAvx2, kAvx512, kAvx512Bf16, kAmx };

std::string_view NameOf(Target target);

// kAvx512 or wider: what oneDNN's invariance was found for.
bool HasAvx512(Target target);

// Those compiled in that this machine can run, the best one last.
std::vector<Target> SupportedTargets();

// "auto" is the best one. INVALID_ARGUMENT lists those supported.
absl::StatusOr<Target> ChooseTarget(std::string_view name);

}  // namespace spillway::cpu
