#include "kernels/cpu/gemm_dot_weights.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "kernels/argument_checks.h"
#include "kernels/cpu/gemm_dot.h"
#include "kernels/cpu/memory.h"
#include "kernels/status_macros.h"

namespace spillway::cpu {
namespace {

// Of a group of INT8: q + 128 instead of q.
constexpr std::uint32_t kInt8Offset = 0x80808080;

// Columns [0, columns.size()) of a panel, each `depth_bytes` long, at any address; the bits of `flip` are inverted in
// every group. Block by block, so that what is written stays in the first-level cache until its lines are complete.
void PackPanel(std::span<const std::byte* const> columns, std::int64_t depth_bytes, std::uint32_t flip,
               std::byte* panel) {
  static_assert(sizeof(flip) == kDotGroupBytes);
  for (std::int64_t begin = 0; begin < depth_bytes; begin += kDotBlockBytes, panel += 2 * kDotHalfBytes) {
    const std::int64_t size = std::min(depth_bytes - begin, kDotBlockBytes);
    for (std::size_t n = 0; n < columns.size(); ++n) {
      const auto column = static_cast<std::int64_t>(n);
      std::byte* const to =
          panel + column / kDotHalfColumns * kDotHalfBytes + column % kDotHalfColumns * kDotGroupBytes;
      const std::byte* const from = columns[n] + begin;
      const auto pack = [&](std::int64_t at, std::int64_t group_bytes) {
        std::uint32_t group = 0;
        std::memcpy(&group, from + at, static_cast<std::size_t>(group_bytes));
        group ^= flip;
        std::memcpy(to + at * kDotHalfColumns, &group, static_cast<std::size_t>(group_bytes));
      };
      std::int64_t at = 0;
      for (; at + kDotGroupBytes <= size; at += kDotGroupBytes) pack(at, kDotGroupBytes);
      if (at < size) pack(at, size - at);
    }
  }
}

// Gate and up: 16 columns of each make a panel, so that what is made of both follows each piece.
bool ArePair(std::span<const MatrixView> parts) {
  return parts.size() == 2 && parts[0].rows == parts[1].rows && parts[0].rows % kDotHalfColumns == 0;
}

// Room for the panels of `parts`, whose elements become element_bytes wide.
absl::StatusOr<DotWeights> Reserve(std::span<const MatrixView> parts, std::int64_t rows, std::int64_t element_bytes) {
  DotWeights weights;
  weights.rows = rows;
  weights.cols = parts[0].cols;
  weights.is_paired = ArePair(parts);
  weights.num_blocks = (weights.cols * element_bytes + kDotBlockBytes - 1) / kDotBlockBytes;
  const std::int64_t num_panels = (rows + kPanelColumns - 1) / kPanelColumns;
  ASSIGN_OR_RETURN(weights.panels,
                   MapPages(static_cast<std::size_t>(num_panels * weights.num_blocks * 2 * kDotHalfBytes), nullptr));
  return weights;
}

// Calls pack(panel, the matrix's rows that are its columns, memory, worker's scratch) for every panel.
template <typename Pack>
void ForPanels(DotWeights& weights, std::span<const MatrixView> parts, WorkerPool& pool, Pack pack) {
  const std::vector<const std::byte*> stacked = RowsOf(parts);
  std::vector<const std::byte*> rows = stacked;
  if (weights.is_paired) {
    for (std::size_t n = 0; n < rows.size(); ++n) {
      constexpr std::size_t kHalf = kDotHalfColumns;
      rows[n] = stacked[n / kHalf % 2 * (rows.size() / 2) + n / (2 * kHalf) * kHalf + n % kHalf];
    }
  }
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

absl::StatusOr<DotWeights> DotWeightsOfBF16(std::span<const MatrixView> parts, WorkerPool& pool) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
  ASSIGN_OR_RETURN(DotWeights weights, Reserve(parts, rows, 2));
  ForPanels(weights, parts, pool,
            [&](std::int64_t, std::span<const std::byte* const> columns, std::byte* panel, Scratch&) {
              PackPanel(columns, 2 * weights.cols, 0, panel);
            });
  return weights;
}

absl::StatusOr<DotWeights> DotWeightsRoundedToInt8(const GemmBodies& bodies, std::span<const MatrixView> parts,
                                                   WorkerPool& pool) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPackInt8(parts));
  ASSIGN_OR_RETURN(DotWeights weights, Reserve(parts, rows, 1));
  weights.scales.resize(static_cast<std::size_t>((rows + kPanelColumns - 1) / kPanelColumns * kPanelColumns));
  ForPanels(weights, parts, pool,
            [&](std::int64_t index, std::span<const std::byte* const> columns, std::byte* panel, Scratch& scratch) {
              auto* const rounded =
                  reinterpret_cast<std::int8_t*>(scratch.Get(static_cast<std::size_t>(kPanelColumns * weights.cols)));
              std::vector<const std::byte*> rounded_columns;
              for (std::size_t n = 0; n < columns.size(); ++n) {
                std::int8_t* const column = rounded + static_cast<std::int64_t>(n) * weights.cols;
                weights.scales[static_cast<std::size_t>(index * kPanelColumns) + n] =
                    bodies.round_to_int8(columns[n], parts[0].dtype, weights.cols, column, kDotBlockBytes).scale;
                rounded_columns.push_back(reinterpret_cast<const std::byte*>(column));
              }
              PackPanel(rounded_columns, weights.cols, kInt8Offset, panel);
            });
  return weights;
}

}  // namespace spillway::cpu
