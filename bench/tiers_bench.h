#pragma once

// The parts of tiers_bench. Each prints a table and returns its rows.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace spillway::tiers_bench {

double Median(std::vector<double> values);

// Restores and stores of whole blocks through a KvStore beside plain copies of the same span between the same places,
// by size of the block, unpaced and paced.
nlohmann::json MeasureCopies();

// Sessions that return to a device tier of part of their size, tiers off and on, unpaced and paced.
nlohmann::json MeasureWorkingSets(const std::string& folder);

// The time to first token of a session that comes back with a few new tokens, against what its bytes and its new tokens
// must take.
nlohmann::json MeasureReturn(const std::string& folder);

// Seconds of a step with write-through on and off.
nlohmann::json MeasureWriteThrough(const std::string& folder);

}  // namespace spillway::tiers_bench
