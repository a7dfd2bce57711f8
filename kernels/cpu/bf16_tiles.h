#pragma once

// Products of bf16 matrices in the two instruction sets that have them: AVX512_BF16 (vdpbf16ps) and AMX (tdpbf16ps).
// An element is summed over ascending pairs of k in an order that the instruction fixes. So its bits do not depend on
// the number of rows or columns; between the two sets they may differ. Both take subnormal operands for zero.

#include <cstddef>
#include <cstdint>

namespace spillway::cpu {

// A tile of the right-hand matrix: [16 pairs of k][16 columns][2], 1 KiB. `depth` counts tiles of 32 k.
inline constexpr std::int64_t kTileDepth = 32;
inline constexpr std::int64_t kTileColumns = 16;
inline constexpr std::size_t kTileBytes = 1024;
// What rows of `a` and `c` must be padded to: readable and writable, contents undefined.
inline constexpr std::int64_t kTileRows = 16;

// c[r][16 j + i] = (add ? c[r][16 j + i] : 0) + sum over k of a(tile k / 32)[r][k] * b(tile k / 32, j)[k][i]
// So a sum over many k has the same bits in one call and in several.
struct TileProduct {
  const std::uint16_t* a = nullptr;
  std::int64_t a_stride = 0;                 // elements between rows
  std::int64_t a_depth_stride = kTileDepth;  // ... and between tiles of neighbouring depth
  std::int64_t num_rows = 0;
  const std::byte* b = nullptr;
  std::size_t b_column_stride = 0;  // bytes between tiles of neighbouring columns
  std::size_t b_depth_stride = 0;   // ... and of neighbouring depth
  std::int64_t num_columns = 0;     // tiles
  std::int64_t depth = 0;           // tiles
  float* c = nullptr;
  std::int64_t c_stride = 0;  // elements between rows
  bool add = false;
};

struct TileBodies {
  void (*begin)();  // before the first product on a thread, and
  void (*multiply)(const TileProduct&);
  void (*end)();  // after the last one
};

// Whether this machine has the set and the system lets this process use it. Any thread.
bool HasAvx512Bf16();
bool HasAmx();

extern const TileBodies kAvx512Bf16Tiles;
extern const TileBodies kAmxTiles;

}  // namespace spillway::cpu
