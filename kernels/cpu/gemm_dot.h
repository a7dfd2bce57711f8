#pragma once

// GEMM by dot instructions, which multiply groups of neighbouring k: pairs of BF16 (AVX512_BF16, AMX), and quads of
// INT8 (VNNI, AMX, and in two steps everywhere).
//
// An output element is one chain of these instructions over ascending k, whatever the number of rows, the block of rows
// it falls into, the cut of k and the worker: its bits depend on its inputs and on the instruction alone. Sums of INT8
// are exact: their bits do not depend on the instruction either.
//
// Panel  32 columns, [block of k][half: 16 columns][group of k][column][4 bytes]. A block is 64 bytes of each column, a
//        group 4 bytes of it: one half of a block is one tile of AMX. k is padded with zeros to whole blocks, columns
//        to whole panels. INT8 weights are kept as q + 128, unsigned as VNNI wants them; 128 times the sum of the row
//        of activations comes off again at the end.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/cpu/gemm.h"

namespace spillway::cpu {

inline constexpr std::int64_t kDotGroupBytes = 4;
inline constexpr std::int64_t kDotBlockBytes = 64;
inline constexpr std::int64_t kDotHalfColumns = 16;
inline constexpr std::int64_t kDotHalfBytes = kDotBlockBytes * kDotHalfColumns;

// Rows of activations, in whole blocks of k: one row after the other, or in tiles of kDotTileRows as AMX reads them:
// [tile][block][row][64 bytes].
inline constexpr std::int64_t kDotTileRows = 16;

struct DotRows {
  const std::byte* data = nullptr;
  std::int64_t row_stride = 0;                 // bytes from row to row of a tile
  std::int64_t block_stride = kDotBlockBytes;  // from block to block of a row
  std::int64_t tile_stride = 0;                // from tile to tile

  // `m` is the first row of a tile.
  DotRows From(std::int64_t m, std::int64_t block) const {
    DotRows rest = *this;
    rest.data += m / kDotTileRows * tile_stride + block * block_stride;
    return rest;
  }
};

// Some rows against a piece of one panel: sums[m][n] (+)= over k of a[m][k] * panel[k][n].
struct DotPiece {
  DotRows a;  // from the first block of the piece
  std::int64_t num_rows = 0;
  const std::byte* panel = nullptr;  // at the first block of the piece
  std::int64_t num_blocks = 0;
  bool is_first = false;      // the sums begin at zero
  std::byte* sums = nullptr;  // [num_rows, 32] of float or int32, aligned to 64 bytes
  // What the next pieces read of the panels, to be fetched meanwhile; may be null.
  const std::byte* next = nullptr;
  std::int64_t next_bytes = 0;
};

struct DotBodies {
  DotBody bf16;
  DotBody int8;
};

// FAILED_PRECONDITION, and why, where this machine lacks the instructions.
absl::StatusOr<DotBodies> Avx512DotBodies();
// Asks the system to let this process use AMX.
absl::StatusOr<DotBodies> AmxDotBodies();

// BF16 parts, as RowsToPack accepts them. `pool` packs.
absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotBF16(DotBody body, const GemmBodies& bodies,
                                                       std::span<const MatrixView> parts, WorkerPool& pool);
// Parts as RowsToPackInt8 accepts them.
absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotInt8(DotBody body, const GemmBodies& bodies,
                                                       std::span<const MatrixView> parts, WorkerPool& pool);

}  // namespace spillway::cpu
