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
//        to whole panels. Of two parts of as many columns, gate and up, each panel has a half of each. INT8 weights are
//        kept as q + 128, unsigned as VNNI wants them; 128 times the sum of the row of activations comes off again at
//        the end.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "absl/functional/function_ref.h"
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

// Up to so many rows meet a piece of a panel at once.
inline constexpr std::int64_t kDotPieceRows = 2 * kDotTileRows;

// Lines of memory that are read or written soon, to be fetched meanwhile.
struct DotRead {
  const std::byte* data = nullptr;
  std::int64_t size_bytes = 0;

  // One of some parts of whole lines.
  DotRead Part(std::int64_t part, std::int64_t num_parts) const {
    const std::int64_t part_bytes = (size_bytes / 64 + num_parts - 1) / num_parts * 64;
    const std::int64_t begin = std::min(part * part_bytes, size_bytes);
    return {data + begin, std::min(part_bytes, size_bytes - begin)};
  }
};
struct DotWrite {
  std::byte* data = nullptr;  // the first row; null: nothing
  std::int64_t row_stride = 0;
  std::int64_t row_bytes = 0;  // of each of the piece's rows, at most two lines
};

inline void NoPart(std::int64_t) {}

// Some rows against a piece of one panel: sums[m][n] (+)= over k of a[m][k] * panel[k][n].
struct DotPiece {
  DotRows a;  // from the first block of the piece
  std::int64_t num_rows = 0;
  const std::byte* panel = nullptr;  // at the first block of the piece
  std::int64_t num_blocks = 0;
  bool is_first = false;      // the sums begin at zero
  bool is_read_once = false;  // no other rows meet the panel: it comes from memory, and `next` is the next piece
  std::byte* sums = nullptr;  // [num_rows, 32] of float or int32, aligned to 64 bytes
  DotRead next;
  DotWrite output;
  // Other work, done before the piece's sums are written: background(part) for ascending parts.
  std::int64_t num_parts = 0;
  absl::FunctionRef<void(std::int64_t part)> background = NoPart;
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
