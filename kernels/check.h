#pragma once

// CHECK for broken invariants: the process can no longer trust its state, so it says where and aborts.
// Never reachable from a request; what a caller can get wrong is an absl::Status.

#include <cstdlib>
#include <iostream>
#include <sstream>

namespace spillway {

class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition) {
    text_ << file << ":" << line << ": CHECK failed: " << condition << " ";
  }
  CheckFailure(const CheckFailure&) = delete;
  CheckFailure& operator=(const CheckFailure&) = delete;
  ~CheckFailure() {
    std::cerr << text_.str() << std::endl;
    std::abort();
  }
  std::ostream& stream() { return text_; }

 private:
  std::ostringstream text_;
};

}  // namespace spillway

#define SPILLWAY_CHECK(condition) \
  if (condition) [[likely]] {     \
  } else                          \
    ::spillway::CheckFailure(__FILE__, __LINE__, #condition).stream()

#ifdef NDEBUG
#define SPILLWAY_DCHECK(condition) SPILLWAY_CHECK(true || (condition))
#else
#define SPILLWAY_DCHECK(condition) SPILLWAY_CHECK(condition)
#endif
