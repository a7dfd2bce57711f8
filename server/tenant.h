#pragma once

// The tenant of a request: whose share of the link its loads count against, and whose cache entries it may share under
// --cache-salt-by-tenant.

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace spillway {

// Set by gateways, in HTTP headers and gRPC metadata; the first that is there counts.
inline constexpr std::array<const char*, 2> kFairnessHeaders = {"x-gateway-inference-fairness-id",
                                                                "x-llm-d-inference-fairness-id"};
inline constexpr std::size_t kMaxTenantBytes = 256;

// The header's value, else "key-N" for the Nth key of --api-key, else "default".
inline std::string TenantOf(const std::string& fairness_id, std::optional<std::size_t> key) {
  if (!fairness_id.empty()) return fairness_id;
  return key ? absl::StrCat("key-", *key + 1) : "default";
}

}  // namespace spillway
