// onednn_gemm ROWS SECONDS: the bf16 products of a layer of the bench model (model_bench --write) by oneDNN, weights
// packed as it likes (format_tag::any, reordered once), those of 16 layers in turn, so that no cache keeps them. Prints
// GFLOP/s. Threads: OMP_NUM_THREADS.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <oneapi/dnnl/dnnl.hpp>
#include <random>
#include <string>
#include <vector>

namespace {

using dnnl::memory;
constexpr int kLayers = 16;
struct Shape {
  memory::dim columns;
  memory::dim depth;
};
// Fused qkv, output, fused gate and up, down.
constexpr Shape kShapes[] = {{1536, 1024}, {1024, 1024}, {5632, 1024}, {1024, 2816}};

class Product {
 public:
  Product(const dnnl::engine& engine, dnnl::stream& stream, const Shape& shape, memory::dim rows)
      : stream_(stream), flops_(2.0 * static_cast<double>(rows * shape.columns * shape.depth)) {
    const auto bf16 = memory::data_type::bf16;
    const memory::desc a({rows, shape.depth}, bf16, memory::format_tag::ab);
    const memory::desc out({rows, shape.columns}, memory::data_type::f32, memory::format_tag::ab);
    const memory::desc any({shape.depth, shape.columns}, bf16, memory::format_tag::any);
    const dnnl::matmul::primitive_desc plan({a, any, out}, engine);
    kernel_ = plan.impl_info_str();
    product_ = dnnl::matmul(plan);
    a_ = memory(a, engine);
    out_ = memory(out, engine);
    Fill(a_);
    for (int i = 0; i < kLayers; ++i) {
      memory plain({{shape.depth, shape.columns}, bf16, memory::format_tag::ba}, engine);
      Fill(plain);
      weights_.emplace_back(plan.weights_desc(), engine);
      dnnl::reorder(plain, weights_.back()).execute(stream, plain, weights_.back());
      stream.wait();
    }
  }
  void Run(int layer) {
    product_.execute(
        stream_,
        {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, weights_[static_cast<std::size_t>(layer)]}, {DNNL_ARG_DST, out_}});
    stream_.wait();
  }
  double flops() const { return flops_; }
  const std::string& kernel() const { return kernel_; }

 private:
  static void Fill(memory& values) {
    static std::mt19937 random(1);
    auto* const at = static_cast<std::uint16_t*>(values.get_data_handle());
    for (std::size_t i = 0; i < values.get_desc().get_size() / 2; ++i) {
      at[i] = static_cast<std::uint16_t>(0x3c00 + random() % 0x400 + (random() % 2) * 0x8000);
    }
  }
  dnnl::stream& stream_;
  double flops_;
  std::string kernel_;
  dnnl::matmul product_;
  memory a_, out_;
  std::vector<memory> weights_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "onednn_gemm ROWS SECONDS\n");
    return 1;
  }
  const memory::dim rows = std::atol(argv[1]);
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  std::vector<Product> products;
  double flops_per_layer = 0;
  for (const Shape& shape : kShapes) {
    products.emplace_back(engine, stream, shape, rows);
    flops_per_layer += products.back().flops();
  }
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  const double begin = now();
  const double end = begin + std::atof(argv[2]);
  double flops = 0;
  for (int layer = 0; now() < end; layer = (layer + 1) % kLayers) {
    for (Product& product : products) product.Run(layer);
    flops += flops_per_layer;
  }
  std::printf("%.0f GFLOP/s, %s\n", flops / (now() - begin) * 1e-9, products.front().kernel().c_str());
  return 0;
}
