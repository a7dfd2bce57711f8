#pragma once

// A cuda device for tests, and kernels over it that take host pointers as the cpu device's do.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace spillway {

// The options tests use: rows whose bits depend on them alone, and little memory. Without cuBLASLt our own GEMM serves.
inline CudaDeviceOptions CudaTestOptions() {
  CudaDeviceOptions options;
  options.memory_bytes = std::size_t{128} << 20;
  options.batch_invariant = true;
#ifdef SPILLWAY_EMULATED_CUBLASLT
  options.cublaslt = SPILLWAY_EMULATED_CUBLASLT;
#endif
  return options;
}

// nullopt, with the reason, where there is no CUDA device (or the program was built without CUDA).
inline std::optional<std::unique_ptr<Device>> MakeCudaDeviceForTest(CudaDeviceOptions options, std::string* reason) {
  absl::StatusOr<std::unique_ptr<Device>> device = MakeCudaDevice(options);
  if (absl::IsNotFound(device.status())) {  // no cuBLASLt
    options.cublaslt = "none";
    device = MakeCudaDevice(options);
  }
  if (device.ok()) return std::move(device).value();
  *reason = std::string(device.status().message());
  return std::nullopt;
}

// Skips the running test, naming the reason, where there is no CUDA device.
#define SPILLWAY_CUDA_OR_SKIP(variable, options)                                          \
  std::string variable##_reason;                                                          \
  auto variable##_found = ::spillway::MakeCudaDeviceForTest(options, &variable##_reason); \
  if (!variable##_found.has_value()) GTEST_SKIP() << variable##_reason;                   \
  const std::unique_ptr<::spillway::Device> variable = std::move(*variable##_found)

// Copies every argument to the device, runs, waits, copies the results back. So that one conformance suite serves all
// devices. One thread.
class HostFacingKernels final : public Kernels {
 public:
  explicit HostFacingKernels(Device& device) : device_(device) {}

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const override {
    return device_.kernels().Pack(parts);
  }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> PackInt8(std::span<const MatrixView> parts) const override {
    return device_.kernels().PackInt8(parts);
  }
  absl::StatusOr<EmbeddingTable> MakeEmbeddingTable(const MatrixView& table) const override {
    absl::StatusOr<EmbeddingTable> made = device_.kernels().MakeEmbeddingTable(table);
    if (made.ok()) tables_.insert(made->view.data);
    return made;
  }

  void Embed(Stream& stream, const EmbedArgs& args) const override {
    Call call(device_, stream);
    EmbedArgs on_device = args;
    on_device.tokens = call.In(args.tokens, args.num_tokens);
    if (args.sampled != nullptr && args.num_tokens > 0) {
      on_device.sampled =
          call.In(args.sampled, -std::int64_t{*std::min_element(args.tokens, args.tokens + args.num_tokens)});
    }
    if (!tables_.contains(args.table.data)) {
      on_device.table.data =
          call.In(args.table.data, args.table.rows * args.table.row_stride * SizeOfInt(args.table.dtype));
    }
    on_device.out = call.Out(args.out, args.num_tokens * args.table.cols);
    device_.kernels().Embed(stream, on_device);
  }
  void RmsNorm(Stream& stream, const RmsNormArgs& args) const override {
    Call call(device_, stream);
    RmsNormArgs on_device = args;
    const std::int64_t num_inputs = args.rows != nullptr ? Bound(args.rows, args.num_rows) : args.num_rows;
    on_device.x = call.In(args.x, num_inputs * args.hidden);
    on_device.weight = call.In(args.weight, args.hidden);
    on_device.rows = call.In(args.rows, args.num_rows);
    on_device.out = call.Out(args.out, args.num_rows * args.hidden * SizeOfInt(args.out_dtype));
    device_.kernels().RmsNorm(stream, on_device);
  }
  void Gemm(Stream& stream, const GemmArgs& args) const override {
    Call call(device_, stream);
    GemmArgs on_device = args;
    on_device.a = call.In(args.a, args.num_rows * args.weight->cols() * SizeOfInt(args.a_dtype));
    on_device.bias = call.In(args.bias, args.weight->rows());
    on_device.out = call.InOut(args.out, args.num_rows * args.weight->rows());
    device_.kernels().Gemm(stream, on_device);
  }
  void RopeAngles(Stream& stream, const RopeAnglesArgs& args) const override {
    Call call(device_, stream);
    RopeAnglesArgs on_device = args;
    on_device.positions = call.In(args.positions, args.num_tokens);
    on_device.inverse_frequency = call.In(args.inverse_frequency, args.half);
    on_device.cos_sin = call.Out(args.cos_sin, args.num_tokens * 2 * args.half);
    device_.kernels().RopeAngles(stream, on_device);
  }
  void RopeAppend(Stream& stream, const RopeAppendArgs& args) const override {
    Call call(device_, stream);
    RopeAppendArgs on_device = args;
    const KvLayout& layout = args.kv.layout;
    on_device.qkv = call.In(args.qkv, args.num_tokens * (args.num_heads + 2 * layout.num_kv_heads) * layout.head_dim);
    on_device.cos_sin = call.In(args.cos_sin, args.num_tokens * layout.head_dim);
    on_device.positions = call.In(args.positions, args.num_tokens);
    on_device.blocks = call.In(args.blocks, args.num_tokens);
    on_device.q = call.Out(args.q, args.num_tokens * args.num_heads * layout.head_dim * SizeOfInt(args.q_dtype));
    on_device.kv.pool = call.InOut(args.kv.pool, PoolBytes(layout, args.blocks, args.num_tokens));
    device_.kernels().RopeAppend(stream, on_device);
  }
  void Attention(Stream& stream, const AttentionArgs& args) const override {
    Call call(device_, stream);
    AttentionArgs on_device = args;
    const KvLayout& layout = args.kv.layout;
    const std::int64_t size = args.num_tokens * args.num_heads * layout.head_dim;
    const std::int64_t num_blocks = args.block_begin[args.num_sequences];
    on_device.q = call.In(args.q, size * SizeOfInt(args.q_dtype));
    on_device.query_begin = call.In(args.query_begin, args.num_sequences + 1);
    on_device.first_position = call.In(args.first_position, args.num_sequences);
    on_device.block_begin = call.In(args.block_begin, args.num_sequences + 1);
    on_device.block_table = call.In(args.block_table, num_blocks);
    on_device.kv.pool = call.In(args.kv.pool, PoolBytes(layout, args.block_table, num_blocks));
    on_device.row_bias = call.In(args.row_bias, Bound(args.block_table, num_blocks) * args.row_bias_stride);
    if (args.pass != AttentionPass::kWhole) {
      on_device.key_begin = call.In(args.key_begin, args.num_sequences);
      on_device.key_end = call.In(args.key_end, args.num_sequences);
      on_device.states = call.InOut(args.states, args.num_tokens * args.num_heads * (layout.head_dim + 2));
    }
    on_device.out = call.InOut(args.out, size * SizeOfInt(args.out_dtype));
    device_.kernels().Attention(stream, on_device);
  }
  void SiluMul(Stream& stream, const SiluMulArgs& args) const override {
    Call call(device_, stream);
    SiluMulArgs on_device = args;
    on_device.gate_up = call.In(args.gate_up, args.num_tokens * 2 * args.inner);
    on_device.out = call.Out(args.out, args.num_tokens * args.inner * SizeOfInt(args.out_dtype));
    device_.kernels().SiluMul(stream, on_device);
  }
  void Sample(Stream& stream, const SampleArgs& args) const override {
    Call call(device_, stream);
    SampleArgs on_device = args;
    on_device.logits = call.In(args.logits, args.num_rows * args.vocab);
    on_device.rows = call.In(args.rows, args.num_rows);
    on_device.banned_begin = call.In(args.banned_begin, args.num_rows + 1);
    if (args.banned_begin != nullptr) on_device.banned = call.In(args.banned, args.banned_begin[args.num_rows]);
    on_device.results = call.Out(args.results, args.num_rows);
    device_.kernels().Sample(stream, on_device);
  }

 private:
  // One call's device copies of its arrays. Destroyed: waits, and brings the results back.
  class Call {
   public:
    Call(Device& device, Stream& stream) : device_(device), stream_(stream) {}
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;
    ~Call() {
      for (const Result& result : results_) stream_.Copy(result.to, result.from.get(), result.from.size_bytes);
      static_cast<void>(stream_.Record()->Await());  // the caller asks for the status
    }

    template <typename T>
    T* In(T* host, std::int64_t count) {
      if (host == nullptr) return nullptr;
      const Buffer buffer = Take(static_cast<std::size_t>(count) * sizeof(T));
      stream_.Copy(buffer.get(), reinterpret_cast<const std::byte*>(host), buffer.size_bytes);
      return reinterpret_cast<T*>(buffer.get());
    }
    template <typename T>
    T* Out(T* host, std::int64_t count) {
      const Buffer buffer = Take(static_cast<std::size_t>(count) * sizeof(T));
      results_.push_back({reinterpret_cast<std::byte*>(host), buffer});
      return reinterpret_cast<T*>(buffer.get());
    }
    template <typename T>
    T* InOut(T* host, std::int64_t count) {
      T* const copy = In(host, count);
      results_.push_back({reinterpret_cast<std::byte*>(host), buffers_.back()});
      return copy;
    }

   private:
    struct Result {
      std::byte* to;
      Buffer from;
    };
    const Buffer& Take(std::size_t size_bytes) {
      absl::StatusOr<Buffer> buffer = device_.Allocate(MemoryKind::kDevice, size_bytes);
      SPILLWAY_CHECK(buffer.ok()) << buffer.status();
      buffers_.push_back(*std::move(buffer));
      return buffers_.back();
    }

    Device& device_;
    Stream& stream_;
    std::vector<Buffer> buffers_;
    std::vector<Result> results_;
  };

  static std::int64_t SizeOfInt(DType dtype) { return static_cast<std::int64_t>(SizeOf(dtype)); }
  static std::int64_t Bound(const std::int32_t* ids, std::int64_t count) {
    return count == 0 ? 0 : std::int64_t{*std::max_element(ids, ids + count)} + 1;
  }
  static std::int64_t PoolBytes(const KvLayout& layout, const std::int32_t* blocks, std::int64_t count) {
    return Bound(blocks, count) * static_cast<std::int64_t>(layout.block_bytes());
  }

  Device& device_;
  mutable std::set<const std::byte*> tables_;  // of device memory
};

}  // namespace spillway
