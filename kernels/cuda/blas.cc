#include "kernels/cuda/blas.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/status_macros.h"

namespace spillway::cuda {
namespace {

constexpr int kHeaderMajor = CUBLAS_VER_MAJOR;
// Rows for which the one algorithm of the invariant mode is chosen: a decode batch or a small chunk; and those that it
// must take as well.
constexpr std::int64_t kInvariantRows = 64;
constexpr std::int64_t kInvariantRowsToTake[] = {1, 2, 7, 16, 33, 128, 512, 2048, 8192};
constexpr int kMaxAlgorithms = 16;

std::vector<std::string> PlacesToLook(const std::string& library) {
  if (!library.empty()) return {library};
  std::vector<std::string> places;
  if (const char* const given = std::getenv("SPILLWAY_CUBLASLT")) places.emplace_back(given);
  const std::string name = absl::StrCat("libcublasLt.so.", kHeaderMajor);
  places.push_back(name);
  for (const char* const variable : {"CUDA_HOME", "CUDA_PATH"}) {
    if (const char* const home = std::getenv(variable)) places.push_back(absl::StrCat(home, "/lib64/", name));
  }
  places.push_back(absl::StrCat("/usr/local/cuda/lib64/", name));
  return places;
}

}  // namespace

// The functions we call.
struct Blas::Library {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtGetVersion) get_version = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) get_heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) check_algorithm = nullptr;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) get_config = nullptr;
  cublasLtHandle_t handle = nullptr;
  std::size_t version = 0;

  ~Library() {
    if (handle != nullptr) destroy(handle);
  }

  absl::Status Open(const std::string& path) {
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return absl::NotFoundError(dlerror());
    const char* missing = nullptr;
    const auto find = [&]<typename Function>(Function& function, const char* name) {
      function = reinterpret_cast<Function>(dlsym(library, name));
      if (function == nullptr) missing = name;
    };
    find(create, "cublasLtCreate");
    find(destroy, "cublasLtDestroy");
    find(get_version, "cublasLtGetVersion");
    find(matmul, "cublasLtMatmul");
    find(desc_create, "cublasLtMatmulDescCreate");
    find(desc_destroy, "cublasLtMatmulDescDestroy");
    find(desc_set, "cublasLtMatmulDescSetAttribute");
    find(layout_create, "cublasLtMatrixLayoutCreate");
    find(layout_destroy, "cublasLtMatrixLayoutDestroy");
    find(preference_create, "cublasLtMatmulPreferenceCreate");
    find(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    find(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    find(get_heuristic, "cublasLtMatmulAlgoGetHeuristic");
    find(check_algorithm, "cublasLtMatmulAlgoCheck");
    find(get_config, "cublasLtMatmulAlgoConfigGetAttribute");
    if (missing != nullptr) return absl::FailedPreconditionError(absl::StrCat(path, " has no ", missing));
    version = get_version();
    if (version / 10000 != kHeaderMajor) {
      return absl::FailedPreconditionError(
          absl::StrCat(path, " is version ", version / 10000, ", this program was built for ", kHeaderMajor));
    }
    if (const cublasStatus_t status = create(&handle); status != CUBLAS_STATUS_SUCCESS) {
      return absl::UnavailableError(absl::StrCat("cublasLtCreate: status ", static_cast<int>(status)));
    }
    return absl::OkStatus();
  }

  // Column-major, as cuBLAS sees everything: a row-major [rows, cols] matrix is a column-major [cols, rows] one.
  cublasLtMatrixLayout_t NewLayout(cudaDataType_t type, std::int64_t rows, std::int64_t cols) const {
    cublasLtMatrixLayout_t layout = nullptr;
    layout_create(&layout, type, static_cast<std::uint64_t>(cols), static_cast<std::uint64_t>(rows), cols);
    return layout;
  }

  template <typename T>
  void Set(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const T& value) const {
    desc_set(desc, attribute, &value, sizeof(value));
  }
  template <typename T>
  void Set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
           const T& value) const {
    preference_set(preference, attribute, &value, sizeof(value));
  }
};

// Everything about a product but its pointers and exact m. is_usable is false where no algorithm was found.
struct Blas::Plan {
  const Library& library;
  cudaDataType_t type = CUDA_R_16BF;
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t weight = nullptr;
  cublasLtMatmulAlgo_t algorithm = {};
  bool is_usable = false;

  explicit Plan(const Library& owner) : library(owner) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (desc != nullptr) library.desc_destroy(desc);
    if (weight != nullptr) library.layout_destroy(weight);
  }

  bool Takes(const cublasLtMatmulAlgo_t& candidate, std::int64_t m, std::int64_t n, std::int64_t k) const {
    const cublasLtMatrixLayout_t a = library.NewLayout(type, m, k);
    const cublasLtMatrixLayout_t out = library.NewLayout(CUDA_R_32F, m, n);
    cublasLtMatmulHeuristicResult_t result = {};
    const cublasStatus_t status =
        library.check_algorithm(library.handle, desc, weight, a, out, out, &candidate, &result);
    library.layout_destroy(a);
    library.layout_destroy(out);
    return status == CUBLAS_STATUS_SUCCESS && result.workspaceSize <= kWorkspaceBytes;
  }
};

absl::StatusOr<std::unique_ptr<Blas>> Blas::Load(const std::string& library, BlasChoice choice) {
  std::vector<std::string> failures;
  for (const std::string& path : PlacesToLook(library)) {
    auto opened = std::make_unique<Library>();
    const absl::Status status = opened->Open(path);
    if (status.ok()) return std::unique_ptr<Blas>(new Blas(std::move(opened), choice));
    if (!absl::IsNotFound(status)) return status;
    failures.emplace_back(status.message());
  }
  return absl::NotFoundError(absl::StrCat(
      "cuBLASLt ", kHeaderMajor, " was not found (set SPILLWAY_CUBLASLT to it): ", absl::StrJoin(failures, "; ")));
}

Blas::Blas(std::unique_ptr<Library> library, BlasChoice choice) : library_(std::move(library)), choice_(choice) {}

Blas::~Blas() { plans_.clear(); }

std::string Blas::version() const {
  const std::size_t v = library_->version;
  return absl::StrCat(v / 10000, ".", v / 100 % 100, ".", v % 100);
}

std::unique_ptr<Blas::Plan> Blas::MakePlan(const Key& key, std::int64_t m) const {
  const Library& blas = *library_;
  auto plan = std::make_unique<Plan>(blas);
  plan->type = key.dtype == DType::kBF16 ? CUDA_R_16BF : key.dtype == DType::kF16 ? CUDA_R_16F : CUDA_R_32F;
  // Row-major out = a * weight^T is column-major out^T = weight * a^T: the weight comes first, transposed.
  plan->weight = blas.NewLayout(plan->type, key.n, key.k);
  blas.desc_create(&plan->desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  blas.Set(plan->desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (key.has_bias) {
    blas.Set(plan->desc, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    blas.Set(plan->desc, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<std::int32_t>(CUDA_R_32F));
  }
  const cublasLtMatrixLayout_t a = blas.NewLayout(plan->type, m, key.k);
  const cublasLtMatrixLayout_t out = blas.NewLayout(CUDA_R_32F, m, key.n);
  cublasLtMatmulPreference_t preference = nullptr;
  blas.preference_create(&preference);
  blas.Set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspaceBytes);
  for (const auto alignment :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    blas.Set(preference, alignment, std::uint32_t{16});
  }
  if (choice_ == BlasChoice::kInvariant) {
    blas.Set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, std::uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
  }
  cublasLtMatmulHeuristicResult_t results[kMaxAlgorithms] = {};
  int num_results = 0;
  const cublasStatus_t status = blas.get_heuristic(blas.handle, plan->desc, plan->weight, a, out, out, preference,
                                                   kMaxAlgorithms, results, &num_results);
  blas.preference_destroy(preference);
  blas.layout_destroy(a);
  blas.layout_destroy(out);
  if (status != CUBLAS_STATUS_SUCCESS) return plan;
  for (int i = 0; i < num_results && !plan->is_usable; ++i) {
    if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
    if (choice_ == BlasChoice::kInvariant) {
      std::int32_t num_splits = 1;
      std::size_t written = 0;
      blas.get_config(&results[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &num_splits, sizeof(num_splits), &written);
      const auto takes = [&](std::int64_t rows) { return plan->Takes(results[i].algo, rows, key.n, key.k); };
      if (num_splits > 1 || !std::ranges::all_of(kInvariantRowsToTake, takes)) continue;
    }
    plan->algorithm = results[i].algo;
    plan->is_usable = true;
  }
  return plan;
}

const Blas::Plan& Blas::PlanFor(const BlasGemm& gemm, std::int64_t m) {
  const Key key = {gemm.dtype, gemm.add, gemm.bias != nullptr, m, gemm.n, gemm.k};
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<Plan>& plan = plans_[key];
  if (plan == nullptr) plan = MakePlan(key, m == 0 ? kInvariantRows : m);
  return *plan;
}

bool Blas::Gemm(CudaStream& stream, const BlasGemm& gemm) {
  const auto is_aligned = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
  if (!is_aligned(gemm.a) || !is_aligned(gemm.weight) || !is_aligned(gemm.out) || !is_aligned(gemm.bias)) return false;
  if (choice_ == BlasChoice::kInvariant) {
    const Plan& plan = PlanFor(gemm, 0);
    if (!plan.is_usable) return false;
    if (!Multiply(stream, gemm, plan)) {
      stream.Fail(absl::UnimplementedError(absl::StrCat("cuBLASLt: gemm of ", gemm.m, " x ", gemm.n, " x ", gemm.k,
                                                        ": the algorithm of all other rows refuses these")));
    }
    return true;
  }
  const auto bucket = static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(gemm.m)));
  const Plan& plan = PlanFor(gemm, bucket);
  if (plan.is_usable && Multiply(stream, gemm, plan)) return true;
  if (bucket == gemm.m) return false;
  // What was chosen for the bucket may refuse fewer rows.
  const Plan& exact = PlanFor(gemm, gemm.m);
  return exact.is_usable && Multiply(stream, gemm, exact);
}

bool Blas::Multiply(CudaStream& stream, const BlasGemm& gemm, const Plan& plan) {
  std::byte* const workspace = stream.Workspace(CudaStream::Purpose::kGemm, kWorkspaceBytes);
  if (workspace == nullptr) return true;  // the stream has failed

  const Library& blas = *library_;
  // A bias pointer is part of the description; ours may be shared with another thread's call.
  cublasLtMatmulDesc_t desc = plan.desc;
  cublasLtMatmulDescOpaque_t own_desc;
  if (gemm.bias != nullptr) {
    own_desc = *plan.desc;
    desc = &own_desc;
    blas.Set(desc, CUBLASLT_MATMUL_DESC_BIAS_POINTER, gemm.bias);
  }
  const cublasLtMatrixLayout_t a = blas.NewLayout(plan.type, gemm.m, gemm.k);
  const cublasLtMatrixLayout_t out = blas.NewLayout(CUDA_R_32F, gemm.m, gemm.n);
  const float alpha = 1.0F;
  const float beta = gemm.add ? 1.0F : 0.0F;
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  stream.Queue("gemm", [&](cudaStream_t handle) {
    status = blas.matmul(blas.handle, desc, &alpha, gemm.weight, plan.weight, gemm.a, a, &beta, gemm.out, out, gemm.out,
                         out, &plan.algorithm, workspace, kWorkspaceBytes, handle);
    return cudaSuccess;
  });
  blas.layout_destroy(a);
  blas.layout_destroy(out);
  if (status == CUBLAS_STATUS_SUCCESS) return true;
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return false;
  stream.Fail(absl::UnavailableError(
      absl::StrCat("cuBLASLt: gemm of ", gemm.m, " x ", gemm.n, " x ", gemm.k, ": status ", static_cast<int>(status))));
  return true;
}

}  // namespace spillway::cuda
