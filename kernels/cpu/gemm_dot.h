#pragma once

// GEMM by the dot instructions of newer x86 cores (AVX512_BF16, AMX), which multiply groups of neighbouring k.
//
// An output element is one chain of these instructions over ascending k, whatever the number of rows, the block of rows
// it falls into, the cut of k and the worker: its bits depend on its inputs and on the instruction alone.
//
// Panel  32 columns, [block of k][half: 16 columns][group of k][column][4 bytes]. A block is 64 bytes of each column, a
//        group 4 bytes of it: one half of a block is one tile of AMX. k is padded with zeros to whole blocks, columns
//        to whole panels.

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

// Some rows against a piece of one panel: sums[m][n] (+)= over k of a[m][k] * panel[k][n].
struct DotPiece {
  const std::byte* a = nullptr;  // at the first block of the piece
  std::int64_t a_stride = 0;     // bytes from row to row
  std::int64_t num_rows = 0;
  const std::byte* panel = nullptr;  // at the first block of the piece
  std::int64_t num_blocks = 0;
  bool is_first = false;  // the sums begin at zero
  float* sums = nullptr;  // [num_rows, 32], aligned to 64 bytes
};

using DotBody = void (*)(const DotPiece&);

// FAILED_PRECONDITION, and why, where this machine lacks the instructions.
absl::StatusOr<DotBody> Avx512DotBody();
// Asks the system to let this process use AMX.
absl::StatusOr<DotBody> AmxDotBody();

// BF16 parts, as RowsToPack accepts them. `pool` packs.
absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotPanels(DotBody body, const GemmBodies& bodies,
                                                         std::span<const MatrixView> parts, WorkerPool& pool);

}  // namespace spillway::cpu
