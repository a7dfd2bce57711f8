#pragma once

// JSON of files that others wrote: size and nesting are bounded before the parser sees them, library exceptions end
// here, and the typed readers name the member, its value and what is allowed.

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace spillway {

enum class DuplicateKeys : std::uint8_t { kLastWins, kRefuse };

inline constexpr std::size_t kMaxJsonDepth = 64;

// `where` is the file (or part of it) that messages name.
absl::StatusOr<nlohmann::json> ParseJson(std::string_view text, const std::string& where,
                                         DuplicateKeys duplicates = DuplicateKeys::kLastWins);

// NOT_FOUND where there is no such file; INVALID_ARGUMENT where it is larger than max_bytes or not a JSON object.
absl::StatusOr<std::string> ReadWholeFile(const std::string& path, std::size_t max_bytes);
absl::StatusOr<nlohmann::json> ReadJsonFile(const std::string& path, std::size_t max_bytes,
                                            DuplicateKeys duplicates = DuplicateKeys::kLastWins);

// The member, or nullptr where it is absent or null or `object` is none.
const nlohmann::json* FindMember(const nlohmann::json& object, const char* key);

// The value where it is an integer (written without fraction or exponent) within [min, max].
std::optional<std::int64_t> IntegerWithin(const nlohmann::json& value, std::int64_t min, std::int64_t max);

// A value as it may be shown in a message: one line, shortened, ASCII.
std::string Shown(const nlohmann::json& value);
std::string Excerpt(std::string_view text);

// Absent (or null) members are nullopt; a member of another type is INVALID_ARGUMENT.
absl::StatusOr<std::optional<std::string>> ReadString(const nlohmann::json& object, const char* key,
                                                      const std::string& where);
absl::StatusOr<std::optional<bool>> ReadBool(const nlohmann::json& object, const char* key, const std::string& where);
absl::StatusOr<std::optional<std::int64_t>> ReadInteger(const nlohmann::json& object, const char* key, std::int64_t min,
                                                        std::int64_t max, const std::string& where);
// Finite and within [min, max].
absl::StatusOr<std::optional<double>> ReadNumber(const nlohmann::json& object, const char* key, double min, double max,
                                                 const std::string& where);

}  // namespace spillway
