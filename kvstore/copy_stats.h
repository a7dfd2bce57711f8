#pragma once

// What copies between the tiers took, by their size.

#include <array>
#include <cstddef>
#include <cstdint>

namespace spillway {

// Sums since start of the copies of one size.
struct CopyStats {
  std::int64_t copies = 0;
  std::int64_t blocks = 0;
  std::int64_t bytes = 0;
  double seconds = 0;  // in which at least one batch of them was under way
};

// Copy sizes are told apart by powers of two: [2^i, 2^(i+1)) bytes. The size of a batch's copies is their mean.
inline constexpr std::size_t kNumCopySizes = 40;
using CopySizes = std::array<CopyStats, kNumCopySizes>;

// Batches of copies since start, by their blocks: [i] counts those of more than 2^(i - 1) and up to 2^i.
using BatchSizes = std::array<std::int64_t, 20>;

}  // namespace spillway
