#pragma once

// How far a long job is, on stderr: a bar on a terminal; elsewhere a log line now and then, so that logs stay short.

#include <cstdint>
#include <string>

#include "absl/time/time.h"

namespace spillway {

// One thread at a time.
class ProgressBar {
 public:
  // `unit` follows the counts: "bytes" are shown as sizes.
  ProgressBar(std::string what, std::string unit);
  ~ProgressBar();  // leaves the bar's line
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void Show(std::int64_t done, std::int64_t total);

 private:
  std::string Amount(std::int64_t amount) const;

  const std::string what_;
  const std::string unit_;
  const bool is_terminal_;
  absl::Time shown_;  // last time that something was written
  bool has_line_ = false;
};

}  // namespace spillway
