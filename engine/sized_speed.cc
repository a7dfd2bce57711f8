#include "engine/sized_speed.h"

#include <algorithm>
#include <cmath>

namespace spillway {

void SizedSpeed::Measure(double amount, double size, double seconds, double weight) {
  if (amount <= 0 || size < 1 || seconds <= 0) return;
  const auto index = static_cast<std::size_t>(std::clamp(std::ilogb(size), 0, 63));
  Point& measured = classes_[index];
  const double per_unit = seconds / amount;
  if (measured.size == 0) {
    measured = {.size = size, .seconds = per_unit * size};
    ++num_known_;
    return;
  }
  const double known_per_unit = measured.seconds / measured.size;
  measured.size += weight * (size - measured.size);
  measured.seconds = measured.size * (known_per_unit + weight * (per_unit - known_per_unit));
}

double SizedSpeed::Seconds(double size) const {
  if (size <= 0) return 0;
  const Point* below = nullptr;
  const Point* above = nullptr;
  for (const Point& each : classes_) {
    if (each.size == 0) continue;
    if (each.size <= size) below = &each;
    if (each.size >= size && above == nullptr) above = &each;
  }
  if (below == nullptr && above == nullptr) return 0;
  if (below == nullptr || above == nullptr || below == above) {
    const Point& nearest = below != nullptr ? *below : *above;
    return nearest.seconds * size / nearest.size;
  }
  const double share = (size - below->size) / (above->size - below->size);
  return below->seconds + share * (above->seconds - below->seconds);
}

std::vector<SizedSpeed::Point> SizedSpeed::Points() const {
  std::vector<Point> known;
  for (const Point& each : classes_) {
    if (each.size > 0) known.push_back(each);
  }
  return known;
}

double SizedSpeed::PerSecond(double size) const {
  const double seconds = Seconds(size);
  return seconds > 0 ? size / seconds : 0;
}

}  // namespace spillway
