#include "kernels/cpu/gemm_dot.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "kernels/argument_checks.h"
#include "kernels/cpu/gemm_dot_weights.h"
#include "kernels/status_macros.h"

namespace spillway::cpu {
namespace {

// More rows meet the panels in chunks of k, so that their part of a chunk, with one of a panel, stays in the
// second-level cache while all panels of a slice pass by.
constexpr std::int64_t kBlocksPerChunk = 32;
constexpr std::int64_t kChunkBytes = std::int64_t{768} << 10;
// Of a matrix of several chunks sums of all panels of a slice are kept from chunk to chunk.
constexpr std::int64_t kPanelsPerKeptSlice = 8;
constexpr std::int64_t kPanelsPerSlice = 4;
// Of panels that are read once.
constexpr std::int64_t kMostBytesReadOnce = std::int64_t{256} << 10;
// From so many rows per worker on, workers share rows, not columns: weights are read by each, but rows, which a
// worker's part of the kernels before made, are in its caches.
constexpr std::int64_t kRowsPerWorker = 128;
// Up to so many rows are rearranged by one worker.
constexpr std::int64_t kRowsPerItem = 16;
constexpr std::int64_t kInt8RowsPerItem = 4;
constexpr std::int64_t kSumBytes = 4;
constexpr std::int64_t kSumsRowBytes = kPanelColumns * kSumBytes;

// `total` in equal parts of `most` at most: the size of all but the last.
std::int64_t EqualParts(std::int64_t total, std::int64_t most) {
  const std::int64_t parts = (total + most - 1) / most;
  return (total + parts - 1) / parts;
}

class DotMatrix final : public CpuMatrix {
 public:
  DotMatrix(DotBody body, const GemmBodies& bodies, DotWeights weights)
      : CpuMatrix(weights.rows, weights.cols, weights.panels.size_bytes + weights.scales.size() * sizeof(float)),
        body_(body),
        bodies_(bodies),
        weights_(std::move(weights)) {}

  absl::Status Multiply(const WorkPlace& place, const GemmArgs& args) const override;
  bool MultipliesGateUp() const override { return weights_.is_paired; }
  absl::Status MultiplyGateUp(const WorkPlace& place, const GateUpArgs& args) const override;
  UpcomingReads ReadsOf(std::int64_t num_rows, const WorkerPool& pool) const override;

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
    const GemmArgs* gemm = nullptr;  // one of the two
    const GateUpArgs* gate_up = nullptr;
    const PackedMatrix* next = nullptr;  // of that one
  };
  struct Slice {
    std::int64_t row_begin = 0;
    std::int64_t row_end = 0;
    std::int64_t begin = 0;  // panels
    std::int64_t end = 0;
    std::int64_t next_begin = 0;  // of the slice that the same worker most likely multiplies next
  };
  // Rows of one piece, and its panel.
  struct Place {
    std::int64_t row = 0;
    std::int64_t num_rows = 0;
    std::int64_t panel = 0;
  };
  // Rows whose sums are complete.
  struct Finished {
    std::int64_t num_rows = 0;
    std::int64_t rows_per_part = 1;  // of 32 sums each
    std::int64_t num_writes = 0;
    std::array<GemmWrite, 2> writes;
    SiluMulWrite silu_mul;  // where there are no writes
  };

  absl::Status MultiplyRows(const WorkPlace& place, const std::byte* a, DType a_dtype, std::int64_t num_rows,
                            const Output& output) const;
  Activations Arrange(const WorkPlace& place, const std::byte* a, DType a_dtype, std::int64_t num_rows) const;
  void MultiplySlice(const Activations& a, const Output& output, const Slice& slice, Scratch& scratch) const;
  DotWrite WrittenBy(const Output& output, const Place& at) const;
  // What is to be done with the sums of a piece.
  Finished Finish(const Activations& a, const Output& output, const Place& at, const std::byte* sums) const;

  // Of passes of so many rows: a panel that is read once is read from end to end.
  std::int64_t BlocksPerChunk(std::int64_t num_rows) const {
    return num_rows <= kDotPieceRows ? num_blocks() : EqualParts(num_blocks(), kBlocksPerChunk);
  }
  std::int64_t PanelsPerSlice(std::int64_t num_rows) const {
    return BlocksPerChunk(num_rows) < num_blocks() ? kPanelsPerKeptSlice : kPanelsPerSlice;
  }
  // The first column of a panel and of its second half.
  std::array<std::int64_t, 2> ColumnsOf(std::int64_t panel) const {
    if (!weights_.is_paired) return {panel * kPanelColumns, panel * kPanelColumns + kDotHalfColumns};
    return {panel * kDotHalfColumns, rows() / 2 + panel * kDotHalfColumns};
  }
  // What a worker reads behind a panel's part of a chunk.
  const std::byte* NextPanel(const Slice& slice, std::int64_t panel, std::int64_t chunk, std::int64_t chunk_end) const {
    if (panel + 1 < slice.end) return PanelData(panel + 1, chunk);
    if (chunk_end < num_blocks()) return PanelData(slice.begin, chunk_end);
    return PanelData(slice.next_begin, 0);
  }
  const std::byte* PanelData(std::int64_t panel, std::int64_t block) const {
    return weights_.panels.get() + panel * PanelBytes() + block * 2 * kDotHalfBytes;
  }
  std::int64_t PanelBytes() const { return num_blocks() * 2 * kDotHalfBytes; }

  const DotBody body_;
  const GemmBodies& bodies_;
  const DotWeights weights_;
};

// Rows as the body reads them: the caller's own where they are that.
DotMatrix::Activations DotMatrix::Arrange(const WorkPlace& place, const std::byte* a, DType a_dtype,
                                          std::int64_t num_rows) const {
  const std::int64_t row_bytes = cols() * static_cast<std::int64_t>(SizeOf(a_dtype));
  const std::int64_t padded_bytes = num_blocks() * kDotBlockBytes;
  const bool in_tiles = body_.wants_tiles && (is_int8() || num_rows > kDotPieceRows);
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
  const auto arrange = [&](std::int64_t m) {
    const std::byte* from = a + m * row_bytes;
    std::int64_t from_bytes = row_bytes;
    std::byte* to = data + m / kDotTileRows * rows.tile_stride + m % kDotTileRows * rows.row_stride;
    if (is_int8()) {
      sums[m] = bodies_.round_to_int8(from, a_dtype, cols(), reinterpret_cast<std::int8_t*>(to), rows.block_stride);
      if (const std::int64_t rest = cols() % kDotBlockBytes; rest != 0) {
        std::memset(to + cols() / kDotBlockBytes * rows.block_stride + rest, 0,
                    static_cast<std::size_t>(kDotBlockBytes - rest));
      }
      return;
    }
    for (; from_bytes >= kDotBlockBytes;
         from_bytes -= kDotBlockBytes, from += kDotBlockBytes, to += rows.block_stride) {
      std::memcpy(to, from, static_cast<std::size_t>(kDotBlockBytes));
    }
    if (from_bytes == 0) return;
    std::memcpy(to, from, static_cast<std::size_t>(from_bytes));
    std::memset(to + from_bytes, 0, static_cast<std::size_t>(kDotBlockBytes - from_bytes));
  };
  const std::int64_t rows_per_item = is_int8() ? kInt8RowsPerItem : kRowsPerItem;
  place.pool.ParallelFor((num_rows + rows_per_item - 1) / rows_per_item, place.worker,
                         [&](std::int64_t item, Scratch&) {
                           const std::int64_t end = std::min((item + 1) * rows_per_item, num_rows);
                           for (std::int64_t m = item * rows_per_item; m < end; ++m) arrange(m);
                         });
  return {rows,
          is_int8() ? std::span<const Int8Sum>(sums, static_cast<std::size_t>(num_rows)) : std::span<const Int8Sum>()};
}

DotWrite DotMatrix::WrittenBy(const Output& output, const Place& at) const {
  const std::int64_t column = ColumnsOf(at.panel)[0];
  if (output.gate_up != nullptr) {
    const GateUpArgs& args = *output.gate_up;
    const auto size = static_cast<std::int64_t>(SizeOf(args.out_dtype));
    const std::int64_t inner = rows() / 2;
    return {args.out + (at.row * inner + column) * size, inner * size, kDotHalfColumns * size};
  }
  const auto size = static_cast<std::int64_t>(sizeof(float));
  return {reinterpret_cast<std::byte*>(output.gemm->out + at.row * rows() + column), rows() * size,
          std::min(weights_.is_paired ? kDotHalfColumns : kPanelColumns, rows() - column) * size};
}

DotMatrix::Finished DotMatrix::Finish(const Activations& a, const Output& output, const Place& at,
                                      const std::byte* sums) const {
  const auto sums_of = [&](std::int64_t half) {
    const std::int64_t column = at.panel * kPanelColumns + half * kDotHalfColumns;
    return GemmSums{sums + half * kDotHalfColumns * kSumBytes, is_int8() ? weights_.scales.data() + column : nullptr};
  };
  const Int8Sum* const int8_rows = is_int8() ? a.sums.data() + at.row : nullptr;
  Finished finished;
  finished.num_rows = at.num_rows;
  if (output.gate_up != nullptr) {
    finished.rows_per_part = 2;
    finished.silu_mul = {.gate = sums_of(0),
                         .up = sums_of(1),
                         .sums_stride = kPanelColumns,
                         .int8_rows = int8_rows,
                         .out = WrittenBy(output, at).data,
                         .out_dtype = output.gate_up->out_dtype,
                         .out_stride = rows() / 2,
                         .columns = kDotHalfColumns};
    return finished;
  }
  const GemmArgs& args = *output.gemm;
  const std::int64_t most_columns = weights_.is_paired ? kDotHalfColumns : kPanelColumns;
  for (std::int64_t half = 0; half < kPanelColumns / most_columns; ++half) {
    const std::int64_t column = ColumnsOf(at.panel)[static_cast<std::size_t>(half)];
    finished.writes[static_cast<std::size_t>(finished.num_writes++)] = {
        .sums = sums_of(half),
        .sums_stride = kPanelColumns,
        .int8_rows = int8_rows,
        .bias = args.bias,
        .output = args.output,
        .out = args.out + at.row * rows(),
        .columns = rows(),
        .column_begin = column,
        .column_end = std::min(column + most_columns, rows())};
  }
  return finished;
}

void DotMatrix::MultiplySlice(const Activations& a, const Output& output, const Slice& slice, Scratch& scratch) const {
  const std::int64_t num_rows = slice.row_end - slice.row_begin;
  const std::int64_t num_pieces = (num_rows + kDotPieceRows - 1) / kDotPieceRows;
  const bool is_read_once = num_pieces == 1;
  const std::int64_t blocks_per_chunk = BlocksPerChunk(num_rows);
  // Sums that a later chunk adds to. Others are written out at once.
  const bool keeps = blocks_per_chunk < num_blocks();
  const std::int64_t num_sums = keeps ? (slice.end - slice.begin) * num_rows : 2 * kDotPieceRows;
  std::byte* const sums = scratch.Get(static_cast<std::size_t>(num_sums * kSumsRowBytes));
  std::int64_t passing = 0;  // of two, in turns: one is finished while the other is made
  // Finished beside the next piece, as few at a time as the processor can look ahead.
  Finished finished;
  const auto finish = [&](std::int64_t part) {
    const std::int64_t begin = part * finished.rows_per_part;
    const std::int64_t end = std::min(begin + finished.rows_per_part, finished.num_rows);
    if (finished.num_writes == 0) bodies_.silu_mul(finished.silu_mul, begin, end);
    for (std::int64_t i = 0; i < finished.num_writes; ++i) {
      bodies_.write_out(finished.writes[static_cast<std::size_t>(i)], begin, end);
    }
  };
  const auto num_parts = [&] { return (finished.num_rows + finished.rows_per_part - 1) / finished.rows_per_part; };
  std::int64_t begun_rows = 0;
  for (std::int64_t chunk = 0; chunk < num_blocks(); chunk += blocks_per_chunk) {
    const std::int64_t chunk_end = std::min(chunk + blocks_per_chunk, num_blocks());
    const bool completes = chunk_end == num_blocks();
    for (std::int64_t panel = slice.begin; panel < slice.end; ++panel) {
      const DotRead next = {NextPanel(slice, panel, chunk, chunk_end), (chunk_end - chunk) * 2 * kDotHalfBytes};
      for (std::int64_t m = 0; m < num_rows; m += kDotPieceRows) {
        const Place at = {slice.row_begin + m, std::min(num_rows - m, kDotPieceRows), panel};
        if (at.num_rows != begun_rows) body_.begin(at.num_rows);
        begun_rows = at.num_rows;
        std::byte* const piece_sums =
            sums + (keeps ? (panel - slice.begin) * num_rows + m : passing * kDotPieceRows) * kSumsRowBytes;
        passing = 1 - passing;
        body_.multiply(
            {.a = a.rows.From(at.row, chunk),
             .num_rows = at.num_rows,
             .panel = PanelData(panel, chunk),
             .num_blocks = chunk_end - chunk,
             .is_first = chunk == 0,
             .is_read_once = is_read_once,
             .sums = piece_sums,
             .next = next.Part(m / kDotPieceRows, num_pieces),
             .output = completes ? WrittenBy(output, at) : DotWrite{piece_sums, kSumsRowBytes, kSumsRowBytes},
             .num_parts = num_parts(),
             .background = finish});
        finished.num_rows = 0;
        if (completes) finished = Finish(a, output, at, piece_sums);
      }
    }
  }
  body_.end();
  for (std::int64_t part = 0; part < num_parts(); ++part) finish(part);
}

absl::Status DotMatrix::MultiplyRows(const WorkPlace& place, const std::byte* a, DType a_dtype, std::int64_t num_rows,
                                     const Output& output) const {
  if (num_rows == 0) return absl::OkStatus();
  const Activations arranged = Arrange(place, a, a_dtype, num_rows);
  const UpcomingReads upcoming = ReadsOfNext(output.next, num_rows, place.pool);
  if (num_rows <= kDotPieceRows) {
    const auto multiply = [&](std::int64_t begin, std::int64_t end, Scratch& scratch) {
      MultiplySlice(arranged, output,
                    {.row_begin = 0, .row_end = num_rows, .begin = begin, .end = end, .next_begin = end % num_panels()},
                    scratch);
    };
    place.pool.ParallelForRanges(num_panels(), std::max<std::int64_t>(kMostBytesReadOnce / PanelBytes(), 1),
                                 place.worker, multiply, upcoming);
    return absl::OkStatus();
  }
  const std::int64_t blocks_per_chunk = BlocksPerChunk(num_rows);
  const std::int64_t most_rows = std::max(kChunkBytes / (blocks_per_chunk * kDotBlockBytes), kDotPieceRows);
  std::int64_t num_passes = (num_rows + most_rows - 1) / most_rows;
  const std::int64_t num_workers = place.pool.num_workers();
  if (num_rows >= kRowsPerWorker * num_workers) {
    num_passes = (num_passes + num_workers - 1) / num_workers * num_workers;
  }
  // In whole pieces.
  const std::int64_t num_pieces = (num_rows + kDotPieceRows - 1) / kDotPieceRows;
  const std::int64_t rows_per_pass = (num_pieces + num_passes - 1) / num_passes * kDotPieceRows;
  const std::int64_t panels_per_slice = PanelsPerSlice(num_rows);
  const std::int64_t num_slices = (num_panels() + panels_per_slice - 1) / panels_per_slice;
  const std::int64_t num_items = (num_rows + rows_per_pass - 1) / rows_per_pass * num_slices;
  const auto multiply = [&](std::int64_t item, Scratch& scratch) {
    const std::int64_t row_begin = item / num_slices * rows_per_pass;
    const std::int64_t begin = item % num_slices * panels_per_slice;
    MultiplySlice(arranged, output,
                  {.row_begin = row_begin,
                   .row_end = std::min(row_begin + rows_per_pass, num_rows),
                   .begin = begin,
                   .end = std::min(begin + panels_per_slice, num_panels()),
                   .next_begin = (item + 1) % num_slices * panels_per_slice},
                  scratch);
  };
  place.pool.ParallelFor(num_items, place.worker, multiply, upcoming);
  return absl::OkStatus();
}

absl::Status DotMatrix::Multiply(const WorkPlace& place, const GemmArgs& args) const {
  if (!is_int8() && args.a_dtype != DType::kBF16) return ActivationsUnlikeWeight(args, DType::kBF16);
  return MultiplyRows(place, args.a, args.a_dtype, args.num_rows, {.gemm = &args, .next = args.next});
}

absl::Status DotMatrix::MultiplyGateUp(const WorkPlace& place, const GateUpArgs& args) const {
  if (!is_int8() && args.a_dtype != DType::kBF16) return ActivationsUnlikeWeight(GemmOf(args), DType::kBF16);
  return MultiplyRows(place, args.a, args.a_dtype, args.num_rows, {.gate_up = &args, .next = args.next});
}

UpcomingReads DotMatrix::ReadsOf(std::int64_t num_rows, const WorkerPool& /*pool*/) const {
  if (num_rows > kDotPieceRows) return {};
  return {weights_.panels.get(), PanelBytes(), num_panels()};
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotBF16(DotBody body, const GemmBodies& bodies,
                                                       std::span<const MatrixView> parts, WorkerPool& pool) {
  ASSIGN_OR_RETURN(DotWeights weights, DotWeightsOfBF16(parts, pool));
  return std::make_unique<DotMatrix>(body, bodies, std::move(weights));
}

absl::StatusOr<std::unique_ptr<CpuMatrix>> PackDotInt8(DotBody body, const GemmBodies& bodies,
                                                       std::span<const MatrixView> parts, WorkerPool& pool) {
  ASSIGN_OR_RETURN(DotWeights weights, DotWeightsRoundedToInt8(bodies, parts, pool));
  return std::make_unique<DotMatrix>(body, bodies, std::move(weights));
}

}  // namespace spillway::cpu
