#include "kernels/cpu/gemm_dot.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/argument_checks.h"
#include "kernels/cpu/memory.h"
#include "kernels/status_macros.h"

namespace spillway::cpu {
namespace {

// Rows of one pass over a slice's panels: their activations stay in the second-level cache.
constexpr std::int64_t kBytesPerPass = std::int64_t{1} << 20;
// Cut of k where several tiles of rows read the same piece of a panel.
constexpr std::int64_t kBlocksPerCut = 32;
// Up to so many rows memory is the limit, and small slices balance it over the workers.
constexpr std::int64_t kFewRows = 64;
constexpr std::int64_t kMaxPanelsOfFewRows = 4;
constexpr std::int64_t kMaxPanelsPerSlice = 12;

constexpr std::int64_t RoundUp(std::int64_t value, std::int64_t unit) { return (value + unit - 1) / unit * unit; }

// Columns [0, columns.size()) of a panel, each `depth_bytes` long, at any address.
void PackPanel(std::span<const std::byte* const> columns, std::int64_t depth_bytes, std::byte* panel) {
  for (std::size_t n = 0; n < columns.size(); ++n) {
    std::byte* const column = panel + static_cast<std::int64_t>(n) / kDotHalfColumns * kDotHalfBytes +
                              static_cast<std::int64_t>(n) % kDotHalfColumns * kDotGroupBytes;
    for (std::int64_t at = 0; at < depth_bytes; at += kDotGroupBytes) {
      std::byte* const to = column + at / kDotBlockBytes * 2 * kDotHalfBytes +
                            at % kDotBlockBytes / kDotGroupBytes * kDotHalfColumns * kDotGroupBytes;
      if (at + kDotGroupBytes <= depth_bytes) {
        std::memcpy(to, columns[n] + at, kDotGroupBytes);
      } else {
        std::memcpy(to, columns[n] + at, static_cast<std::size_t>(depth_bytes - at));
      }
    }
  }
}

class DotMatrix final : public CpuMatrix {
 public:
  DotMatrix(DotBody body, const GemmBodies& bodies, std::int64_t rows, std::int64_t cols, Buffer panels)
      : CpuMatrix(rows, cols, panels.size_bytes), body_(body), bodies_(bodies), panels_(std::move(panels)) {}

  absl::Status Multiply(const WorkPlace& place, const GemmArgs& args) const override;

 private:
  std::int64_t num_panels() const { return (rows() + kPanelColumns - 1) / kPanelColumns; }
  std::int64_t num_blocks() const { return panels_.size_bytes / (num_panels() * 2 * kDotHalfBytes); }

  // Whole blocks of k, as the bodies read them.
  struct Activations {
    const std::byte* data;
    std::int64_t stride;
  };
  Activations Prepare(const WorkPlace& place, const GemmArgs& args) const;
  void MultiplySlice(const GemmArgs& args, const Activations& a, std::int64_t panel_begin, std::int64_t panel_end,
                     Scratch& scratch) const;

  const DotBody body_;
  const GemmBodies& bodies_;
  const Buffer panels_;
};

DotMatrix::Activations DotMatrix::Prepare(const WorkPlace& place, const GemmArgs& args) const {
  const std::int64_t row_bytes = cols() * 2;
  const std::int64_t padded_bytes = num_blocks() * kDotBlockBytes;
  if (row_bytes == padded_bytes) return {args.a, row_bytes};
  std::byte* const padded = place.call.Get(static_cast<std::size_t>(args.num_rows * padded_bytes));
  for (std::int64_t m = 0; m < args.num_rows; ++m) {
    std::byte* const row = padded + m * padded_bytes;
    std::memcpy(row, args.a + m * row_bytes, static_cast<std::size_t>(row_bytes));
    std::memset(row + row_bytes, 0, static_cast<std::size_t>(padded_bytes - row_bytes));
  }
  return {padded, padded_bytes};
}

void DotMatrix::MultiplySlice(const GemmArgs& args, const Activations& a, std::int64_t panel_begin,
                              std::int64_t panel_end, Scratch& scratch) const {
  const std::int64_t rows_per_pass = std::max<std::int64_t>(kBytesPerPass / a.stride, kPanelColumns);
  const std::int64_t panel_bytes = num_blocks() * 2 * kDotHalfBytes;
  const std::int64_t sums_size = std::min(args.num_rows, rows_per_pass) * kPanelColumns;
  DotPiece piece;
  piece.a_stride = a.stride;
  piece.sums = reinterpret_cast<float*>(scratch.Get(static_cast<std::size_t>(sums_size) * sizeof(float)));
  for (std::int64_t m = 0; m < args.num_rows; m += rows_per_pass) {
    piece.num_rows = std::min(args.num_rows - m, rows_per_pass);
    const std::int64_t blocks_per_cut = piece.num_rows <= kPanelColumns ? num_blocks() : kBlocksPerCut;
    for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (std::int64_t block = 0; block < num_blocks(); block += blocks_per_cut) {
        piece.a = a.data + m * a.stride + block * kDotBlockBytes;
        piece.panel = panels_.get() + panel * panel_bytes + block * 2 * kDotHalfBytes;
        piece.num_blocks = std::min(blocks_per_cut, num_blocks() - block);
        piece.is_first = block == 0;
        body_(piece);
      }
      bodies_.write_out({.sums = piece.sums,
                         .num_rows = piece.num_rows,
                         .sums_stride = kPanelColumns,
                         .bias = args.bias,
                         .output = args.output,
                         .out = args.out + m * rows(),
                         .columns = rows(),
                         .column_begin = panel * kPanelColumns,
                         .column_end = std::min((panel + 1) * kPanelColumns, rows())});
    }
  }
}

absl::Status DotMatrix::Multiply(const WorkPlace& place, const GemmArgs& args) const {
  if (args.a_dtype != DType::kBF16) return ActivationsUnlikeWeight(args, DType::kBF16);
  if (args.num_rows == 0) return absl::OkStatus();
  const Activations a = Prepare(place, args);
  const std::int64_t panels_per_slice =
      std::clamp<std::int64_t>(num_panels() / (4 * place.pool.num_workers()), 1,
                               args.num_rows <= kFewRows ? kMaxPanelsOfFewRows : kMaxPanelsPerSlice);
  const std::int64_t num_slices = (num_panels() + panels_per_slice - 1) / panels_per_slice;
  place.pool.ParallelFor(num_slices, place.worker, [&](std::int64_t slice, Scratch& scratch) {
    const std::int64_t begin = slice * panels_per_slice;
    MultiplySlice(args, a, begin, std::min(begin + panels_per_slice, num_panels()), scratch);
  });
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotPanels(DotBody body, const GemmBodies& bodies,
                                                         std::span<const MatrixView> parts, WorkerPool& pool) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
  const std::int64_t depth_bytes = parts[0].cols * static_cast<std::int64_t>(SizeOf(parts[0].dtype));
  const std::int64_t num_panels = (rows + kPanelColumns - 1) / kPanelColumns;
  const std::int64_t panel_bytes = RoundUp(depth_bytes, kDotBlockBytes) * kPanelColumns;
  ASSIGN_OR_RETURN(Buffer panels, MapPages(static_cast<std::size_t>(num_panels * panel_bytes), nullptr));
  const std::vector<const std::byte*> columns = RowsOf(parts);
  const std::span<const std::byte* const> all(columns);
  Scratch scratch;
  pool.ParallelFor(num_panels, scratch, [&](std::int64_t panel, Scratch&) {
    const auto begin = static_cast<std::size_t>(panel * kPanelColumns);
    PackPanel(all.subspan(begin, std::min<std::size_t>(kPanelColumns, all.size() - begin)), depth_bytes,
              panels.get() + panel * panel_bytes);
  });
  return std::make_unique<DotMatrix>(body, bodies, rows, parts[0].cols, std::move(panels));
}

}  // namespace spillway::cpu
