// The functions of cuBLASLt that kernels/cuda/blas.cc looks up, on the CPU, for tests with emulated kernels: a library
// of its own, opened at run time as the real one is. It takes everything column-major, as cuBLASLt does, and offers
// three algorithms, of which the first splits k and wants its rows to be a power of two, and the second refuses few
// rows.

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels/tensor.h"

namespace spillway::emulation {

cudaError_t Queue(cudaStream_t stream, std::function<cudaError_t()> work);  // cuda_emulated_runtime.cc

}  // namespace spillway::emulation

namespace {

struct Layout {
  cudaDataType type;
  std::uint64_t rows;
  std::uint64_t columns;
  std::int64_t leading;
};
struct Description {
  cublasOperation_t first = CUBLAS_OP_N;
  cublasOperation_t second = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  std::int32_t bias_type = -1;
  const float* bias = nullptr;
};
enum Algorithm : std::uint64_t { kSplit, kManyRows, kSound, kNumAlgorithms };
constexpr std::int32_t kNumSplits = 2;
constexpr std::uint64_t kFewestRows = 16;  // that kManyRows takes

static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));
static_assert(sizeof(Description) <= sizeof(cublasLtMatmulDescOpaque_t));

template <typename T, typename Opaque>
T Read(const Opaque* opaque) {
  T value;
  std::memcpy(&value, opaque->data, sizeof(T));
  return value;
}
template <typename T, typename Opaque>
void Write(const T& value, Opaque* opaque) {
  std::memcpy(opaque->data, &value, sizeof(T));
}

// out = op(a) * op(b), all column-major.
struct Shapes {
  Layout a;
  Layout b;
  Layout c;
  Layout d;
  Description description;

  std::uint64_t depth() const { return description.first == CUBLAS_OP_T ? a.rows : a.columns; }
  bool Fit() const {
    const std::uint64_t rows = description.first == CUBLAS_OP_T ? a.columns : a.rows;
    const bool has_bias = description.epilogue == CUBLASLT_EPILOGUE_BIAS;
    return description.second == CUBLAS_OP_N && a.type == b.type && c.type == CUDA_R_32F && d.type == c.type &&
           d.rows == rows && d.columns == b.columns && b.rows == depth() && c.rows == d.rows &&
           c.columns == d.columns && a.leading >= static_cast<std::int64_t>(a.rows) &&
           b.leading >= static_cast<std::int64_t>(b.rows) && d.leading >= static_cast<std::int64_t>(d.rows) &&
           (!has_bias || description.bias_type == CUDA_R_32F);
  }
  bool AreTakenBy(Algorithm algorithm) const {
    if (algorithm == kSplit) return std::has_single_bit(d.columns);
    return algorithm == kSound || d.columns >= kFewestRows;
  }
};

Shapes ShapesOf(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                cublasLtMatrixLayout_t d) {
  return {Read<Layout>(a), Read<Layout>(b), Read<Layout>(c), Read<Layout>(d), Read<Description>(desc)};
}

float Element(const void* matrix, const Layout& layout, std::uint64_t row, std::uint64_t column) {
  const std::uint64_t at = column * static_cast<std::uint64_t>(layout.leading) + row;
  if (layout.type == CUDA_R_32F) return static_cast<const float*>(matrix)[at];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(matrix)[at];
  return layout.type == CUDA_R_16BF ? spillway::FloatFromBF16(bits) : spillway::FloatFromF16(bits);
}

void Multiply(const Shapes& s, float alpha, const void* a, const void* b, float beta, const float* c, float* d,
              Algorithm algorithm) {
  const bool transposes = s.description.first == CUBLAS_OP_T;
  const std::uint64_t num_parts = algorithm == kSplit ? kNumSplits : 1;
  std::vector<float> first(s.depth());
  for (std::uint64_t row = 0; row < s.d.rows; ++row) {
    for (std::uint64_t k = 0; k < s.depth(); ++k) {
      first[k] = transposes ? Element(a, s.a, k, row) : Element(a, s.a, row, k);
    }
    for (std::uint64_t column = 0; column < s.d.columns; ++column) {
      float sum = 0;
      for (std::uint64_t part = 0; part < num_parts; ++part) {
        float partial = 0;
        for (std::uint64_t k = s.depth() * part / num_parts; k < s.depth() * (part + 1) / num_parts; ++k) {
          partial += first[k] * Element(b, s.b, k, column);
        }
        sum += partial;
      }
      const std::uint64_t at = column * static_cast<std::uint64_t>(s.d.leading) + row;
      float result = alpha * sum;
      if (beta != 0) result += beta * c[column * static_cast<std::uint64_t>(s.c.leading) + row];
      if (s.description.epilogue == CUBLASLT_EPILOGUE_BIAS) result += s.description.bias[row];
      d[at] = result;
    }
  }
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  static int only;
  *handle = reinterpret_cast<cublasLtHandle_t>(&only);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t /*handle*/) { return CUBLAS_STATUS_SUCCESS; }
std::size_t cublasLtGetVersion() { return std::size_t{CUBLAS_VER_MAJOR} * 10000; }

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, std::uint64_t rows,
                                          std::uint64_t columns, std::int64_t leading) {
  *layout = new cublasLtMatrixLayoutOpaque_t;
  Write(Layout{type, rows, columns, leading}, *layout);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType_t scale) {
  if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_INVALID_VALUE;
  *desc = new cublasLtMatmulDescOpaque_t;
  Write(Description{}, *desc);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  delete desc;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, std::size_t size_bytes) {
  auto description = Read<Description>(desc);
  const auto set = [&](auto& field) {
    if (size_bytes != sizeof(field)) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&field, value, size_bytes);
    Write(description, desc);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(description.first);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set(description.second);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return set(description.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE:
      return set(description.bias_type);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return set(description.bias);
    default:
      return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new cublasLtMatmulPreferenceOpaque_t{};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t /*preference*/,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* /*value*/, std::size_t size_bytes) {
  const std::size_t expected = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES ? 8 : 4;
  return size_bytes == expected ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t /*handle*/, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                       cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result) {
  const Shapes shapes = ShapesOf(desc, a, b, c, d);
  if (!shapes.Fit()) return CUBLAS_STATUS_INVALID_VALUE;
  if (!shapes.AreTakenBy(static_cast<Algorithm>(algorithm->data[0]))) return CUBLAS_STATUS_NOT_SUPPORTED;
  result->workspaceSize = 0;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t /*preference*/, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* num_results) {
  *num_results = 0;
  for (std::uint64_t i = 0; i < kNumAlgorithms && *num_results < wanted; ++i) {
    cublasLtMatmulHeuristicResult_t& result = results[*num_results];
    result.algo = {};
    result.algo.data[0] = i;
    result.state = cublasLtMatmulAlgoCheck(handle, desc, a, b, c, d, &result.algo, &result);
    if (result.state == CUBLAS_STATUS_SUCCESS) ++*num_results;
  }
  return *num_results > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}
cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algorithm,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute, void* value,
                                                    std::size_t size_bytes, std::size_t* written) {
  if (attribute != CUBLASLT_ALGO_CONFIG_SPLITK_NUM || size_bytes != 4) return CUBLAS_STATUS_INVALID_VALUE;
  const std::int32_t num_splits = algorithm->data[0] == kSplit ? kNumSplits : 1;
  std::memcpy(value, &num_splits, 4);
  *written = 4;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm,
                              void* /*workspace*/, std::size_t /*workspace_bytes*/, cudaStream_t stream) {
  cublasLtMatmulHeuristicResult_t result = {};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle, desc, a_layout, b_layout, c_layout, d_layout, algorithm, &result);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Shapes shapes = ShapesOf(desc, a_layout, b_layout, c_layout, d_layout);
  const auto chosen = static_cast<Algorithm>(algorithm->data[0]);
  const float scale = *static_cast<const float*>(alpha);
  const float share = *static_cast<const float*>(beta);
  const cudaError_t error = spillway::emulation::Queue(stream, [=] {
    Multiply(shapes, scale, a, b, share, static_cast<const float*>(c), static_cast<float*>(d), chosen);
    return cudaSuccess;
  });
  return error == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

}  // extern "C"
