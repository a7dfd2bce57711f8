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

// Up to so many rows memory is the limit.
constexpr std::int64_t kFewRows = 2 * kDotTileRows;
constexpr std::int64_t kSlicesPerWorkerOfFewRows = 4;
constexpr std::int64_t kSlicesPerWorker = 2;
constexpr std::int64_t kMaxPanelsPerSlice = 8;
// More rows meet a panel in cuts of k that stay in the first-level cache while all rows of a pass stream by, and the
// rows of a pass in chunks of k that stay in the second-level cache while all panels of a slice do.
constexpr std::int64_t kBlocksPerCut = 16;
constexpr std::int64_t kBlocksPerChunk = 32;
constexpr std::int64_t kChunkBytes = std::int64_t{768} << 10;
// Up to so many rows are rearranged by one worker.
constexpr std::int64_t kRowsPerItem = 16;

// `total` in equal parts of `most` at most: the size of all but the last.
std::int64_t EqualParts(std::int64_t total, std::int64_t most) {
  const std::int64_t parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

// Columns [0, columns.size()) of a panel, each `depth_bytes` long, at any address. Block by block, so that what is
// written stays in the first-level cache until its lines are complete.
void PackPanel(std::span<const std::byte* const> columns, std::int64_t depth_bytes, std::byte* panel) {
  for (std::int64_t begin = 0; begin < depth_bytes; begin += kDotBlockBytes, panel += 2 * kDotHalfBytes) {
    const std::int64_t size = std::min(depth_bytes - begin, kDotBlockBytes);
    for (std::size_t n = 0; n < columns.size(); ++n) {
      const auto column = static_cast<std::int64_t>(n);
      std::byte* const to =
          panel + column / kDotHalfColumns * kDotHalfBytes + column % kDotHalfColumns * kDotGroupBytes;
      const std::byte* const from = columns[n] + begin;
      std::int64_t at = 0;
      for (; at + kDotGroupBytes <= size; at += kDotGroupBytes) {
        std::memcpy(to + at * kDotHalfColumns, from + at, kDotGroupBytes);
      }
      if (at < size) std::memcpy(to + at * kDotHalfColumns, from + at, static_cast<std::size_t>(size - at));
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
  bool MultipliesGateUp() const override { return rows() % (2 * kPanelColumns) == 0; }
  absl::Status MultiplyGateUp(const WorkPlace& place, const GateUpArgs& args) const override;

 private:
  std::int64_t num_panels() const { return (rows() + kPanelColumns - 1) / kPanelColumns; }
  std::int64_t num_blocks() const { return weights_.num_blocks; }
  bool is_int8() const { return !weights_.scales.empty(); }

  struct Activations {
    DotRows rows;
    std::span<const Int8Sum> sums;  // where they are INT8
  };
  // What becomes of finished sums.
  struct Output {
    const GemmArgs* gemm = nullptr;       // one of the two
    const GateUpArgs* gate_up = nullptr;  // the panels that belong together are half of all panels apart

    std::int64_t panels_per_group() const { return gate_up != nullptr ? 2 : 1; }
  };
  struct Slice {
    std::int64_t row_begin = 0;
    std::int64_t row_end = 0;
    std::int64_t begin = 0;  // of the panels in the order in which they are multiplied
    std::int64_t end = 0;
  };

  absl::Status MultiplyRows(const WorkPlace& place, const std::byte* a, DType a_dtype, std::int64_t num_rows,
                            const Output& output) const;
  Activations Arrange(const WorkPlace& place, const std::byte* a, DType a_dtype, std::int64_t num_rows) const;
  void MultiplySlice(const Activations& a, const Output& output, const Slice& slice, Scratch& scratch) const;
  void Finish(const Activations& a, const Output& output, const Slice& slice, std::int64_t index,
              std::byte* sums) const;

  // Of the panel that is multiplied index-th: the halves of gate and up alternate.
  std::int64_t PanelAt(const Output& output, std::int64_t index) const {
    return output.gate_up != nullptr ? index % 2 * (num_panels() / 2) + index / 2 : index;
  }
  const std::byte* PanelData(std::int64_t panel, std::int64_t block) const {
    return weights_.panels.get() + (panel * num_blocks() + block) * 2 * kDotHalfBytes;
  }

  const DotBody body_;
  const GemmBodies& bodies_;
  const Weights weights_;
};

// Rows as the body reads them: the caller's own where they are that.
DotMatrix::Activations DotMatrix::Arrange(const WorkPlace& place, const std::byte* a, DType a_dtype,
                                          std::int64_t num_rows) const {
  const std::int64_t row_bytes = cols() * static_cast<std::int64_t>(SizeOf(a_dtype));
  const std::int64_t padded_bytes = num_blocks() * kDotBlockBytes;
  const bool in_tiles = body_.wants_tiles && num_rows > kFewRows;
  if (!in_tiles && !is_int8() && row_bytes == padded_bytes) {
    return {{.data = a, .row_stride = row_bytes, .tile_stride = kDotTileRows * row_bytes}, {}};
  }
  const std::int64_t num_tiles = (num_rows + kDotTileRows - 1) / kDotTileRows;
  const std::int64_t data_bytes = num_tiles * kDotTileRows * padded_bytes;
  std::byte* const data = place.call.Get(static_cast<std::size_t>(data_bytes) +
                                         (is_int8() ? static_cast<std::size_t>(num_rows) * sizeof(Int8Sum) : 0));
  auto* const sums = reinterpret_cast<Int8Sum*>(data + data_bytes);
  DotRows rows{.data = data, .row_stride = padded_bytes, .tile_stride = kDotTileRows * padded_bytes};
  if (in_tiles) {
    rows.row_stride = kDotBlockBytes;
    rows.block_stride = kDotTileRows * kDotBlockBytes;
  }
  const auto arrange = [&](std::int64_t m, Scratch& scratch) {
    const std::byte* from = a + m * row_bytes;
    std::int64_t from_bytes = row_bytes;
    if (is_int8()) {
      std::byte* const rounded = scratch.Get(static_cast<std::size_t>(cols()));
      sums[m] = bodies_.round_to_int8(from, a_dtype, cols(), reinterpret_cast<std::int8_t*>(rounded));
      from = rounded;
      from_bytes = cols();
    }
    std::byte* to = data + m / kDotTileRows * rows.tile_stride + m % kDotTileRows * rows.row_stride;
    for (; from_bytes >= kDotBlockBytes;
         from_bytes -= kDotBlockBytes, from += kDotBlockBytes, to += rows.block_stride) {
      std::memcpy(to, from, static_cast<std::size_t>(kDotBlockBytes));
    }
    if (from_bytes == 0) return;
    std::memcpy(to, from, static_cast<std::size_t>(from_bytes));
    std::memset(to + from_bytes, 0, static_cast<std::size_t>(kDotBlockBytes - from_bytes));
  };
  place.pool.ParallelFor((num_rows + kRowsPerItem - 1) / kRowsPerItem, place.worker,
                         [&](std::int64_t item, Scratch& scratch) {
                           const std::int64_t end = std::min((item + 1) * kRowsPerItem, num_rows);
                           for (std::int64_t m = item * kRowsPerItem; m < end; ++m) arrange(m, scratch);
                         });
  return {rows,
          is_int8() ? std::span<const Int8Sum>(sums, static_cast<std::size_t>(num_rows)) : std::span<const Int8Sum>()};
}

void DotMatrix::Finish(const Activations& a, const Output& output, const Slice& slice, std::int64_t index,
                       std::byte* sums) const {
  const std::int64_t num_rows = slice.row_end - slice.row_begin;
  const std::int64_t panel_floats = num_rows * kPanelColumns;
  auto* const floats = reinterpret_cast<float*>(sums);
  const std::int64_t group = output.panels_per_group();
  if (is_int8()) {
    const auto of_rows = a.sums.subspan(static_cast<std::size_t>(slice.row_begin), static_cast<std::size_t>(num_rows));
    for (std::int64_t i = 0; i < group; ++i) {
      bodies_.scale_int8(reinterpret_cast<std::byte*>(floats + i * panel_floats), of_rows,
                         weights_.scales.data() + PanelAt(output, index + i) * kPanelColumns);
    }
  }
  const std::int64_t column = PanelAt(output, index) * kPanelColumns;
  if (output.gate_up != nullptr) {
    const GateUpArgs& args = *output.gate_up;
    const std::int64_t inner = rows() / 2;
    bodies_.silu_mul(
        {.gate = floats,
         .up = floats + panel_floats,
         .num_rows = num_rows,
         .out = args.out + (slice.row_begin * inner + column) * static_cast<std::int64_t>(SizeOf(args.out_dtype)),
         .out_dtype = args.out_dtype,
         .out_stride = inner});
    return;
  }
  const GemmArgs& args = *output.gemm;
  bodies_.write_out({.sums = floats,
                     .num_rows = num_rows,
                     .sums_stride = kPanelColumns,
                     .bias = args.bias,
                     .output = args.output,
                     .out = args.out + slice.row_begin * rows(),
                     .columns = rows(),
                     .column_begin = column,
                     .column_end = std::min(column + kPanelColumns, rows())});
}

void DotMatrix::MultiplySlice(const Activations& a, const Output& output, const Slice& slice, Scratch& scratch) const {
  DotPiece piece;
  piece.num_rows = slice.row_end - slice.row_begin;
  const bool has_few_rows = piece.num_rows <= kFewRows;
  const std::int64_t blocks_per_chunk = has_few_rows ? num_blocks() : EqualParts(num_blocks(), kBlocksPerChunk);
  const std::int64_t blocks_per_cut = has_few_rows ? num_blocks() : EqualParts(blocks_per_chunk, kBlocksPerCut);
  // Sums of all panels are kept from chunk to chunk; with a single chunk, those of a group.
  const std::int64_t group = output.panels_per_group();
  const std::int64_t kept_panels = blocks_per_chunk < num_blocks() ? slice.end - slice.begin : group;
  const std::int64_t sums_bytes = piece.num_rows * kPanelColumns * static_cast<std::int64_t>(sizeof(float));
  std::byte* const sums = scratch.Get(static_cast<std::size_t>(kept_panels * sums_bytes));
  for (std::int64_t chunk = 0; chunk < num_blocks(); chunk += blocks_per_chunk) {
    const std::int64_t chunk_end = std::min(chunk + blocks_per_chunk, num_blocks());
    for (std::int64_t index = slice.begin; index < slice.end; ++index) {
      piece.sums = sums + (index - slice.begin) % kept_panels * sums_bytes;
      for (std::int64_t block = chunk; block < chunk_end; block += blocks_per_cut) {
        piece.a = a.rows.From(slice.row_begin, block);
        piece.panel = PanelData(PanelAt(output, index), block);
        piece.num_blocks = std::min(blocks_per_cut, chunk_end - block);
        piece.is_first = block == 0;
        piece.next = index + 1 < slice.end ? PanelData(PanelAt(output, index + 1), block) : nullptr;
        piece.next_bytes = piece.num_blocks * 2 * kDotHalfBytes;
        body_.multiply(piece);
      }
      const bool is_complete = chunk_end == num_blocks() && (index + 1 - slice.begin) % group == 0;
      if (is_complete) Finish(a, output, slice, index + 1 - group, piece.sums - (group - 1) * sums_bytes);
    }
  }
}

absl::Status DotMatrix::MultiplyRows(const WorkPlace& place, const std::byte* a, DType a_dtype, std::int64_t num_rows,
                                     const Output& output) const {
  if (num_rows == 0) return absl::OkStatus();
  const Activations arranged = Arrange(place, a, a_dtype, num_rows);
  const std::int64_t group = output.panels_per_group();
  const std::int64_t slices_per_worker = num_rows <= kFewRows ? kSlicesPerWorkerOfFewRows : kSlicesPerWorker;
  const std::int64_t panels_per_slice =
      group * std::clamp<std::int64_t>(num_panels() / group / (slices_per_worker * place.pool.num_workers()), 1,
                                       kMaxPanelsPerSlice / group);
  const std::int64_t num_slices = (num_panels() + panels_per_slice - 1) / panels_per_slice;
  const std::int64_t chunk_stride = EqualParts(num_blocks(), kBlocksPerChunk) * kDotBlockBytes;
  const std::int64_t rows_per_pass = EqualParts(num_rows, kChunkBytes / chunk_stride);
  const std::int64_t whole_tiles = (rows_per_pass + kFewRows - 1) / kFewRows * kFewRows;
  const std::int64_t num_passes = (num_rows + whole_tiles - 1) / whole_tiles;
  place.pool.ParallelFor(num_passes * num_slices, place.worker, [&](std::int64_t item, Scratch& scratch) {
    const std::int64_t pass = item / num_slices;
    const std::int64_t begin = item % num_slices * panels_per_slice;
    MultiplySlice(arranged, output,
                  {.row_begin = pass * whole_tiles,
                   .row_end = std::min((pass + 1) * whole_tiles, num_rows),
                   .begin = begin,
                   .end = std::min(begin + panels_per_slice, num_panels())},
                  scratch);
  });
  return absl::OkStatus();
}

absl::Status DotMatrix::Multiply(const WorkPlace& place, const GemmArgs& args) const {
  if (!is_int8() && args.a_dtype != DType::kBF16) return ActivationsUnlikeWeight(args, DType::kBF16);
  return MultiplyRows(place, args.a, args.a_dtype, args.num_rows, {.gemm = &args});
}

absl::Status DotMatrix::MultiplyGateUp(const WorkPlace& place, const GateUpArgs& args) const {
  if (!is_int8() && args.a_dtype != DType::kBF16) return ActivationsUnlikeWeight(GemmOf(args), DType::kBF16);
  return MultiplyRows(place, args.a, args.a_dtype, args.num_rows, {.gate_up = &args});
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
