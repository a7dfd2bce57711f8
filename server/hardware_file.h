#pragma once

// Hardware by name or from a YAML file.

#include <string>

#include "absl/status/statusor.h"
#include "engine/hardware.h"

namespace spillway {

// A built-in name, else a file whose keys are those of Hardware; `based_on` names a built-in one to begin with.
// INVALID_ARGUMENT names --hardware, the file, the key and what is allowed.
absl::StatusOr<Hardware> ReadHardware(const std::string& name_or_path);

}  // namespace spillway
