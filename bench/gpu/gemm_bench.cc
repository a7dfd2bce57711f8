// The products of Llama-3-8B, bf16 with float results, through Kernels::Gemm, beside cuBLAS called directly.

#include <cublas_api.h>
#include <dlfcn.h>

#include <cstdlib>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bench/gpu/measure.h"
#include "kernels/check.h"

namespace spillway::bench {
namespace {

constexpr int kCopies = 3;  // of the weights, used in turn, so that L2 keeps none

// cuBLAS's own choice of algorithm, beside the cuBLASLt that the device found.
class Cublas {
 public:
  // nullopt: there is none.
  static std::optional<Cublas> Open(cudaStream_t stream) {
    const std::string name = "libcublas.so." + std::to_string(CUBLAS_VER_MAJOR);
    std::vector<std::string> places = {name, "/usr/local/cuda/lib64/" + name};
    if (const char* const home = std::getenv("CUDA_HOME")) places.push_back(std::string(home) + "/lib64/" + name);
    if (const char* const given = std::getenv("SPILLWAY_CUBLASLT")) {
      const std::string path = given;
      places.insert(places.begin(), path.substr(0, path.rfind('/') + 1) + name);
    }
    for (const std::string& place : places) {
      void* const library = dlopen(place.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library == nullptr) continue;
      const auto find = [&]<typename Function>(Function& function, const char* symbol) {
        function = reinterpret_cast<Function>(dlsym(library, symbol));
        SPILLWAY_CHECK(function != nullptr) << place << " has no " << symbol;
      };
      decltype(&cublasCreate_v2) create = nullptr;
      decltype(&cublasSetStream_v2) set_stream = nullptr;
      Cublas cublas;
      find(create, "cublasCreate_v2");
      find(set_stream, "cublasSetStream_v2");
      find(cublas.gemm_, "cublasGemmEx");
      SPILLWAY_CHECK(create(&cublas.handle_) == CUBLAS_STATUS_SUCCESS) << place;
      SPILLWAY_CHECK(set_stream(cublas.handle_, stream) == CUBLAS_STATUS_SUCCESS) << place;
      return cublas;
    }
    return std::nullopt;
  }

  // out[m, n] = a[m, k] * weight[n, k]^T, row-major, as cuBLAS's column-major out^T = weight * a^T.
  void Multiply(const std::byte* a, const std::byte* weight, float* out, int m, int n, int k) const {
    const float one = 1;
    const float zero = 0;
    const cublasStatus_t status =
        gemm_(handle_, CUBLAS_OP_T, CUBLAS_OP_N, n, m, k, &one, weight, CUDA_R_16BF, k, a, CUDA_R_16BF, k, &zero, out,
              CUDA_R_32F, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    SPILLWAY_CHECK(status == CUBLAS_STATUS_SUCCESS) << "cublasGemmEx: status " << static_cast<int>(status);
  }

 private:
  using GemmEx = cublasStatus_t (*)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void*,
                                    const void*, cudaDataType, int, const void*, cudaDataType, int, const void*, void*,
                                    cudaDataType, int, cublasComputeType_t, cublasGemmAlgo_t);
  GemmEx gemm_ = nullptr;
  cublasHandle_t handle_ = nullptr;  // for the life of the process
};

struct Shape {
  const char* name;
  std::int64_t columns;
  std::int64_t depth;
};

void Multiply(Bench& bench, const std::optional<Cublas>& cublas, const Shape& shape, std::int64_t num_rows,
              const std::vector<Buffer>& weights, const std::vector<std::unique_ptr<PackedMatrix>>& packed) {
  const Buffer a = bench.RandomBF16(MemoryKind::kDevice, static_cast<std::size_t>(num_rows * shape.depth) * 2);
  const Buffer out = bench.Allocate(MemoryKind::kDevice, static_cast<std::size_t>(num_rows * shape.columns) * 4);
  auto* const values = reinterpret_cast<float*>(out.get());
  const double flops = 2.0 * static_cast<double>(num_rows * shape.columns * shape.depth);
  const std::string what = std::string(shape.name) + ", " + std::to_string(num_rows) + " rows";
  std::vector<std::function<void(int)>> works = {[&](int run) {
    GemmArgs args;
    args.a = a.get();
    args.a_dtype = DType::kBF16;
    args.num_rows = num_rows;
    args.weight = packed[static_cast<std::size_t>(run % kCopies)].get();
    args.out = values;
    bench.kernels().Gemm(bench.stream(), args);
  }};
  if (cublas.has_value()) {
    works.emplace_back([&](int run) {
      cublas->Multiply(a.get(), weights[static_cast<std::size_t>(run % kCopies)].get(), values,
                       static_cast<int>(num_rows), static_cast<int>(shape.columns), static_cast<int>(shape.depth));
    });
  }
  const std::vector<Measured> times = bench.TimeInTurns(works);
  const auto rate = [&](std::size_t i) { return flops / times[i].median_us * 1e-6; };
  if (cublas.has_value()) bench.Report({"cublas", what, times[1], rate(1), "TFLOP/s", 0});
  bench.Report({"gemm", what, times[0], rate(0), "TFLOP/s", cublas.has_value() ? rate(1) : 0});
  if (num_rows > 16) return;
  const double bytes = 2.0 * static_cast<double>(shape.columns * shape.depth);
  bench.Report(
      {"gemm", what + ", of its weights", times[0], bytes / times[0].median_us * 1e-3, "GB/s", bench.hbm_gbps});
}

}  // namespace

void RunGemmBench(Bench& bench) {
  const std::optional<Cublas> cublas = Cublas::Open(bench.stream().handle());
  if (!cublas.has_value()) std::printf("cublas     not found: products have no limit beside them\n");
  // Fused qkv, output, gate-up, down, head.
  for (const Shape shape : {Shape{"qkv", 6144, 4096},
                            {"output", 4096, 4096},
                            {"gate_up", 28672, 4096},
                            {"down", 4096, 14336},
                            {"head", 128256, 4096}}) {
    const auto bytes = static_cast<std::size_t>(shape.columns * shape.depth) * 2;
    const Buffer host = bench.RandomBF16(MemoryKind::kPinnedHost, bytes);
    const MatrixView view = {host.get(), DType::kBF16, shape.columns, shape.depth, shape.depth};
    std::vector<Buffer> weights;
    std::vector<std::unique_ptr<PackedMatrix>> packed;
    for (int i = 0; i < kCopies; ++i) {
      packed.push_back(bench.kernels().Pack({&view, 1}).value());
      weights.push_back(bench.RandomBF16(MemoryKind::kDevice, bytes));
    }
    for (const std::int64_t num_rows : {1, 16, 64, 512, 4096}) {
      if (num_rows > 512 && shape.columns > 100000) continue;
      Multiply(bench, cublas, shape, num_rows, weights, packed);
    }
  }
}

}  // namespace spillway::bench
