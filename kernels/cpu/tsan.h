#pragma once

// ThreadSanitizer sees no memory access of code it did not compile. Such a call declares its buffers first.

#include <cstddef>

#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_read_range(const void* begin, std::size_t size_bytes);
void __tsan_write_range(void* begin, std::size_t size_bytes);
}
#endif

namespace spillway::cpu {

inline void DeclareRead([[maybe_unused]] const void* begin, [[maybe_unused]] std::size_t size_bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_read_range(begin, size_bytes);
#endif
}

inline void DeclareWrite([[maybe_unused]] void* begin, [[maybe_unused]] std::size_t size_bytes) {
#if defined(__SANITIZE_THREAD__)
  __tsan_write_range(begin, size_bytes);
#endif
}

}  // namespace spillway::cpu
