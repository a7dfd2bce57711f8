#pragma once

// The parts of papers_bench. Each prints a table and returns its rows.

#include <nlohmann/json.hpp>
#include <string>

namespace spillway::papers_bench {

// arXiv 2601.19910's experiment: K cached tokens in the host tier, T new ones, on links of several speeds. Time to
// first token and the restore's share of it, measured and predicted.
nlohmann::json MeasureOverhead(const std::string& folder);

// Ten minutes of a Mooncake trace with prompts and answers cut to a sixteenth, one request of four, four times as fast:
// served, and replayed with the served engine's cost model.
nlohmann::json CompareReplay(const std::string& folder, const std::string& trace_path);

}  // namespace spillway::papers_bench
