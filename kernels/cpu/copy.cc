#include "kernels/cpu/copy.h"

#include <cstdint>
#include <cstring>

#include "kernels/cpu/tsan.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace spillway::cpu {
namespace {

#if defined(__SSE2__)
constexpr std::size_t kLeastStreamedBytes = std::size_t{16} << 10;
constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kPrefetchBytes = 2048;

void StreamLines(std::byte* to, const std::byte* from, std::size_t size_bytes) {
  DeclareRead(from, size_bytes);
  DeclareWrite(to, size_bytes);
  for (std::size_t at = 0; at < size_bytes; at += kLineBytes) {
    _mm_prefetch(reinterpret_cast<const char*>(from + at + kPrefetchBytes), _MM_HINT_T0);
    const auto* const source = reinterpret_cast<const __m128i*>(from + at);
    auto* const target = reinterpret_cast<__m128i*>(to + at);
    const __m128i first = _mm_loadu_si128(source);
    const __m128i second = _mm_loadu_si128(source + 1);
    const __m128i third = _mm_loadu_si128(source + 2);
    const __m128i fourth = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, first);
    _mm_stream_si128(target + 1, second);
    _mm_stream_si128(target + 2, third);
    _mm_stream_si128(target + 3, fourth);
  }
  _mm_sfence();  // such writes are not ordered before the store that tells of them
}

// Each line is asked for well before it is copied, across the ends of spans: what the processor fetches ahead by itself
// ends at the end of a page.
void GatherLines(std::byte* to, std::span<const std::byte* const> from, std::size_t offset, std::size_t size_bytes) {
  for (std::size_t i = 0; i < from.size(); ++i) {
    const std::byte* const span = from[i] + offset;
    const std::byte* const next = (i + 1 < from.size() ? from[i + 1] : from[i]) + offset;
    DeclareRead(span, size_bytes);
    DeclareWrite(to, size_bytes);
    for (std::size_t at = 0; at < size_bytes; at += kLineBytes, to += kLineBytes) {
      const std::size_t ahead = at + kPrefetchBytes;
      _mm_prefetch(reinterpret_cast<const char*>(ahead < size_bytes ? span + ahead : next + (ahead - size_bytes)),
                   _MM_HINT_T0);
      std::memcpy(to, span + at, kLineBytes);
    }
  }
}
#endif

}  // namespace

void GatherSpans(std::byte* to, std::span<const std::byte* const> from, std::size_t offset, std::size_t size_bytes) {
#if defined(__SSE2__)
  if (size_bytes >= kPrefetchBytes && size_bytes % kLineBytes == 0) {
    GatherLines(to, from, offset, size_bytes);
    return;
  }
#endif
  for (std::size_t i = 0; i < from.size(); ++i) std::memcpy(to + i * size_bytes, from[i] + offset, size_bytes);
}

void CopySpan(std::byte* to, const std::byte* from, std::size_t size_bytes) {
#if defined(__SSE2__)
  if (size_bytes >= kLeastStreamedBytes && reinterpret_cast<std::uintptr_t>(to) % kLineBytes == 0) {
    const std::size_t streamed = size_bytes / kLineBytes * kLineBytes;
    StreamLines(to, from, streamed);
    to += streamed;
    from += streamed;
    size_bytes -= streamed;
  }
#endif
  if (size_bytes != 0) std::memcpy(to, from, size_bytes);
}

}  // namespace spillway::cpu
