#include "kernels/cpu/bf16_tiles.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstring>

// GCC 12 takes the deliberately undefined vectors of its own intrinsics for ours.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define SPILLWAY_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define SPILLWAY_AMX __attribute__((target("amx-tile,amx-bf16")))

namespace spillway::cpu {
namespace {

// kRows rows x kColumns tiles.
template <int kRows, int kColumns>
SPILLWAY_AVX512_BF16 inline void MultiplyBlock(const TileProduct& p, std::int64_t row, std::int64_t column) {
  __m512 sums[kRows][kColumns];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      sums[r][c] =
          p.add ? _mm512_loadu_ps(p.c + (row + r) * p.c_stride + (column + c) * kTileColumns) : _mm512_setzero_ps();
    }
  }
  const std::uint16_t* const a = p.a + row * p.a_stride;
  const std::byte* b = p.b + static_cast<std::size_t>(column) * p.b_column_stride;
  for (std::int64_t t = 0; t < p.depth; ++t) {
    for (std::int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      __m512i right[kColumns];
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        right[c] = _mm512_loadu_si512(b + static_cast<std::size_t>(c) * p.b_column_stride + pair * 64);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        std::int32_t left;
        std::memcpy(&left, a + r * p.a_stride + t * p.a_depth_stride + 2 * pair, sizeof(left));
        const auto lefts = reinterpret_cast<__m512bh>(_mm512_set1_epi32(left));
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
          sums[r][c] = _mm512_dpbf16_ps(sums[r][c], lefts, reinterpret_cast<__m512bh>(right[c]));
        }
      }
    }
    b += p.b_depth_stride;
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      _mm512_storeu_ps(p.c + (row + r) * p.c_stride + (column + c) * kTileColumns, sums[r][c]);
    }
  }
}

template <int kRows>
SPILLWAY_AVX512_BF16 inline void MultiplyRows(const TileProduct& p, std::int64_t row) {
  std::int64_t column = 0;
  for (; column + 4 <= p.num_columns; column += 4) MultiplyBlock<kRows, 4>(p, row, column);
  for (; column < p.num_columns; ++column) MultiplyBlock<kRows, 1>(p, row, column);
}

SPILLWAY_AVX512_BF16 void MultiplyAvx512(const TileProduct& p) {
  std::int64_t row = 0;
  for (; row + 4 <= p.num_rows; row += 4) MultiplyRows<4>(p, row);
  for (; row < p.num_rows; ++row) MultiplyRows<1>(p, row);
}

// Eight tile registers of 16 rows of 64 bytes: four sums, two of a, two of b.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;

SPILLWAY_AMX void BeginAmx() { _tile_loadconfig(&kTileConfig); }
SPILLWAY_AMX void EndAmx() { _tile_release(); }

// The intrinsics do not tell the compiler what memory they read.
inline void OrderMemory() { asm volatile("" ::: "memory"); }

// Sums in tiles 0 to 3 ([row tile][column tile]), a in 4 and 5, b in 6 and 7.
template <bool kTwoRowTiles, bool kTwoColumns>
SPILLWAY_AMX inline void MultiplyTiles(const TileProduct& p, std::int64_t row, std::int64_t column) {
  const auto c_bytes = static_cast<std::size_t>(p.c_stride) * sizeof(float);
  float* const c = p.c + row * p.c_stride + column * kTileColumns;
  if (p.add) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, c + kTileColumns, c_bytes);
    if constexpr (kTwoRowTiles) _tile_loadd(2, c + kTileRows * p.c_stride, c_bytes);
    if constexpr (kTwoRowTiles && kTwoColumns) _tile_loadd(3, c + kTileRows * p.c_stride + kTileColumns, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRowTiles) _tile_zero(2);
    if constexpr (kTwoRowTiles && kTwoColumns) _tile_zero(3);
  }
  const auto a_bytes = static_cast<std::size_t>(p.a_stride) * sizeof(std::uint16_t);
  const std::uint16_t* a = p.a + row * p.a_stride;
  const std::byte* b = p.b + static_cast<std::size_t>(column) * p.b_column_stride;
  for (std::int64_t t = 0; t < p.depth; ++t) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b + p.b_column_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRowTiles) {
      _tile_loadd(5, a + kTileRows * p.a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (kTwoRowTiles && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    a += p.a_depth_stride;
    b += p.b_depth_stride;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c + kTileColumns, c_bytes);
  if constexpr (kTwoRowTiles) _tile_stored(2, c + kTileRows * p.c_stride, c_bytes);
  if constexpr (kTwoRowTiles && kTwoColumns) _tile_stored(3, c + kTileRows * p.c_stride + kTileColumns, c_bytes);
}

template <bool kTwoRowTiles>
SPILLWAY_AMX inline void MultiplyRowTiles(const TileProduct& p, std::int64_t row) {
  std::int64_t column = 0;
  for (; column + 2 <= p.num_columns; column += 2) MultiplyTiles<kTwoRowTiles, true>(p, row, column);
  if (column < p.num_columns) MultiplyTiles<kTwoRowTiles, false>(p, row, column);
}

SPILLWAY_AMX void MultiplyAmx(const TileProduct& p) {
  OrderMemory();
  for (std::int64_t row = 0; row < p.num_rows; row += 2 * kTileRows) {
    if (p.num_rows - row > kTileRows) {
      MultiplyRowTiles<true>(p, row);
    } else {
      MultiplyRowTiles<false>(p, row);
    }
  }
  OrderMemory();
}

void Nothing() {}

struct CpuFeatures {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};
CpuFeatures FeaturesOfLeaf7(unsigned subleaf) {
  CpuFeatures f;
  if (__get_cpuid_count(7, subleaf, &f.eax, &f.ebx, &f.ecx, &f.edx) == 0) return {};
  return f;
}

// The kernel gives a process the state of the tile registers only when asked, once.
bool AskForTileState() {
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool HasAvx512Bf16() {
  return __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0 &&
         __builtin_cpu_supports("avx512dq") != 0 && (FeaturesOfLeaf7(1).eax >> 5 & 1U) != 0;
}

bool HasAmx() {
  const unsigned edx = FeaturesOfLeaf7(0).edx;
  const bool has_tiles = (edx >> 24 & 1U) != 0;
  const bool has_bf16 = (edx >> 22 & 1U) != 0;
  // Packing and softmax are AVX512_BF16.
  static const bool is_allowed = has_tiles && has_bf16 && HasAvx512Bf16() && AskForTileState();
  return is_allowed;
}

const TileBodies kAvx512Bf16Tiles = {Nothing, MultiplyAvx512, Nothing};
const TileBodies kAmxTiles = {BeginAmx, MultiplyAmx, EndAmx};

}  // namespace spillway::cpu

#else

namespace spillway::cpu {
bool HasAvx512Bf16() { return false; }
bool HasAmx() { return false; }
}  // namespace spillway::cpu

#endif
