#pragma once

// For the .cc files that compile bodies once per target: picks the table of one target. To be included after the last
// target, where HWY_ONCE holds.

#include "hwy/highway.h"
#include "kernels/check.h"
#include "kernels/cpu/targets.h"

#if (HWY_TARGETS & HWY_SCALAR) != 0
#define SPILLWAY_CASE_SCALAR(TABLE) \
  case Target::kScalar:             \
    return N_SCALAR::TABLE;
#else
#define SPILLWAY_CASE_SCALAR(TABLE)
#endif
#if (HWY_TARGETS & HWY_NEON) != 0
#define SPILLWAY_CASE_NEON(TABLE) \
  case Target::kNeon:             \
    return N_NEON::TABLE;
#else
#define SPILLWAY_CASE_NEON(TABLE)
#endif
#if (HWY_TARGETS & HWY_AVX2) != 0
#define SPILLWAY_CASE_AVX2(TABLE) \
  case Target::kAvx2:             \
    return N_AVX2::TABLE;
#else
#define SPILLWAY_CASE_AVX2(TABLE)
#endif
#if (HWY_TARGETS & HWY_AVX3) != 0
#define SPILLWAY_CASE_AVX512(TABLE) \
  case Target::kAvx512:             \
  case Target::kAvx512Bf16:         \
  case Target::kAmx:                \
    return N_AVX3::TABLE;
#else
#define SPILLWAY_CASE_AVX512(TABLE)
#endif

// The body of a function of `target` that returns a reference to TABLE of that target.
#define SPILLWAY_CHOOSE_TARGET(target, TABLE)                                                  \
  switch (target) {                                                                            \
    SPILLWAY_CASE_SCALAR(TABLE)                                                                \
    SPILLWAY_CASE_NEON(TABLE)                                                                  \
    SPILLWAY_CASE_AVX2(TABLE)                                                                  \
    SPILLWAY_CASE_AVX512(TABLE)                                                                \
    default:                                                                                   \
      SPILLWAY_CHECK(false) << "target " << static_cast<int>(target) << " is not compiled in"; \
      std::abort();                                                                            \
  }
