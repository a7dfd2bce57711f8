#pragma once

// The "normalizer" of tokenizer.json: what happens to a text before it is cut.

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spillway {

// Immutable; any thread.
class Normalizer {
 public:
  // `description` may be null: nothing is changed. UNIMPLEMENTED names a type that is not built.
  static absl::StatusOr<Normalizer> FromJson(const nlohmann::json* description, const std::string& where);

  // In place; `text` is valid UTF-8 before and after.
  absl::Status Apply(std::string& text) const;

 private:
  using Step = std::function<absl::Status(std::string&)>;

  absl::Status Add(const nlohmann::json& description, const std::string& where);

  std::vector<Step> steps_;
};

}  // namespace spillway
