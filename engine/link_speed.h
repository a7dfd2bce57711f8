#pragma once

// LinkSpeed: sustained seconds of a copy between tiers by its size, from measurements. Sizes are kept in classes of a
// power of two; a size between two known classes is interpolated in seconds (so a fixed cost per copy plus bytes over
// bandwidth is met exactly), one beyond them keeps the nearest class's bandwidth. Pure arithmetic, no clock.

#include <array>
#include <vector>

namespace spillway {

class LinkSpeed {
 public:
  struct Point {
    double copy_bytes = 0;  // mean size of what was measured in a class; 0: nothing was
    double seconds = 0;     // of one copy
  };

  // `seconds` for `bytes` in copies of `copy_bytes` each. `weight` of the new value against the old one, (0, 1]; the
  // first of its class counts whole. What is not positive is ignored.
  void Measure(double bytes, double copy_bytes, double seconds, double weight);

  bool is_known() const { return num_known_ > 0; }
  // Of one copy of this size, when copies follow each other. 0 while nothing is known.
  double CopySeconds(double copy_bytes) const;
  double BytesPerSecond(double copy_bytes) const;
  std::vector<Point> Points() const;  // what is known, by size

 private:
  std::array<Point, 64> classes_{};
  int num_known_ = 0;
};

}  // namespace spillway
