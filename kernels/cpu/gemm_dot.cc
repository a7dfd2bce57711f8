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
// Up to so many rows are rounded by one worker.
constexpr std::int64_t kFewRowsToRound = 8;

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
  struct Weights {
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t num_blocks = 0;
    Buffer panels;
    std::vector<float> scales;  // of the columns of all panels, where they are INT8
  };

  DotMatrix(DotBody body, const GemmBodies& bodies, Weights weights)
      : CpuMatrix(weights.rows, weights.cols, weights.panels.size_bytes + weights.scales.size() * sizeof(float)),
        body_(body),
        bodies_(bodies),
        weights_(std::move(weights)) {}

  absl::Status Multiply(const WorkPlace& place, const GemmArgs& args) const override;

 private:
  std::int64_t num_panels() const { return (rows() + kPanelColumns - 1) / kPanelColumns; }
  std::int64_t num_blocks() const { return weights_.num_blocks; }
  bool is_int8() const { return !weights_.scales.empty(); }

  // Whole blocks of k, as the bodies read them.
  struct Activations {
    const std::byte* data = nullptr;
    std::int64_t stride = 0;
    std::span<const Int8Sum> rows;  // where they are INT8
  };
  Activations PadBF16(const WorkPlace& place, const GemmArgs& args) const;
  Activations RoundToInt8(const WorkPlace& place, const GemmArgs& args) const;
  void MultiplySlice(const GemmArgs& args, const Activations& a, std::int64_t panel_begin, std::int64_t panel_end,
                     Scratch& scratch) const;

  const DotBody body_;
  const GemmBodies& bodies_;
  const Weights weights_;
};

DotMatrix::Activations DotMatrix::PadBF16(const WorkPlace& place, const GemmArgs& args) const {
  const std::int64_t row_bytes = cols() * 2;
  const std::int64_t padded_bytes = num_blocks() * kDotBlockBytes;
  if (row_bytes == padded_bytes) return {args.a, row_bytes, {}};
  std::byte* const padded = place.call.Get(static_cast<std::size_t>(args.num_rows * padded_bytes));
  for (std::int64_t m = 0; m < args.num_rows; ++m) {
    std::byte* const row = padded + m * padded_bytes;
    std::memcpy(row, args.a + m * row_bytes, static_cast<std::size_t>(row_bytes));
    std::memset(row + row_bytes, 0, static_cast<std::size_t>(padded_bytes - row_bytes));
  }
  return {padded, padded_bytes, {}};
}

DotMatrix::Activations DotMatrix::RoundToInt8(const WorkPlace& place, const GemmArgs& args) const {
  const std::int64_t row_bytes = cols() * static_cast<std::int64_t>(SizeOf(args.a_dtype));
  const std::int64_t padded_bytes = num_blocks() * kDotBlockBytes;
  const auto num_rows = static_cast<std::size_t>(args.num_rows);
  std::byte* const data = place.call.Get(num_rows * (static_cast<std::size_t>(padded_bytes) + sizeof(Int8Sum)));
  auto* const rows = reinterpret_cast<Int8Sum*>(data + args.num_rows * padded_bytes);
  const auto round = [&](std::int64_t m, Scratch&) {
    std::byte* const row = data + m * padded_bytes;
    rows[m] = bodies_.round_to_int8(args.a + m * row_bytes, args.a_dtype, cols(), reinterpret_cast<std::int8_t*>(row));
    std::memset(row + cols(), 0, static_cast<std::size_t>(padded_bytes - cols()));
  };
  if (args.num_rows > kFewRowsToRound) {
    place.pool.ParallelFor(args.num_rows, place.worker, round);
  } else {
    for (std::int64_t m = 0; m < args.num_rows; ++m) round(m, place.worker);
  }
  return {data, padded_bytes, {rows, num_rows}};
}

void DotMatrix::MultiplySlice(const GemmArgs& args, const Activations& a, std::int64_t panel_begin,
                              std::int64_t panel_end, Scratch& scratch) const {
  const std::int64_t rows_per_pass = std::max<std::int64_t>(kBytesPerPass / a.stride, kPanelColumns);
  const std::int64_t panel_bytes = num_blocks() * 2 * kDotHalfBytes;
  const std::int64_t sums_size = std::min(args.num_rows, rows_per_pass) * kPanelColumns;
  DotPiece piece;
  piece.a_stride = a.stride;
  piece.sums = scratch.Get(static_cast<std::size_t>(sums_size) * sizeof(float));
  for (std::int64_t m = 0; m < args.num_rows; m += rows_per_pass) {
    piece.num_rows = std::min(args.num_rows - m, rows_per_pass);
    const std::int64_t blocks_per_cut = piece.num_rows <= kPanelColumns ? num_blocks() : kBlocksPerCut;
    for (std::int64_t panel = panel_begin; panel < panel_end; ++panel) {
      for (std::int64_t block = 0; block < num_blocks(); block += blocks_per_cut) {
        piece.a = a.data + m * a.stride + block * kDotBlockBytes;
        piece.panel = weights_.panels.get() + panel * panel_bytes + block * 2 * kDotHalfBytes;
        piece.num_blocks = std::min(blocks_per_cut, num_blocks() - block);
        piece.is_first = block == 0;
        body_(piece);
      }
      if (is_int8()) {
        bodies_.scale_int8(piece.sums,
                           a.rows.subspan(static_cast<std::size_t>(m), static_cast<std::size_t>(piece.num_rows)),
                           weights_.scales.data() + panel * kPanelColumns);
      }
      bodies_.write_out({.sums = reinterpret_cast<const float*>(piece.sums),
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
  if (!is_int8() && args.a_dtype != DType::kBF16) return ActivationsUnlikeWeight(args, DType::kBF16);
  if (args.num_rows == 0) return absl::OkStatus();
  const Activations a = is_int8() ? RoundToInt8(place, args) : PadBF16(place, args);
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

// Room for the panels of `parts`, whose elements become element_bytes wide.
absl::StatusOr<DotMatrix::Weights> Reserve(std::span<const MatrixView> parts, std::int64_t rows,
                                           std::int64_t element_bytes) {
  DotMatrix::Weights weights;
  weights.rows = rows;
  weights.cols = parts[0].cols;
  weights.num_blocks = (weights.cols * element_bytes + kDotBlockBytes - 1) / kDotBlockBytes;
  const std::int64_t num_panels = (rows + kPanelColumns - 1) / kPanelColumns;
  ASSIGN_OR_RETURN(weights.panels,
                   MapPages(static_cast<std::size_t>(num_panels * weights.num_blocks * 2 * kDotHalfBytes), nullptr));
  return weights;
}

// Calls pack(panel, the matrix's rows that are its columns, memory, worker's scratch) for every panel.
template <typename Pack>
void ForPanels(DotMatrix::Weights& weights, std::span<const MatrixView> parts, WorkerPool& pool, Pack pack) {
  const std::vector<const std::byte*> rows = RowsOf(parts);
  const std::span<const std::byte* const> all(rows);
  const auto num_panels = static_cast<std::int64_t>((rows.size() + kPanelColumns - 1) / kPanelColumns);
  Scratch caller;
  pool.ParallelFor(num_panels, caller, [&](std::int64_t panel, Scratch& scratch) {
    const auto begin = static_cast<std::size_t>(panel * kPanelColumns);
    pack(panel, all.subspan(begin, std::min<std::size_t>(kPanelColumns, all.size() - begin)),
         weights.panels.get() + panel * weights.num_blocks * 2 * kDotHalfBytes, scratch);
  });
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotBF16(DotBody body, const GemmBodies& bodies,
                                                       std::span<const MatrixView> parts, WorkerPool& pool) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
  ASSIGN_OR_RETURN(DotMatrix::Weights weights, Reserve(parts, rows, 2));
  ForPanels(weights, parts, pool,
            [&](std::int64_t, std::span<const std::byte* const> columns, std::byte* panel, Scratch&) {
              PackPanel(columns, 2 * weights.cols, panel);
            });
  return std::make_unique<DotMatrix>(body, bodies, std::move(weights));
}

absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotInt8(DotBody body, const GemmBodies& bodies,
                                                       std::span<const MatrixView> parts, WorkerPool& pool) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPackInt8(parts));
  ASSIGN_OR_RETURN(DotMatrix::Weights weights, Reserve(parts, rows, 1));
  weights.scales.resize(static_cast<std::size_t>((rows + kPanelColumns - 1) / kPanelColumns * kPanelColumns));
  ForPanels(weights, parts, pool,
            [&](std::int64_t index, std::span<const std::byte* const> columns, std::byte* panel, Scratch& scratch) {
              auto* const rounded =
                  reinterpret_cast<std::int8_t*>(scratch.Get(static_cast<std::size_t>(kPanelColumns * weights.cols)));
              std::vector<const std::byte*> rounded_columns;
              for (std::size_t n = 0; n < columns.size(); ++n) {
                std::int8_t* const column = rounded + static_cast<std::int64_t>(n) * weights.cols;
                weights.scales[static_cast<std::size_t>(index * kPanelColumns) + n] =
                    bodies.round_to_int8(columns[n], parts[0].dtype, weights.cols, column).scale;
                for (std::int64_t k = 0; k < weights.cols; ++k) column[k] = static_cast<std::int8_t>(column[k] ^ 0x80);
                rounded_columns.push_back(reinterpret_cast<const std::byte*>(column));
              }
              PackPanel(rounded_columns, weights.cols, panel);
            });
  return std::make_unique<DotMatrix>(body, bodies, std::move(weights));
}

}  // namespace spillway::cpu
