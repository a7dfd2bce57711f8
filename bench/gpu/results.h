#pragma once

// The table that a benchmark prints and the JSON it leaves.

#include <string>
#include <vector>

namespace spillway::bench {

struct Measured {
  double median_us = 0;
  double spread = 0;  // (90th - 10th percentile) / median
};

// One line of the results: what was measured, at which sizes, how fast, and against which limit.
struct Row {
  std::string section;
  std::string what;
  Measured time;
  double value = 0;
  std::string unit;
  double limit = 0;  // in the same unit; 0: none
};

// Of what, and where.
struct Provenance {
  std::string device;
  std::string commit;
  std::string machine;  // GPU, driver, link
};

class Results {
 public:
  void Report(Row row);  // prints it
  void WriteJson(const std::string& path, const Provenance& of) const;

 private:
  std::vector<Row> rows_;
};

}  // namespace spillway::bench
