#pragma once

// SizedSpeed: sustained seconds of a piece of work by its size, from measurements: of a copy by its bytes, of a step's
// matrix products by their FLOPs. Sizes are kept in classes of a power of two; a size between two known classes is
// interpolated in seconds (so a fixed cost plus size over speed is met exactly), one beyond them keeps the nearest
// class's speed. Pure arithmetic, no clock.

#include <array>
#include <vector>

namespace spillway {

class SizedSpeed {
 public:
  struct Point {
    double size = 0;     // mean of what was measured in a class; 0: nothing was
    double seconds = 0;  // of one piece
  };

  // `seconds` for `amount` in pieces of `size` each. `weight` of the new value against the old one, (0, 1]; the first
  // of its class counts whole. What is not positive is ignored.
  void Measure(double amount, double size, double seconds, double weight);

  bool is_known() const { return num_known_ > 0; }
  // Of one piece of this size, when pieces follow each other. 0 while nothing is known.
  double Seconds(double size) const;
  double PerSecond(double size) const;
  std::vector<Point> Points() const;  // what is known, by size

 private:
  std::array<Point, 64> classes_{};
  int num_known_ = 0;
};

}  // namespace spillway
