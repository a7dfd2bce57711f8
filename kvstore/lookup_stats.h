#pragma once

// What looking prefixes up in the tiers took.

#include <array>
#include <cstdint>

namespace spillway {

// Sums since start. by_microseconds[i]: lookups that took less than 2^i microseconds, and not less than 2^(i - 1); the
// last: and all longer ones.
struct LookupStats {
  std::int64_t count = 0;
  double seconds = 0;
  std::array<std::int64_t, 24> by_microseconds{};
};

}  // namespace spillway
