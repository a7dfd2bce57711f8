#pragma once

// GEMMs by cuBLASLt, which is half a gigabyte: it is found at run time and never linked. Bias and residual are part of
// the product (its bias epilogue, beta = 1). The activation is not: cuBLASLt 13 has epilogues of ReLU and GELU, none of
// SiLU and none that multiplies one half of the result by the other; a pass over the float product does that (SiluMul).

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cuda/stream.h"
#include "kernels/tensor.h"

namespace spillway::cuda {

// out[m, n] = sum over k of a[m, k] * weight[n, k] (+ bias[n]) (+ out[m, n]); all row-major, 16-byte aligned. Float
// accumulation, no TF32.
struct BlasGemm {
  const std::byte* a = nullptr;
  const std::byte* weight = nullptr;
  DType dtype = DType::kBF16;  // of a and weight
  std::int64_t m = 0;
  std::int64_t n = 0;
  std::int64_t k = 0;
  const float* bias = nullptr;
  bool add = false;
  float* out = nullptr;
};

// kFastest: the heuristics' first choice for each power of two of m, or for m itself where that refuses it. kInvariant:
// one algorithm per (n, k) whatever m is, without split k, so that a row's bits do not depend on m.
enum class BlasChoice : std::uint8_t { kFastest, kInvariant };

// Any thread. The library stays loaded for the life of the process.
class Blas {
 public:
  static constexpr std::size_t kWorkspaceBytes = std::size_t{32} << 20;

  // `library`: a path, or empty to look at SPILLWAY_CUBLASLT, the loader's own places, and the toolkit. NOT_FOUND names
  // what was tried; FAILED_PRECONDITION: another major version than the headers this was built with.
  static absl::StatusOr<std::unique_ptr<Blas>> Load(const std::string& library, BlasChoice choice);
  ~Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  // False, with nothing queued: no algorithm takes this shape. Errors go to the stream.
  bool Gemm(CudaStream& stream, const BlasGemm& gemm);
  std::string version() const;  // "13.0.2"

 private:
  struct Library;
  struct Plan;
  // What a plan depends on.
  struct Key {
    DType dtype;
    bool add;
    bool has_bias;
    std::int64_t m;  // rows that it is chosen for; 0 in invariant mode
    std::int64_t n;
    std::int64_t k;
    auto operator<=>(const Key&) const = default;
  };

  Blas(std::unique_ptr<Library> library, BlasChoice choice);
  const Plan& PlanFor(const BlasGemm& gemm, std::int64_t m);
  bool Multiply(CudaStream& stream, const BlasGemm& gemm, const Plan& plan);  // false: refused, nothing is queued
  std::unique_ptr<Plan> MakePlan(const Key& key, std::int64_t m) const;

  const std::unique_ptr<Library> library_;
  const BlasChoice choice_;
  std::mutex mutex_;
  std::map<Key, std::unique_ptr<Plan>> plans_;  // guarded by mutex_; plans never change
};

}  // namespace spillway::cuda
