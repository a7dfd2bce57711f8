#pragma once

// Test data that lives beside the checkout (../shared): real tokenizers and a small trained model. Tests that need it
// skip themselves where it is absent.

#include <gtest/gtest.h>
#include <unistd.h>

#include <optional>
#include <string>
#include <string_view>

namespace spillway {

inline std::string SharedRoot() { return SPILLWAY_SOURCE_DIR "/../shared"; }

// Path of ../shared/<relative>, or nothing if it is not there.
inline std::optional<std::string> SharedPath(std::string_view relative) {
  std::string path = SharedRoot() + "/" + std::string(relative);
  if (::access(path.c_str(), R_OK) != 0) return std::nullopt;
  return path;
}

}  // namespace spillway

// Declares `variable` as the path, or skips the running test and names what is missing.
#define SPILLWAY_SHARED_OR_SKIP(variable, relative)                                           \
  if (!::spillway::SharedPath(relative)) {                                                    \
    GTEST_SKIP() << "test data is absent: " << ::spillway::SharedRoot() << "/" << (relative); \
  }                                                                                           \
  const std::string variable = *::spillway::SharedPath(relative)
