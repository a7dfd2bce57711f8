#pragma once

// Copies of the cpu device's streams.

#include <cstddef>

namespace spillway::cpu {

// memcpy; large spans are written past the caches, since what is moved between tiers is larger than these and would
// only be read into them to be overwritten.
void CopySpan(std::byte* to, const std::byte* from, std::size_t size_bytes);

}  // namespace spillway::cpu
