// The GEMM body for AMX: two tiles of 16 rows against the two halves of a panel.
//
// A product of two tiles takes 16 cycles, a load of one 8 if it hits the first-level cache and 26 or so if it comes
// from the second. So half of the loads must hit, and sums be stored rarely and where they are in the first-level cache
// already. Other instructions run beside products only while they are few: what becomes of the sums of one piece is
// done part by part between the blocks of the next.

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
constexpr std::int64_t kBlockBytes = 2 * kDotHalfBytes;
constexpr std::int64_t kQuarterBytes = kBlockBytes / 4;
// How many blocks ahead of its use a panel is fetched into the second-level cache, which has more reads under way than
// the first.
constexpr std::int64_t kBlocksAhead = 4;
// Blocks of a panel that stay in the first-level cache while many rows stream by.
constexpr std::int64_t kResidentBlocks = 20;

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

// What a piece wants done beside its products, a part with each block.
class Beside {
 public:
  explicit Beside(const DotPiece& piece)
      : piece_(piece), output_(piece.output.data), output_rows_(piece.output.data != nullptr ? piece.num_rows : 0) {}

  __attribute__((always_inline)) void Block() {
    for (int row = 0; row < 2 && output_rows_ > 0; ++row, --output_rows_, output_ += piece_.output.row_stride) {
      __builtin_prefetch(output_, 1, 3);
      __builtin_prefetch(output_ + piece_.output.row_bytes - 1, 1, 3);
    }
    // num_parts in num_blocks blocks, evenly.
    for (due_ += piece_.num_parts; due_ >= piece_.num_blocks; due_ -= piece_.num_blocks) piece_.background(part_++);
  }

 private:
  const DotPiece& piece_;
  const std::byte* output_;
  std::int64_t output_rows_;
  std::int64_t part_ = 0;
  std::int64_t due_ = 0;
};

inline void FetchLines(const std::byte* from, std::int64_t size_bytes) {
  const auto* const at = reinterpret_cast<const char*>(from);
  for (std::int64_t i = 0; i < size_bytes; i += 64) _mm_prefetch(at + i, _MM_HINT_T1);
}

// What is fetched with a block of a panel that is read once.
inline const std::byte* BlockAhead(const DotPiece& piece, std::int64_t block) {
  const std::int64_t ahead = block + kBlocksAhead - piece.num_blocks;
  if (ahead < 0) return piece.panel + (block + kBlocksAhead) * kBlockBytes;
  // Nothing follows: lines that are there already.
  return (ahead + 1) * kBlockBytes <= piece.next.size_bytes ? piece.next.data + ahead * kBlockBytes : piece.panel;
}

// Few rows: the panel comes from memory and is read once, while the rows stay in the nearest cache. A quarter of a
// block is fetched between two loads, which would wait behind all of it.
template <Element kElement, bool kHasLower>
SPILLWAY_AMX void MultiplyFew(const DotPiece& piece) {
  const std::byte* const a = piece.a.data;
  const std::byte* const lower = a + piece.a.tile_stride;
  Beside beside(piece);
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    const std::byte* const panel = piece.panel + block * kBlockBytes;
    const std::byte* const ahead = BlockAhead(piece, block);
    FetchLines(ahead, kQuarterBytes);
    beside.Block();
    _tile_stream_loadd(6, panel, kDotBlockBytes);
    FetchLines(ahead + kQuarterBytes, kQuarterBytes);
    _tile_loadd(4, a + block * piece.a.block_stride, piece.a.row_stride);
    SPILLWAY_TILE_DOT(0, 4, 6);
    FetchLines(ahead + 2 * kQuarterBytes, kQuarterBytes);
    _tile_stream_loadd(7, panel + kDotHalfBytes, kDotBlockBytes);
    SPILLWAY_TILE_DOT(1, 4, 7);
    FetchLines(ahead + 3 * kQuarterBytes, kQuarterBytes);
    if constexpr (kHasLower) {
      _tile_loadd(5, lower + block * piece.a.block_stride, piece.a.row_stride);
      SPILLWAY_TILE_DOT(2, 5, 6);
      SPILLWAY_TILE_DOT(3, 5, 7);
    }
  }
}

// Many rows stream past a piece of a panel: rows, and what of the panel does not stay, are loaded with the hint that
// they are not used again soon, since they must not push out what stays.
template <Element kElement, bool kHasLower>
SPILLWAY_AMX void MultiplyMany(const DotPiece& piece) {
  const std::byte* a = piece.a.data;
  const std::byte* lower = a + piece.a.tile_stride;
  const std::byte* panel = piece.panel;
  const std::int64_t row_stride = piece.a.row_stride;
  Beside beside(piece);
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    const DotRead next = piece.next.Part(block, piece.num_blocks);
    FetchLines(next.data, next.size_bytes);
    beside.Block();
    _tile_stream_loadd(4, a, row_stride);
    if (block < kResidentBlocks) {
      _tile_loadd(6, panel, kDotBlockBytes);
      SPILLWAY_TILE_DOT(0, 4, 6);
      _tile_loadd(7, panel + kDotHalfBytes, kDotBlockBytes);
    } else {
      _tile_stream_loadd(6, panel, kDotBlockBytes);
      SPILLWAY_TILE_DOT(0, 4, 6);
      _tile_stream_loadd(7, panel + kDotHalfBytes, kDotBlockBytes);
    }
    SPILLWAY_TILE_DOT(1, 4, 7);
    if constexpr (kHasLower) {
      _tile_stream_loadd(5, lower, row_stride);
      SPILLWAY_TILE_DOT(2, 5, 6);
      SPILLWAY_TILE_DOT(3, 5, 7);
    }
    a += piece.a.block_stride;
    lower += piece.a.block_stride;
    panel += 2 * kDotHalfBytes;
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

// The intrinsics do not tell the compiler what memory they read and write.
inline void OrderMemory() { asm volatile("" ::: "memory"); }

template <Element kElement>
SPILLWAY_AMX void MultiplyPiece(const DotPiece& piece) {
  DeclareAccess(piece);
  OrderMemory();
  const bool has_lower = piece.num_rows > kTileRows;
  BeginSums(piece, piece.sums, has_lower);
  if (piece.is_read_once) {
    has_lower ? MultiplyFew<kElement, true>(piece) : MultiplyFew<kElement, false>(piece);
  } else {
    has_lower ? MultiplyMany<kElement, true>(piece) : MultiplyMany<kElement, false>(piece);
  }
  EndSums(piece.sums, has_lower);
  OrderMemory();
}

SPILLWAY_AMX void BeginPieces(std::int64_t num_rows) {
  _tile_loadconfig(&kConfigs[static_cast<std::size_t>(num_rows)]);
}
SPILLWAY_AMX void EndPieces() { _tile_release(); }

}  // namespace

absl::StatusOr<DotBodies> AmxDotBodies() {
  if (!HasAmx()) {
    return absl::FailedPreconditionError("this machine has no amx, or the system does not let this process use it");
  }
  return DotBodies{{MultiplyPiece<Element::kBF16>, true, BeginPieces, EndPieces},
                   {MultiplyPiece<Element::kInt8>, true, BeginPieces, EndPieces}};
}

#else

absl::StatusOr<DotBodies> AmxDotBodies() { return absl::FailedPreconditionError("amx is of x86 machines only"); }

#endif

}  // namespace spillway::cpu
