#include "kernels/cpu/gemm.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/argument_checks.h"
#include "kernels/cpu/memory.h"
#include "kernels/status_macros.h"

namespace spillway::cpu {
namespace {

// Rows of one pass over a slice's weights, so that the running sums stay in the second-level cache.
constexpr std::int64_t kRowsPerPass = 192;
constexpr std::int64_t kMaxPanelsPerSlice = 4;

// `rows` are the columns of this panel, fewer in the last one.
template <typename W>
void PackPanel(std::span<const std::byte* const> rows, std::int64_t depth, W* panel) {
  // Cut so that what is written stays in the first-level cache until its lines are complete.
  constexpr std::int64_t kDepthPerPass = 64;
  for (std::int64_t begin = 0; begin < depth; begin += kDepthPerPass) {
    const std::int64_t end = std::min(begin + kDepthPerPass, depth);
    for (std::size_t n = 0; n < rows.size(); ++n) {
      W* const column = panel + (sizeof(W) == 4 ? n : n < 16 ? 2 * n : 2 * (n - 16) + 1);
      for (std::int64_t k = begin; k < end; ++k) {
        std::memcpy(column + k * kPanelColumns, rows[n] + static_cast<std::size_t>(k) * sizeof(W), sizeof(W));
      }
    }
  }
}

// First row of a block when num_rows are spread over num_blocks.
std::int64_t BlockBegin(std::int64_t block, std::int64_t num_blocks, std::int64_t num_rows) {
  return block * (num_rows / num_blocks) + std::min(block, num_rows % num_blocks);
}

void PackRows(const GemmArgs& args, std::int64_t begin, std::int64_t end, float* to) {
  const std::int64_t depth = args.weight->cols();
  const std::int64_t stride = end - begin;
  for (std::int64_t m = begin; m < end; ++m) {
    float* const column = to + (m - begin);
    if (args.a_dtype == DType::kF32) {
      const auto* const row = reinterpret_cast<const float*>(args.a) + m * depth;
      for (std::int64_t k = 0; k < depth; ++k) column[k * stride] = row[k];
    } else {
      const auto* const row = reinterpret_cast<const std::uint16_t*>(args.a) + m * depth;
      for (std::int64_t k = 0; k < depth; ++k) column[k * stride] = FloatFromBF16(row[k]);
    }
  }
}

class PanelMatrix final : public CpuMatrix {
 public:
  PanelMatrix(const GemmBodies& bodies, std::int64_t rows, std::int64_t cols, DType dtype, Buffer panels)
      : CpuMatrix(rows, cols, panels.size_bytes), bodies_(bodies), dtype_(dtype), panels_(std::move(panels)) {}

  absl::Status Multiply(const WorkPlace& place, const GemmArgs& args) const override;
  UpcomingReads ReadsOf(std::int64_t num_rows, const WorkerPool& pool) const override;

 private:
  std::int64_t num_panels() const { return (rows() + kPanelColumns - 1) / kPanelColumns; }
  std::int64_t PanelsPerSlice(const WorkerPool& pool) const {
    return std::clamp<std::int64_t>(num_panels() / (4 * pool.num_workers()), 1, kMaxPanelsPerSlice);
  }

  const GemmBodies& bodies_;
  const DType dtype_;
  const Buffer panels_;
};

UpcomingReads PanelMatrix::ReadsOf(std::int64_t num_rows, const WorkerPool& pool) const {
  if (num_rows > bodies_.rows_per_block) return {};
  const std::int64_t panels_per_slice = PanelsPerSlice(pool);
  const std::int64_t panel_bytes = kPanelColumns * cols() * static_cast<std::int64_t>(SizeOf(dtype_));
  return {panels_.get(), panels_per_slice * panel_bytes, (num_panels() + panels_per_slice - 1) / panels_per_slice};
}

absl::Status PanelMatrix::Multiply(const WorkPlace& place, const GemmArgs& args) const {
  if (args.a_dtype != dtype_) return ActivationsUnlikeWeight(args, dtype_);
  if (args.num_rows == 0) return absl::OkStatus();
  const std::int64_t depth = cols();
  const std::int64_t num_blocks = (args.num_rows + bodies_.rows_per_block - 1) / bodies_.rows_per_block;
  auto* const packed =
      reinterpret_cast<float*>(place.call.Get(static_cast<std::size_t>(args.num_rows * depth) * sizeof(float)));
  const auto pack = [&](std::int64_t block, Scratch&) {
    const std::int64_t begin = BlockBegin(block, num_blocks, args.num_rows);
    PackRows(args, begin, BlockBegin(block + 1, num_blocks, args.num_rows), packed + begin * depth);
  };
  if (num_blocks > 4) {
    place.pool.ParallelFor(num_blocks, place.worker, pack);
  } else {
    for (std::int64_t block = 0; block < num_blocks; ++block) pack(block, place.worker);
  }

  const std::int64_t panels_per_slice = PanelsPerSlice(place.pool);
  const std::int64_t num_slices = (num_panels() + panels_per_slice - 1) / panels_per_slice;
  const std::int64_t blocks_per_pass = std::max<std::int64_t>(1, kRowsPerPass / bodies_.rows_per_block);
  const auto run = dtype_ == DType::kF32 ? bodies_.f32 : bodies_.bf16;
  const auto multiply = [&](std::int64_t slice, Scratch& scratch) {
    for (std::int64_t block = 0; block < num_blocks; block += blocks_per_pass) {
      const std::int64_t block_end = std::min(block + blocks_per_pass, num_blocks);
      const std::int64_t begin = BlockBegin(block, num_blocks, args.num_rows);
      GemmSlice work;
      work.a = packed + begin * depth;
      work.num_rows = BlockBegin(block_end, num_blocks, args.num_rows) - begin;
      work.num_blocks = block_end - block;
      work.depth = depth;
      work.panels = panels_.get();
      work.bias = args.bias;
      work.output = args.output;
      work.out = args.out + begin * rows();
      work.columns = rows();
      work.panel_begin = slice * panels_per_slice;
      work.panel_end = std::min(work.panel_begin + panels_per_slice, num_panels());
      const std::int64_t sums = work.num_rows * (work.panel_end - work.panel_begin) * kPanelColumns;
      work.sums = reinterpret_cast<float*>(scratch.Get(static_cast<std::size_t>(sums) * sizeof(float)));
      run(work);
    }
  };
  place.pool.ParallelFor(num_slices, place.worker, multiply, ReadsOfNext(args.next, args.num_rows, place.pool));
  return absl::OkStatus();
}

}  // namespace

absl::Status CpuMatrix::MultiplyGateUp(const WorkPlace&, const GateUpArgs&) const {
  return absl::InternalError("this matrix does not multiply gate and up in one pass");
}

UpcomingReads ReadsOfNext(const PackedMatrix* next, std::int64_t num_rows, const WorkerPool& pool) {
  return next != nullptr ? static_cast<const CpuMatrix*>(next)->ReadsOf(num_rows, pool) : UpcomingReads{};
}

std::vector<const std::byte*> RowsOf(std::span<const MatrixView> parts) {
  std::vector<const std::byte*> rows;
  for (const MatrixView& part : parts) {
    for (std::int64_t r = 0; r < part.rows; ++r) {
      rows.push_back(part.data + static_cast<std::size_t>(r * part.row_stride) * SizeOf(part.dtype));
    }
  }
  return rows;
}

absl::StatusOr<std::unique_ptr<CpuMatrix>> PackPanels(const GemmBodies& bodies, std::span<const MatrixView> parts,
                                                      WorkerPool& pool) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
  const DType dtype = parts[0].dtype;
  const std::int64_t depth = parts[0].cols;
  const std::int64_t num_panels = (rows + kPanelColumns - 1) / kPanelColumns;
  const std::size_t panel_bytes = static_cast<std::size_t>(kPanelColumns * depth) * SizeOf(dtype);
  ASSIGN_OR_RETURN(Buffer panels, MapPages(static_cast<std::size_t>(num_panels) * panel_bytes, nullptr));
  const std::vector<const std::byte*> columns = RowsOf(parts);
  const std::span<const std::byte* const> all(columns);
  Scratch scratch;
  pool.ParallelFor(num_panels, scratch, [&](std::int64_t index, Scratch&) {
    const auto begin = static_cast<std::size_t>(index * kPanelColumns);
    const auto of_panel = all.subspan(begin, std::min<std::size_t>(kPanelColumns, all.size() - begin));
    std::byte* const panel = panels.get() + static_cast<std::size_t>(index) * panel_bytes;
    if (dtype == DType::kF32) {
      PackPanel(of_panel, depth, reinterpret_cast<float*>(panel));
    } else {
      PackPanel(of_panel, depth, reinterpret_cast<std::uint16_t*>(panel));
    }
  });
  return std::make_unique<PanelMatrix>(bodies, rows, depth, dtype, std::move(panels));
}

}  // namespace spillway::cpu
