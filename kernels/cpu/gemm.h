#pragma once

// Our own GEMM: weights in panels of 32 output columns, activations widened to float and packed by blocks of rows.
//
// An output element is one chain of fused multiply-adds over ascending k, whatever the number of rows, the block of
// rows it falls into, the cut of k, the worker and the SIMD target. That is what makes its bits depend on its inputs
// alone.
//
// Panel     [k][32 columns], the last one padded with zero columns. F32: columns in order. BF16: 16 words of 32 bits,
// word
//           j = column j in the low half, column 16 + j in the high half, so that a shift and a mask give two float
//           vectors.
// Row block [k][rows of the block], blocks in row order; all blocks of a call differ by at most one row.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/stream.h"
#include "kernels/cpu/targets.h"
#include "kernels/kernels.h"

namespace spillway::cpu {

inline constexpr std::int64_t kPanelColumns = 32;

struct GemmSlice {
  const float* a = nullptr;  // row blocks
  std::int64_t num_rows = 0;
  std::int64_t num_blocks = 0;
  std::int64_t depth = 0;             // k
  const std::byte* panels = nullptr;  // of the whole matrix
  const float* bias = nullptr;
  GemmOutput output = GemmOutput::kStore;
  float* out = nullptr;
  std::int64_t columns = 0;      // of the whole matrix, the stride of out
  std::int64_t panel_begin = 0;  // this slice
  std::int64_t panel_end = 0;
  float* sums = nullptr;  // [num_rows, (panel_end - panel_begin) * 32], working memory
};

struct DotPiece;

// A body of gemm_dot.h.
struct DotBody {
  void (*multiply)(const DotPiece&) = nullptr;                 // null: there is none
  bool wants_tiles = false;                                    // of more than two tiles of rows
  void (*begin)(std::int64_t num_rows) = [](std::int64_t) {};  // before pieces of so many rows on a thread, and
  void (*end)() = [] {};                                       // after the last one
};

// Of a row of integers.
struct Int8Sum {
  float scale = 0;
  std::int32_t sum = 0;
};

// Finished sums: floats, or of INT8 integers.
struct GemmSums {
  const std::byte* data = nullptr;       // [rows, columns] of 32 bits
  const float* column_scales = nullptr;  // of INT8
};

// Finished sums of some columns on their way to the output.
struct GemmWrite {
  GemmSums sums;
  std::int64_t sums_stride = 0;        // elements between rows
  const Int8Sum* int8_rows = nullptr;  // null: sums are floats
  const float* bias = nullptr;
  GemmOutput output = GemmOutput::kStore;
  float* out = nullptr;
  std::int64_t columns = 0;  // of the whole matrix, the stride of out
  std::int64_t column_begin = 0;
  std::int64_t column_end = 0;
};

// Finished sums of some columns of gate and of up.
struct SiluMulWrite {
  GemmSums gate;
  GemmSums up;
  std::int64_t sums_stride = 0;        // elements between rows
  const Int8Sum* int8_rows = nullptr;  // null: sums are floats
  std::byte* out = nullptr;            // at the first column
  DType out_dtype = DType::kF32;
  std::int64_t out_stride = 0;  // elements between rows
  std::int64_t columns = 0;     // whole vectors
};

struct GemmBodies {
  std::int64_t rows_per_block;  // at most
  void (*f32)(const GemmSlice&);
  void (*bf16)(const GemmSlice&);
  // Of rows [begin, end) of what is written.
  void (*write_out)(const GemmWrite&, std::int64_t begin, std::int64_t end);
  void (*silu_mul)(const SiluMulWrite&, std::int64_t begin, std::int64_t end);
  DotBody int8;
  // Rounds a row to INT8, in blocks of 64 at `block_stride`; returns its scale and the sum of its integers.
  Int8Sum (*round_to_int8)(const std::byte* row, DType dtype, std::int64_t size, std::int8_t* out,
                           std::int64_t block_stride);
};

const GemmBodies& GemmBodiesOf(Target target);

// A weight of the cpu device: knows how to multiply by itself.
class CpuMatrix : public PackedMatrix {
 public:
  // On the stream's thread. args.weight is this.
  virtual absl::Status Multiply(const WorkPlace& place, const GemmArgs& args) const = 0;
  // Whether it makes a GateUp in one pass; if so, on the stream's thread.
  virtual bool MultipliesGateUp() const { return false; }
  virtual absl::Status MultiplyGateUp(const WorkPlace& place, const GateUpArgs& args) const;
  // What the workers read of it when they multiply by few rows; of more: nothing, they share it in another way.
  virtual UpcomingReads ReadsOf(std::int64_t num_rows, const WorkerPool& pool) const = 0;

 protected:
  using PackedMatrix::PackedMatrix;
};

// Of a product that is followed by another of as many rows by `next`, which may be null.
UpcomingReads ReadsOfNext(const PackedMatrix* next, std::int64_t num_rows, const WorkerPool& pool);

// The rows of stacked parts, which a file may have laid at any address.
std::vector<const std::byte*> RowsOf(std::span<const MatrixView> parts);

// Parts as RowsToPack accepts them. `pool` packs.
absl::StatusOr<std::unique_ptr<CpuMatrix>> PackPanels(const GemmBodies& bodies, std::span<const MatrixView> parts,
                                                      WorkerPool& pool);

}  // namespace spillway::cpu
