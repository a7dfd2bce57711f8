#include "kernels/argument_checks.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/int8.h"
#include "kernels/status_macros.h"

namespace spillway {

absl::StatusOr<std::int64_t> StackedRows(std::span<const MatrixView> parts) {
  if (parts.empty()) return absl::InvalidArgumentError("pack: no parts");
  std::int64_t rows = 0;
  for (const MatrixView& part : parts) {
    if (part.rows <= 0 || part.cols <= 0 || part.row_stride < part.cols || part.data == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("pack: a part of ", part.rows, " x ", part.cols,
                                                     " with row stride ", part.row_stride, " is no matrix"));
    }
    if (part.dtype != parts[0].dtype || part.cols != parts[0].cols) {
      return absl::InvalidArgumentError(absl::StrCat("pack: parts differ: ", std::string(NameOf(parts[0].dtype)),
                                                     " with ", parts[0].cols, " columns, ",
                                                     std::string(NameOf(part.dtype)), " with ", part.cols));
    }
    rows += part.rows;
  }
  return rows;
}

absl::StatusOr<std::int64_t> RowsToPack(std::span<const MatrixView> parts) {
  if (!parts.empty() && parts[0].dtype != DType::kF32 && parts[0].dtype != DType::kBF16) {
    return absl::InvalidArgumentError(absl::StrCat("pack: dtype ", std::string(NameOf(parts[0].dtype)),
                                                   " has no kernels, only float32 and bfloat16"));
  }
  return StackedRows(parts);
}

absl::StatusOr<std::int64_t> RowsToPackInt8(std::span<const MatrixView> parts) {
  ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
  if (parts[0].cols <= kMaxInt8Depth) return rows;
  return absl::InvalidArgumentError(
      absl::StrCat("pack: ", parts[0].cols, " columns of an int8 matrix, the limit is ", kMaxInt8Depth));
}

absl::Status TokenOutsideTable(const EmbedArgs& args, std::int64_t index) {
  return absl::InternalError(absl::StrCat("embed: token ", TokenAt(args, index), " at row ", index,
                                          " is outside the table of ", args.table.rows, " rows"));
}

absl::Status ActivationsUnlikeWeight(const GemmArgs& args, DType weight_dtype) {
  return absl::InternalError(absl::StrCat("gemm: activations of ", std::string(NameOf(args.a_dtype)), ", weight of ",
                                          std::string(NameOf(weight_dtype))));
}

}  // namespace spillway
