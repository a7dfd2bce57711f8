#include "kernels/cpu/gemm_onednn.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <oneapi/dnnl/dnnl.hpp>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/argument_checks.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/tsan.h"
#include "kernels/element.h"
#include "kernels/status_macros.h"

namespace spillway::cpu {
namespace {

using dnnl::memory;

memory::data_type TypeOf(DType dtype) {
  return dtype == DType::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
}

constexpr absl::string_view kInvariantImplementation = "brg:avx512_core";

// product[m, n] = sum over k of a[m, k] * w[k, n], m < rows, n < columns. All dense: with a strided product oneDNN
// falls back to its plain loops.
struct Shape {
  std::int64_t rows = 0;
  std::int64_t depth = 0;
  std::int64_t columns = 0;
  auto operator<=>(const Shape&) const = default;
};

// What all matrices of one dtype share: the engine and the primitives made so far, by shape. Any thread.
class Primitives {
 public:
  explicit Primitives(DType dtype) : dtype_(dtype), engine_(dnnl::engine::kind::cpu, 0) {}

  DType dtype() const { return dtype_; }
  const dnnl::engine& engine() const { return engine_; }

  // With the layout of the weights left to oneDNN.
  dnnl::matmul::primitive_desc Describe(const Shape& shape) const { return Describe(shape, AnyWeights(shape)); }

  struct Matmul {
    dnnl::matmul::primitive_desc description;
    dnnl::matmul primitive;
  };
  // For weights in the layout that one row chooses: one packing serves every number of rows.
  const Matmul& Of(const Shape& shape) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = made_.find(shape);
    if (found != made_.end()) return found->second;
    const memory::desc weights = LayoutOf(shape.depth, shape.columns);
    const dnnl::matmul::primitive_desc description = Describe(shape, weights);
    if (!absl::StartsWith(description.impl_info_str(), kInvariantImplementation)) {
      throw dnnl::error(dnnl_unimplemented, "no implementation with equal bits for every number of rows");
    }
    return made_.emplace(shape, Matmul{description, dnnl::matmul(description)}).first->second;
  }

  memory::desc LayoutOf(std::int64_t depth, std::int64_t columns) const {
    return Describe({1, depth, columns}).weights_desc();
  }

 private:
  memory::desc AnyWeights(const Shape& shape) const {
    return {{shape.depth, shape.columns}, TypeOf(dtype_), memory::format_tag::any};
  }
  dnnl::matmul::primitive_desc Describe(const Shape& shape, const memory::desc& weights) const {
    const memory::desc a({shape.rows, shape.depth}, TypeOf(dtype_), memory::format_tag::ab);
    const memory::desc out({shape.rows, shape.columns}, memory::data_type::f32, memory::format_tag::ab);
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    return {dnnl::matmul::desc(a, weights, out), attributes, engine_};
  }

  const DType dtype_;
  const dnnl::engine engine_;
  std::mutex mutex_;
  std::map<Shape, Matmul> made_;  // guarded by mutex_; entries stay where they are
};

// Few different numbers of rows, so that few primitives are made: all up to 64, then multiples of 64 up to 512.
std::int64_t RowsOfOneCall(std::int64_t rows_left) {
  return rows_left <= 64 ? rows_left : std::min<std::int64_t>(rows_left / 64 * 64, 512);
}

// The cut is a function of the matrix alone, so that bits cannot depend on the number of workers: some eight slices of
// whole cache lines, to be balanced over the workers.
std::int64_t ColumnsPerSlice(std::int64_t columns) {
  return std::clamp<std::int64_t>((columns + 511) / 512 * 64, 64, 1024);
}

// Columns [begin, begin + columns) of a matrix.
struct Slice {
  std::int64_t begin = 0;
  std::int64_t columns = 0;
  Buffer weights;
};

class OneDnnMatrix final : public CpuMatrix {
 public:
  OneDnnMatrix(std::int64_t rows, std::int64_t cols, std::size_t size_bytes, std::vector<Slice> slices,
               std::shared_ptr<Primitives> primitives)
      : CpuMatrix(rows, cols, size_bytes), slices_(std::move(slices)), primitives_(std::move(primitives)) {}

  absl::Status Multiply(const WorkPlace& place, const GemmArgs& args) const override {
    if (args.a_dtype != primitives_->dtype()) return ActivationsUnlikeWeight(args, primitives_->dtype());
    std::atomic<bool> has_failed = false;
    place.pool.ParallelFor(static_cast<std::int64_t>(slices_.size()), place.worker,
                           [&](std::int64_t slice, Scratch& scratch) {
                             // oneDNN reports by exception; none may leave a worker.
                             try {
                               MultiplySlice(slices_[static_cast<std::size_t>(slice)], args, scratch);
                             } catch (const dnnl::error&) {
                               has_failed = true;
                             }
                           });
    if (!has_failed) return absl::OkStatus();
    return absl::InternalError(
        absl::StrCat("onednn: matmul of ", args.num_rows, " rows, ", cols(), " to ", rows(), " columns failed"));
  }

 private:
  void MultiplySlice(const Slice& slice, const GemmArgs& args, Scratch& scratch) const {
    omp_set_num_threads(1);
    const std::size_t row_bytes = static_cast<std::size_t>(cols()) * SizeOf(args.a_dtype);
    for (std::int64_t m = 0; m < args.num_rows;) {
      const Shape shape = {RowsOfOneCall(args.num_rows - m), cols(), slice.columns};
      const Primitives::Matmul& matmul = primitives_->Of(shape);
      const std::size_t pad_bytes = (matmul.description.scratchpad_desc().get_size() + 63) / 64 * 64;
      const std::size_t product_bytes = static_cast<std::size_t>(shape.rows * shape.columns) * sizeof(float);
      std::byte* const pad = scratch.Get(pad_bytes + product_bytes);
      auto* const product = reinterpret_cast<float*>(pad + pad_bytes);
      const std::byte* const a = args.a + static_cast<std::size_t>(m) * row_bytes;

      DeclareRead(a, static_cast<std::size_t>(shape.rows) * row_bytes);
      DeclareRead(slice.weights.get(), slice.weights.size_bytes);
      DeclareWrite(product, product_bytes);
      dnnl::stream stream(primitives_->engine());
      const auto memory_of = [&](const memory::desc& layout, const void* data) {
        return memory(layout, primitives_->engine(), const_cast<void*>(data));
      };
      matmul.primitive.execute(stream,
                               {{DNNL_ARG_SRC, memory_of(matmul.description.src_desc(), a)},
                                {DNNL_ARG_WEIGHTS, memory_of(matmul.description.weights_desc(), slice.weights.get())},
                                {DNNL_ARG_DST, memory_of(matmul.description.dst_desc(), product)},
                                {DNNL_ARG_SCRATCHPAD, memory_of(matmul.description.scratchpad_desc(), pad)}});
      stream.wait();
      WriteOut(args, slice, m, shape.rows, product);
      m += shape.rows;
    }
  }

  void WriteOut(const GemmArgs& args, const Slice& slice, std::int64_t first_row, std::int64_t num_rows,
                const float* product) const {
    for (std::int64_t r = 0; r < num_rows; ++r) {
      float* const out = args.out + (first_row + r) * rows() + slice.begin;
      for (std::int64_t n = 0; n < slice.columns; ++n) {
        float sum = product[r * slice.columns + n];
        if (args.bias != nullptr) sum += args.bias[slice.begin + n];
        out[n] = args.output == GemmOutput::kAdd ? out[n] + sum : sum;
      }
    }
  }

  const std::vector<Slice> slices_;
  const std::shared_ptr<Primitives> primitives_;
};

class Packer final : public OneDnnPacker {
 public:
  explicit Packer(DType dtype) : primitives_(std::make_shared<Primitives>(dtype)) {}

  absl::StatusOr<std::unique_ptr<CpuMatrix>> Pack(std::span<const MatrixView> parts) const override {
    ASSIGN_OR_RETURN(const std::int64_t rows, RowsToPack(parts));
    omp_set_num_threads(1);
    const std::int64_t depth = parts[0].cols;
    const std::int64_t row_bytes = depth * static_cast<std::int64_t>(SizeOf(parts[0].dtype));
    std::vector<const std::byte*> row_of;
    for (const MatrixView& part : parts) {
      for (std::int64_t r = 0; r < part.rows; ++r) {
        row_of.push_back(part.data + r * part.row_stride * static_cast<std::int64_t>(SizeOf(part.dtype)));
      }
    }
    const std::int64_t columns_per_slice = ColumnsPerSlice(rows);
    std::vector<Slice> slices;
    std::size_t size_bytes = 0;
    std::vector<std::byte> plain(static_cast<std::size_t>(columns_per_slice * row_bytes));
    for (std::int64_t begin = 0; begin < rows; begin += columns_per_slice) {
      const std::int64_t columns = std::min(columns_per_slice, rows - begin);
      for (std::int64_t n = 0; n < columns; ++n) {
        std::memcpy(plain.data() + n * row_bytes, row_of[static_cast<std::size_t>(begin + n)],
                    static_cast<std::size_t>(row_bytes));
      }
      const memory::desc from({depth, columns}, TypeOf(parts[0].dtype), memory::dims{1, depth});
      const memory::desc to = primitives_->LayoutOf(depth, columns);
      ASSIGN_OR_RETURN(Buffer weights, MapPages(to.get_size(), nullptr));
      memory source(from, primitives_->engine(), plain.data());
      memory target(to, primitives_->engine(), weights.get());
      dnnl::stream stream(primitives_->engine());
      dnnl::reorder(source, target).execute(stream, source, target);
      stream.wait();
      size_bytes += weights.size_bytes;
      slices.push_back({begin, columns, std::move(weights)});
    }
    return std::make_unique<OneDnnMatrix>(rows, depth, size_bytes, std::move(slices), primitives_);
  }

  std::string ImplementationOf(std::int64_t rows) const {
    return primitives_->Describe({rows, kProbeDepth, kProbeColumns}).impl_info_str();
  }

  static constexpr std::int64_t kProbeDepth = 340;
  static constexpr std::int64_t kProbeColumns = 192;

 private:
  const std::shared_ptr<Primitives> primitives_;
};

// Whether the same row has the same bits among 1, 7 and 64 rows.
absl::StatusOr<bool> IsInvariant(const Packer& packer, DType dtype) {
  constexpr std::int64_t kMaxRows = 64;
  // Any values do that round in every sum: a small linear congruence.
  const auto fill = [dtype](std::int64_t size, std::uint32_t seed) {
    std::vector<std::byte> array(static_cast<std::size_t>(size) * SizeOf(dtype));
    for (std::int64_t i = 0; i < size; ++i) {
      seed = seed * 1664525U + 1013904223U;
      StoreElement(array.data(), dtype, i, static_cast<float>(seed >> 8) * 0x1p-24F - 0.5F);
    }
    return array;
  };
  const std::vector<std::byte> w = fill(Packer::kProbeColumns * Packer::kProbeDepth, 1);
  const std::vector<std::byte> a = fill(kMaxRows * Packer::kProbeDepth, 2);
  const MatrixView view = {w.data(), dtype, Packer::kProbeColumns, Packer::kProbeDepth, Packer::kProbeDepth};
  ASSIGN_OR_RETURN(const std::unique_ptr<CpuMatrix> weight, packer.Pack({&view, 1}));
  WorkerPool pool(1);
  Scratch call;
  Scratch worker;
  std::vector<float> expected;
  for (const std::int64_t num_rows : {kMaxRows, std::int64_t{7}, std::int64_t{1}}) {
    std::vector<float> out(static_cast<std::size_t>(num_rows * Packer::kProbeColumns));
    GemmArgs args;
    args.a = a.data();
    args.a_dtype = dtype;
    args.num_rows = num_rows;
    args.weight = weight.get();
    args.out = out.data();
    RETURN_IF_ERROR(weight->Multiply({pool, call, worker}, args));
    if (expected.empty()) expected = out;
    if (std::memcmp(out.data(), expected.data(), out.size() * sizeof(float)) != 0) return false;
  }
  return true;
}

absl::StatusOr<std::unique_ptr<OneDnnPacker>> Probe(DType dtype) {
  auto packer = std::make_unique<Packer>(dtype);
  for (const std::int64_t rows : {1, 7, 64}) {
    const std::string implementation = packer->ImplementationOf(rows);
    if (!absl::StartsWith(implementation, kInvariantImplementation)) {
      return absl::FailedPreconditionError(absl::StrCat("onednn has ", implementation, " for ", rows, " rows"));
    }
  }
  ASSIGN_OR_RETURN(const bool is_invariant, IsInvariant(*packer, dtype));
  if (!is_invariant) return absl::FailedPreconditionError("onednn gives a row other bits among 1, 7 and 64 rows");
  return packer;
}

}  // namespace

std::string OneDnnVersion() {
  const dnnl_version_t* const version = dnnl_version();
  return absl::StrCat(version->major, ".", version->minor, ".", version->patch);
}

absl::StatusOr<std::unique_ptr<OneDnnPacker>> MakeOneDnnPacker(DType dtype) {
  try {
    return Probe(dtype);
  } catch (const dnnl::error& error) {
    return absl::FailedPreconditionError(
        absl::StrCat("onednn has no ", std::string(NameOf(dtype)), " matmul: ", error.what()));
  }
}

}  // namespace spillway::cpu
