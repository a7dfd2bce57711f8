#pragma once

// ModelDigest: which model this is, for the keys of KV that outlives the process. Two folders with equal digests have,
// for all that matters here, equal weights: SHA-256 over config.json and, for every tensor, its name, dtype, shape and
// first 4 KiB. Fast enough to run at every start.

#include <string>

#include "absl/status/statusor.h"

namespace spillway {

absl::StatusOr<std::string> ModelDigest(const std::string& folder);  // lower-case hex

}  // namespace spillway
