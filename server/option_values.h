#pragma once

// Text of option values: sizes with suffixes, booleans, and the nearest known name to a misspelt one.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace spillway {

// "512", "512k", "1KiB", "0.5GiB", "25.6K". k m g t are powers of 1000, K M G T and KiB ... of 1024, kB MB GB TB of
// 1000, as in vLLM. nullopt if it is not such a number, is not whole in its unit, or overflows.
std::optional<std::int64_t> ParseSize(std::string_view text);
// Decimal digits with an optional sign, and nothing else.
std::optional<double> ParseNumber(std::string_view text);
std::optional<bool> ParseBool(std::string_view text);  // true false 1 0 yes no on off, any case

std::string ShowSize(std::int64_t bytes);  // "1.5 GiB"

// The name with the fewest edits; nullopt where none is near enough to be meant.
std::optional<std::string> NearestName(std::string_view name, const std::vector<std::string>& names);

}  // namespace spillway
