#include "server/progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/time/clock.h"
#include "server/log.h"
#include "server/option_values.h"

namespace spillway {
namespace {

constexpr int kWidth = 30;

}  // namespace

ProgressBar::ProgressBar(std::string what, std::string unit)
    : what_(std::move(what)),
      unit_(std::move(unit)),
      is_terminal_(::isatty(STDERR_FILENO) != 0),
      shown_(is_terminal_ ? absl::InfinitePast() : absl::Now()) {}

ProgressBar::~ProgressBar() {
  if (has_line_) fmt::print(stderr, "\n");
}

std::string ProgressBar::Amount(std::int64_t amount) const {
  return unit_ == "bytes" ? ShowSize(amount) : fmt::format("{}", amount);
}

void ProgressBar::Show(std::int64_t done, std::int64_t total) {
  const absl::Time now = absl::Now();
  const bool is_last = done >= total;
  if (now - shown_ < (is_terminal_ ? absl::Milliseconds(100) : absl::Seconds(5)) && !(is_last && is_terminal_)) return;
  shown_ = now;
  const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1;
  const std::string amounts =
      fmt::format("{} of {}{}", Amount(done), Amount(total), unit_ == "bytes" ? "" : " " + unit_);
  if (!is_terminal_) {
    Log(LogLevel::kInfo, what_, {{"progress", fmt::format("{:.0f} %", 100 * share)}, {"done", amounts}});
    return;
  }
  const int filled = std::clamp(static_cast<int>(share * kWidth), 0, kWidth);
  fmt::print(stderr, "\r\033[K{} [{:=<{}}{:<{}}] {}", what_, "", filled, "", kWidth - filled, amounts);
  std::fflush(stderr);
  has_line_ = true;
}

}  // namespace spillway
