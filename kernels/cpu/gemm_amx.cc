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

constexpr std::int64_t kTileRows = kDotTileRows;
constexpr std::int64_t kSumBytes = 4;
constexpr std::int64_t kSumsStride = kPanelColumns * kSumBytes;
constexpr std::int64_t kHalfStride = kDotHalfColumns * kSumBytes;
// How far ahead of its use a panel is fetched into the second-level cache, which has more reads under way than the
// first.
constexpr std::int64_t kPrefetchBytes = 16384;

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
#define SPILLWAY_TILE_DOT(sums, a, weights)     \
  do {                                          \
    if constexpr (kElement == Element::kBF16) { \
      _tile_dpbf16ps(sums, a, weights);         \
    } else {                                    \
      _tile_dpbsud(sums, a, weights);           \
    }                                           \
  } while (false)

enum class Element : std::uint8_t { kBF16, kInt8 };

// Few rows: the panel comes from memory and is read once, while the rows stay in the nearest cache.
template <Element kElement, bool kHasLower>
SPILLWAY_AMX void MultiplyFew(const DotPiece& piece) {
  const std::byte* const a = piece.a.data;
  const std::byte* const lower = a + piece.a.tile_stride;
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    const std::byte* const panel = piece.panel + block * 2 * kDotHalfBytes;
#pragma GCC unroll 32
    for (std::int64_t i = 0; i < 2 * kDotHalfBytes; i += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(panel) + kPrefetchBytes + i, _MM_HINT_T1);
    }
    _tile_stream_loadd(6, panel, kDotBlockBytes);
    _tile_loadd(4, a + block * piece.a.block_stride, piece.a.row_stride);
    SPILLWAY_TILE_DOT(0, 4, 6);
    _tile_stream_loadd(7, panel + kDotHalfBytes, kDotBlockBytes);
    SPILLWAY_TILE_DOT(1, 4, 7);
    if constexpr (kHasLower) {
      _tile_loadd(5, lower + block * piece.a.block_stride, piece.a.row_stride);
      SPILLWAY_TILE_DOT(2, 5, 6);
      SPILLWAY_TILE_DOT(3, 5, 7);
    }
  }
}

// Lines that are fetched into the second-level cache, so many with each block.
struct Fetch {
  const std::byte* at;
  const std::byte* end;
  std::int64_t bytes_per_block;
};

// Many rows stream past a piece of a panel, which stays in the nearest cache: the rows must not push it out, so they
// are loaded with the hint that they are not used again soon. A tile is loaded as soon as its register is free.
template <Element kElement, bool kHasLower>
SPILLWAY_AMX void MultiplyMany(const DotPiece& piece, const std::byte* a, Fetch& fetch) {
  const std::byte* lower = a + piece.a.tile_stride;
  const std::byte* panel = piece.panel;
  const std::byte* at = fetch.at;
  const std::int64_t row_stride = piece.a.row_stride;
  const std::int64_t block_stride = piece.a.block_stride;
  _tile_stream_loadd(4, a, row_stride);
  _tile_loadd(6, panel, kDotBlockBytes);
  for (std::int64_t block = 1; block <= piece.num_blocks; ++block) {
    const std::byte* const fetch_end = std::min(at + fetch.bytes_per_block, fetch.end);
    for (; at < fetch_end; at += 64) _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    const bool has_next = block < piece.num_blocks;
    SPILLWAY_TILE_DOT(0, 4, 6);
    _tile_loadd(7, panel + kDotHalfBytes, kDotBlockBytes);
    SPILLWAY_TILE_DOT(1, 4, 7);
    if constexpr (kHasLower) _tile_stream_loadd(5, lower, row_stride);
    a += block_stride;
    panel += 2 * kDotHalfBytes;
    lower += block_stride;
    if (has_next) _tile_stream_loadd(4, a, row_stride);
    if constexpr (kHasLower) SPILLWAY_TILE_DOT(2, 5, 6);
    if (has_next) _tile_loadd(6, panel, kDotBlockBytes);
    if constexpr (kHasLower) SPILLWAY_TILE_DOT(3, 5, 7);
  }
  fetch.at = at;
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

void DeclareAccess(const DotPiece& piece) {
  for (std::int64_t m = 0; m < piece.num_rows; m += kTileRows) {
    const std::byte* const tile = piece.a.data + m / kTileRows * piece.a.tile_stride;
    const std::int64_t rows = std::min(piece.num_rows - m, kTileRows);
    if (piece.a.block_stride == kDotBlockBytes) {
      for (std::int64_t r = 0; r < rows; ++r) {
        DeclareRead(tile + r * piece.a.row_stride, static_cast<std::size_t>(piece.num_blocks * kDotBlockBytes));
      }
      continue;
    }
    for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
      DeclareRead(tile + block * piece.a.block_stride, static_cast<std::size_t>(rows * kDotBlockBytes));
    }
  }
  DeclareRead(piece.panel, static_cast<std::size_t>(piece.num_blocks * 2 * kDotHalfBytes));
  DeclareWrite(piece.sums, static_cast<std::size_t>(piece.num_rows * kSumsStride));
}

template <Element kElement>
SPILLWAY_AMX void MultiplyPiece(const DotPiece& piece) {
  DeclareAccess(piece);
  const std::int64_t num_pairs = (piece.num_rows + 2 * kTileRows - 1) / (2 * kTileRows);
  const std::int64_t lines_per_block =
      (piece.next_bytes / 64 + num_pairs * piece.num_blocks - 1) / (num_pairs * piece.num_blocks);
  Fetch fetch = {piece.next, piece.next == nullptr ? nullptr : piece.next + piece.next_bytes, 64 * lines_per_block};
  std::int64_t configured_rows = 0;
  for (std::int64_t pair = 0; pair < num_pairs; ++pair) {
    const std::int64_t m = pair * 2 * kTileRows;
    const std::int64_t rows = std::min(piece.num_rows - m, 2 * kTileRows);
    const bool has_lower = rows > kTileRows;
    if (rows != configured_rows) {
      _tile_loadconfig(&kConfigs[static_cast<std::size_t>(rows)]);
      configured_rows = rows;
    }
    std::byte* const sums = piece.sums + m * kSumsStride;
    const std::byte* const a = piece.a.data + 2 * pair * piece.a.tile_stride;
    BeginSums(piece, sums, has_lower);
    if (num_pairs == 1) {
      has_lower ? MultiplyFew<kElement, true>(piece) : MultiplyFew<kElement, false>(piece);
    } else {
      has_lower ? MultiplyMany<kElement, true>(piece, a, fetch) : MultiplyMany<kElement, false>(piece, a, fetch);
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
  return DotBodies{{MultiplyPiece<Element::kBF16>, true}, {MultiplyPiece<Element::kInt8>, true}};
}

#else

absl::StatusOr<DotBodies> AmxDotBodies() { return absl::FailedPreconditionError("amx is of x86 machines only"); }

#endif

}  // namespace spillway::cpu
