#include "engine/link_speed.h"

#include <algorithm>
#include <cmath>

namespace spillway {

void LinkSpeed::Measure(double bytes, double copy_bytes, double seconds, double weight) {
  if (bytes <= 0 || copy_bytes < 1 || seconds <= 0) return;
  const auto index = static_cast<std::size_t>(std::clamp(std::ilogb(copy_bytes), 0, 63));
  Point& measured = classes_[index];
  const double per_byte = seconds / bytes;
  if (measured.copy_bytes == 0) {
    measured = {.copy_bytes = copy_bytes, .seconds = per_byte * copy_bytes};
    ++num_known_;
    return;
  }
  const double known_per_byte = measured.seconds / measured.copy_bytes;
  measured.copy_bytes += weight * (copy_bytes - measured.copy_bytes);
  measured.seconds = measured.copy_bytes * (known_per_byte + weight * (per_byte - known_per_byte));
}

double LinkSpeed::CopySeconds(double copy_bytes) const {
  if (copy_bytes <= 0) return 0;
  const Point* below = nullptr;
  const Point* above = nullptr;
  for (const Point& each : classes_) {
    if (each.copy_bytes == 0) continue;
    if (each.copy_bytes <= copy_bytes) below = &each;
    if (each.copy_bytes >= copy_bytes && above == nullptr) above = &each;
  }
  if (below == nullptr && above == nullptr) return 0;
  if (below == nullptr || above == nullptr || below == above) {
    const Point& nearest = below != nullptr ? *below : *above;
    return nearest.seconds * copy_bytes / nearest.copy_bytes;
  }
  const double share = (copy_bytes - below->copy_bytes) / (above->copy_bytes - below->copy_bytes);
  return below->seconds + share * (above->seconds - below->seconds);
}

std::vector<LinkSpeed::Point> LinkSpeed::Points() const {
  std::vector<Point> known;
  for (const Point& each : classes_) {
    if (each.copy_bytes > 0) known.push_back(each);
  }
  return known;
}

double LinkSpeed::BytesPerSecond(double copy_bytes) const {
  const double seconds = CopySeconds(copy_bytes);
  return seconds > 0 ? copy_bytes / seconds : 0;
}

}  // namespace spillway
