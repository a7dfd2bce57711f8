#pragma once

// Copies of the cpu device's streams.

#include <cstddef>
#include <span>

namespace spillway::cpu {

// memcpy; large spans are written past the caches, since what is moved between tiers is larger than these and would
// only be read into them to be overwritten.
void CopySpan(std::byte* to, const std::byte* from, std::size_t size_bytes);

// from[i][offset, offset + size_bytes) to `to` + i * size_bytes. Written into the caches: it is read again soon.
void GatherSpans(std::byte* to, std::span<const std::byte* const> from, std::size_t offset, std::size_t size_bytes);

}  // namespace spillway::cpu
