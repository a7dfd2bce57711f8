// Where a decode step's time goes: every kernel of a layer of Llama-3-8B, captured many times over in a graph as the
// engine's steps are, so that a launch costs what it costs there; then all of them in their order.

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/gpu/measure.h"

namespace spillway::bench {
namespace {

constexpr std::int64_t kHidden = 4096;
constexpr std::int64_t kInner = 14336;
constexpr int kHeads = 32;
constexpr std::int64_t kVocab = 128256;
constexpr int kContext = 1024;
constexpr KvLayout kLayout = {1, 8, 128, DType::kBF16};
constexpr int kCopies = 3;    // of weights and KV, used in turn, so that L2 keeps none
constexpr int kRepeats = 48;  // in a graph

// One decode step's buffers and calls, a layer of them.
class DecodeLayer {
 public:
  DecodeLayer(Bench& bench, int batch) : bench_(bench), batch_(batch) {
    const Buffer host = bench.RandomBF16(MemoryKind::kPinnedHost, static_cast<std::size_t>(kVocab * kHidden) * 2);
    const auto pack = [&](std::int64_t rows, std::int64_t columns) {
      const MatrixView view = {host.get(), DType::kBF16, rows, columns, columns};
      return bench.kernels().Pack({&view, 1}).value();
    };
    const auto floats = [&](std::int64_t columns) {
      return bench.Upload(std::vector<float>(static_cast<std::size_t>(batch * columns), 0.5F));
    };
    const auto halves = [&](std::int64_t columns) {
      return bench.RandomBF16(MemoryKind::kDevice, static_cast<std::size_t>(batch * columns) * 2);
    };
    constexpr int kBlocks = kContext / kBlockTokens;
    std::vector<std::int32_t> queries = {0};
    std::vector<std::int32_t> block_begin = {0};
    std::vector<std::int32_t> table;
    std::vector<std::int32_t> last;
    for (int s = 0; s < batch; ++s) {
      queries.push_back(s + 1);
      block_begin.push_back((s + 1) * kBlocks);
      for (int b = 0; b < kBlocks; ++b) table.push_back(s * kBlocks + b);
      last.push_back(table.back());
    }
    for (int i = 0; i < kCopies; ++i) {
      qkv_.push_back(pack(kHidden + 2 * 8 * 128, kHidden));
      output_.push_back(pack(kHidden, kHidden));
      gate_up_.push_back(pack(2 * kInner, kHidden));
      down_.push_back(pack(kHidden, kInner));
      pools_.push_back(bench.RandomBF16(MemoryKind::kDevice, table.size() * kLayout.block_bytes()));
    }
    head_ = pack(kVocab, kHidden);
    residual_ = floats(kHidden);
    norm_ = bench.Upload(std::vector<float>(kHidden, 1.0F));
    narrow_ = halves(kHidden);
    query_ = halves(kHidden);
    inner_ = halves(kInner);
    wide_ = floats(2 * kInner);
    logits_ = floats(kVocab);
    cos_sin_ = floats(128);
    queries_ = bench.Upload(queries);
    block_begin_ = bench.Upload(block_begin);
    table_ = bench.Upload(table);
    last_ = bench.Upload(last);
    positions_ = bench.Upload(std::vector<std::int32_t>(static_cast<std::size_t>(batch), kContext - 1));
    rows_ = bench.Upload(std::vector<SampleRow>(static_cast<std::size_t>(batch)));
    results_ = bench.Allocate(MemoryKind::kDevice, static_cast<std::size_t>(batch) * sizeof(SampleResult));
  }

  void Norm(int /*run*/) const {
    bench_.kernels().RmsNorm(bench_.stream(), {.x = FloatsOf(residual_),
                                               .weight = FloatsOf(norm_),
                                               .epsilon = 1e-5F,
                                               .num_rows = batch_,
                                               .hidden = kHidden,
                                               .out = narrow_.get(),
                                               .out_dtype = DType::kBF16});
  }
  void Qkv(int run) const { Gemm(narrow_, *qkv_[Turn(run)], GemmOutput::kStore, wide_); }
  void Rope(int run) const {
    bench_.kernels().RopeAppend(bench_.stream(), {.qkv = FloatsOf(wide_),
                                                  .cos_sin = FloatsOf(cos_sin_),
                                                  .positions = IntsOf(positions_),
                                                  .blocks = IntsOf(last_),
                                                  .num_tokens = batch_,
                                                  .num_heads = kHeads,
                                                  .kv = {pools_[Turn(run)].get(), kLayout},
                                                  .q = query_.get(),
                                                  .q_dtype = DType::kBF16});
  }
  void Attention(int run) const {
    bench_.kernels().Attention(bench_.stream(), {.q = query_.get(),
                                                 .q_dtype = DType::kBF16,
                                                 .num_heads = kHeads,
                                                 .scale = 0.0884F,
                                                 .kv = {pools_[Turn(run)].get(), kLayout},
                                                 .num_sequences = batch_,
                                                 .num_tokens = batch_,
                                                 .query_begin = IntsOf(queries_),
                                                 .first_position = IntsOf(positions_),
                                                 .block_begin = IntsOf(block_begin_),
                                                 .block_table = IntsOf(table_),
                                                 .out = narrow_.get(),
                                                 .out_dtype = DType::kBF16});
  }
  void Output(int run) const { Gemm(narrow_, *output_[Turn(run)], GemmOutput::kAdd, residual_); }
  void GateUp(int run) const {
    bench_.kernels().GateUp(bench_.stream(), {.a = narrow_.get(),
                                              .a_dtype = DType::kBF16,
                                              .num_rows = batch_,
                                              .weight = gate_up_[Turn(run)].get(),
                                              .product = FloatsOf(wide_),
                                              .out = inner_.get(),
                                              .out_dtype = DType::kBF16});
  }
  void Down(int run) const { Gemm(inner_, *down_[Turn(run)], GemmOutput::kAdd, residual_); }
  void Head(int /*run*/) const { Gemm(narrow_, *head_, GemmOutput::kStore, logits_); }
  void Sample(int /*run*/) const {
    bench_.kernels().Sample(bench_.stream(), {.logits = FloatsOf(logits_),
                                              .num_rows = batch_,
                                              .vocab = kVocab,
                                              .rows = reinterpret_cast<const SampleRow*>(rows_.get()),
                                              .results = reinterpret_cast<SampleResult*>(results_.get())});
  }

 private:
  static std::size_t Turn(int run) { return static_cast<std::size_t>(run % kCopies); }
  static float* FloatsOf(const Buffer& buffer) { return reinterpret_cast<float*>(buffer.get()); }
  static const std::int32_t* IntsOf(const Buffer& buffer) {
    return reinterpret_cast<const std::int32_t*>(buffer.get());
  }
  void Gemm(const Buffer& a, const PackedMatrix& weight, GemmOutput output, const Buffer& out) const {
    bench_.kernels().Gemm(bench_.stream(), {.a = a.get(),
                                            .a_dtype = DType::kBF16,
                                            .num_rows = batch_,
                                            .weight = &weight,
                                            .output = output,
                                            .out = FloatsOf(out)});
  }

  Bench& bench_;
  const int batch_;
  std::vector<std::unique_ptr<PackedMatrix>> qkv_, output_, gate_up_, down_;
  std::unique_ptr<PackedMatrix> head_;
  std::vector<Buffer> pools_;
  Buffer residual_, norm_, narrow_, query_, inner_, wide_, logits_, cos_sin_, queries_, block_begin_, table_, last_,
      positions_, rows_, results_;
};

// us per call, among kRepeats calls that a graph replays.
double TimeInGraph(Bench& bench, const std::string& what, const std::function<void(int)>& call) {
  for (int i = 0; i < kCopies; ++i) call(i);  // takes workspaces and chooses algorithms, which a graph cannot
  bench.Finish();
  const cudaStream_t stream = bench.stream().handle();
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < kRepeats; ++i) call(i);
  Check(cudaStreamEndCapture(stream, &graph), "capture");
  Check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  const Measured time = bench.Time([&](int) { Check(cudaGraphLaunch(executable, stream), "replay"); });
  Check(cudaGraphExecDestroy(executable), "graph");
  Check(cudaGraphDestroy(graph), "graph");
  const double each = time.median_us / kRepeats;
  bench.Report({"step", what, time, each, "us each", 0});
  return each;
}

}  // namespace

void RunStepBench(Bench& bench) {
  using Call = void (DecodeLayer::*)(int) const;
  struct Kernel {
    const char* name;
    Call call;
  };
  static constexpr Kernel kLayer[] = {
      {"rms_norm", &DecodeLayer::Norm},    {"qkv", &DecodeLayer::Qkv},
      {"rope_append", &DecodeLayer::Rope}, {"attention, context 1024", &DecodeLayer::Attention},
      {"output", &DecodeLayer::Output},    {"gate_up and silu_mul", &DecodeLayer::GateUp},
      {"down", &DecodeLayer::Down}};
  for (const int batch : {1, 16, 64}) {
    const DecodeLayer layer(bench, batch);
    const std::string rows = std::to_string(batch) + (batch == 1 ? " row, " : " rows, ");
    for (const Kernel& kernel : kLayer) {
      TimeInGraph(bench, rows + kernel.name, [&](int run) { (layer.*kernel.call)(run); });
    }
    TimeInGraph(bench, rows + "a whole layer", [&](int run) {
      for (const Kernel& kernel : kLayer) {
        (layer.*kernel.call)(run);
        if (kernel.call == &DecodeLayer::Output) layer.Norm(run);
      }
    });
    TimeInGraph(bench, rows + "head", [&](int run) { layer.Head(run); });
    TimeInGraph(bench, rows + "sample, greedy", [&](int run) { layer.Sample(run); });
  }
}

}  // namespace spillway::bench
