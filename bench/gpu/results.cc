#include "bench/gpu/results.h"

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "kernels/check.h"

namespace spillway::bench {

void Results::Report(Row row) {
  std::printf("%-10s %-58s %10.1f us +-%3.0f%% %9.2f %-8s", row.section.c_str(), row.what.c_str(), row.time.median_us,
              row.time.spread * 50, row.value, row.unit.c_str());
  if (row.limit > 0) std::printf(" %5.1f%% of %.0f", 100 * row.value / row.limit, row.limit);
  std::printf("\n");
  std::fflush(stdout);
  rows_.push_back(std::move(row));
}

void Results::WriteJson(const std::string& path, const Provenance& of) const {
  nlohmann::json rows = nlohmann::json::array();
  for (const Row& row : rows_) {
    rows.push_back({{"section", row.section},
                    {"what", row.what},
                    {"median_us", row.time.median_us},
                    {"spread", row.time.spread},
                    {"value", row.value},
                    {"unit", row.unit},
                    {"limit", row.limit}});
  }
  std::ofstream file(path);
  file << nlohmann::json{{"device", of.device}, {"commit", of.commit}, {"machine", of.machine}, {"rows", rows}}.dump(1)
       << "\n";
  SPILLWAY_CHECK(file.good()) << "cannot write " << path;
}

}  // namespace spillway::bench
