#pragma once

// The operations that work on one token row at a time. Each body does rows [begin, end) of its call.

#include <cstdint>

#include "kernels/cpu/targets.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

struct RowBodies {
  void (*embed)(const EmbedArgs&, std::int64_t begin, std::int64_t end);
  void (*rms_norm)(const RmsNormArgs&, std::int64_t begin, std::int64_t end);
  void (*rope_append)(const RopeAppendArgs&, std::int64_t begin, std::int64_t end);
  void (*silu_mul)(const SiluMulArgs&, std::int64_t begin, std::int64_t end);
};

const RowBodies& RowBodiesOf(Target target);

}  // namespace spillway::cpu
