#pragma once

// MODEL as the user gives it -> the folder that holds it.

#include <string>

#include "absl/status/statusor.h"
#include "server/options.h"

namespace spillway {

// A folder with a config.json is taken as it is. "org/name" (or "name") is looked up in the local Hub cache:
// HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub, in the snapshot that refs/main names, else the only
// one there. Empty is the built-in demo model.
//   NOT_FOUND         not there; the message has the `hf download` command that fetches it
//   INVALID_ARGUMENT  neither a folder nor the form of a Hub id
absl::StatusOr<std::string> ResolveModel(const std::string& model, const Environment& environment);

inline constexpr char kDemoModelName[] = "spillway-demo";

// The folder of the built-in demo model as it lies beside `program`, the path of a binary: installed in
// ../share/spillway/demo_model, in a build tree in share/spillway/demo_model. NOT_FOUND names both.
absl::StatusOr<std::string> FindDemoModel(const std::string& program);

}  // namespace spillway
