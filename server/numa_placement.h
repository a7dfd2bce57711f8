#pragma once

// Where the host tier's pages come to lie on a machine of several memory nodes.

#include <cstddef>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace spillway {

// The memory nodes whose cores this process may run on, ascending. One where the system shows none. `root` is prefixed
// to /sys. `cores`: those of this process.
std::vector<int> LocalNodes(const std::vector<int>& cores, const std::string& root = "");

// Asks that pages of [begin, begin + size_bytes), none of which has been touched, come from the nodes of this process's
// cores: from the one, or from several in turn. Returns what was done, for the log; nothing on one node.
// FAILED_PRECONDITION: the system refused (a container may); pages then lie where they are touched first.
absl::StatusOr<std::string> PlaceOnLocalNodes(std::byte* begin, std::size_t size_bytes, const std::string& root = "");

}  // namespace spillway
