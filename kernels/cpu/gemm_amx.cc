// The GEMM body for AMX: two tiles of 16 rows against the two halves of a panel.

#include <algorithm>
#include <array>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cpu/bf16_tiles.h"
#include "kernels/cpu/gemm_dot.h"
#include "kernels/cpu/tsan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace spillway::cpu {

#if defined(__x86_64__)
namespace {

#define SPILLWAY_AMX __attribute__((target("amx-tile,amx-bf16,amx-int8")))

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kSumBytes = 4;
constexpr std::int64_t kSumsStride = kPanelColumns * kSumBytes;
constexpr std::int64_t kHalfStride = kDotHalfColumns * kSumBytes;
// How far ahead of its use a panel is fetched.
constexpr std::int64_t kPrefetchBytes = 4096;

// Tiles, which the intrinsics want as literals: 0 to 3 sums of (upper, lower) rows x (first, second) half of the panel,
// 4 and 5 the upper and lower rows, 6 and 7 the halves.

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::array<std::uint8_t, 14> reserved{};
  std::array<std::uint16_t, 16> row_bytes{};
  std::array<std::uint8_t, 16> rows{};

  constexpr TileConfig() = default;
  constexpr explicit TileConfig(std::int64_t num_rows) {
    const auto upper = static_cast<std::uint8_t>(std::min(num_rows, kTileRows));
    const auto lower = static_cast<std::uint8_t>(num_rows - upper);
    rows = {upper, upper, lower, lower, upper, lower, kTileRows, kTileRows};
    for (std::size_t tile = 0; tile < 8; ++tile) row_bytes[tile] = rows[tile] == 0 ? 0 : kDotBlockBytes;
  }
};

// By number of rows. Constants, since the compiler's intrinsic does not tell that it reads all of one.
constexpr auto kConfigs = [] {
  std::array<TileConfig, 2 * kTileRows + 1> configs{};
  for (std::size_t rows = 1; rows < configs.size(); ++rows) configs[rows] = TileConfig(static_cast<std::int64_t>(rows));
  return configs;
}();

// Signed activations times unsigned weights.
#define SPILLWAY_TILE_DOT(sums, a, weights)   \
  if constexpr (kElement == Element::kBF16) { \
    _tile_dpbf16ps(sums, a, weights);         \
  } else {                                    \
    _tile_dpbsud(sums, a, weights);           \
  }

enum class Element : std::uint8_t { kBF16, kInt8 };

template <Element kElement, bool kHasLower, bool kIsStreamed>
SPILLWAY_AMX void MultiplyBlocks(const DotPiece& piece, const std::byte* a) {
  const std::byte* const lower = a + kTileRows * piece.a_stride;
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    const std::byte* const panel = piece.panel + block * 2 * kDotHalfBytes;
    if constexpr (kIsStreamed) {
#pragma GCC unroll 32
      for (std::int64_t i = 0; i < 2 * kDotHalfBytes; i += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(panel) + kPrefetchBytes + i, _MM_HINT_T0);
      }
    }
    _tile_loadd(6, panel, kDotBlockBytes);
    _tile_loadd(4, a + block * kDotBlockBytes, piece.a_stride);
    SPILLWAY_TILE_DOT(0, 4, 6);
    _tile_loadd(7, panel + kDotHalfBytes, kDotBlockBytes);
    SPILLWAY_TILE_DOT(1, 4, 7);
    if constexpr (kHasLower) {
      _tile_loadd(5, lower + block * kDotBlockBytes, piece.a_stride);
      SPILLWAY_TILE_DOT(2, 5, 6);
      SPILLWAY_TILE_DOT(3, 5, 7);
    }
  }
}

SPILLWAY_AMX void BeginSums(const DotPiece& piece, std::byte* sums, bool has_lower) {
  std::byte* const lower = sums + kTileRows * kSumsStride;
  if (piece.is_first) {
    _tile_zero(0);
    _tile_zero(1);
    if (!has_lower) return;
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, sums, kSumsStride);
  _tile_loadd(1, sums + kHalfStride, kSumsStride);
  if (!has_lower) return;
  _tile_loadd(2, lower, kSumsStride);
  _tile_loadd(3, lower + kHalfStride, kSumsStride);
}

SPILLWAY_AMX void EndSums(std::byte* sums, bool has_lower) {
  std::byte* const lower = sums + kTileRows * kSumsStride;
  _tile_stored(0, sums, kSumsStride);
  _tile_stored(1, sums + kHalfStride, kSumsStride);
  if (!has_lower) return;
  _tile_stored(2, lower, kSumsStride);
  _tile_stored(3, lower + kHalfStride, kSumsStride);
}

template <Element kElement>
SPILLWAY_AMX void MultiplyPiece(const DotPiece& piece) {
  for (std::int64_t m = 0; m < piece.num_rows; ++m) {
    DeclareRead(piece.a + m * piece.a_stride, static_cast<std::size_t>(piece.num_blocks * kDotBlockBytes));
  }
  DeclareRead(piece.panel, static_cast<std::size_t>(piece.num_blocks * 2 * kDotHalfBytes));
  DeclareWrite(piece.sums, static_cast<std::size_t>(piece.num_rows * kSumsStride));

  std::int64_t configured_rows = 0;
  for (std::int64_t m = 0; m < piece.num_rows; m += 2 * kTileRows) {
    const std::int64_t rows = std::min(piece.num_rows - m, 2 * kTileRows);
    const bool has_lower = rows > kTileRows;
    if (rows != configured_rows) {
      _tile_loadconfig(&kConfigs[static_cast<std::size_t>(rows)]);
      configured_rows = rows;
    }
    std::byte* const sums = piece.sums + m * kSumsStride;
    const std::byte* const a = piece.a + m * piece.a_stride;
    BeginSums(piece, sums, has_lower);
    if (m == 0) {  // the rows that follow find the panel in a cache
      has_lower ? MultiplyBlocks<kElement, true, true>(piece, a) : MultiplyBlocks<kElement, false, true>(piece, a);
    } else {
      has_lower ? MultiplyBlocks<kElement, true, false>(piece, a) : MultiplyBlocks<kElement, false, false>(piece, a);
    }
    EndSums(sums, has_lower);
  }
  _tile_release();
}

}  // namespace

absl::StatusOr<DotBodies> AmxDotBodies() {
  if (!HasAmx()) {
    return absl::FailedPreconditionError("this machine has no amx, or the system does not let this process use it");
  }
  return DotBodies{MultiplyPiece<Element::kBF16>, MultiplyPiece<Element::kInt8>};
}

#else

absl::StatusOr<DotBodies> AmxDotBodies() { return absl::FailedPreconditionError("amx is of x86 machines only"); }

#endif

}  // namespace spillway::cpu
