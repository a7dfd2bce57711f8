// What the conformance suites do not reach: the device and its streams, GEMM, gather, copies, and that no bit depends
// on how work was cut.

#include "tests/kernels/cuda_device.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <future>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "kernels/cuda/gather.h"
#include "kernels/cuda/stream.h"
#include "tests/kernels/kernel_rig.h"

namespace spillway {

#ifdef SPILLWAY_CUDA_EMULATED
namespace emulation {
// cuda_emulated_runtime.cc
void HoldCallbacks(bool holds);
void SetPtxVersion(int version);
}  // namespace emulation
#endif

namespace {

std::vector<std::byte> RandomBytes(Random& random, std::size_t size) {
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.Below(256));
  return bytes;
}

TEST(CudaDeviceTest, WithoutAGpuItSaysSo) {
  const absl::Status status = MakeCudaDevice(CudaTestOptions()).status();
  if (status.ok() || absl::IsNotFound(status)) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_EQ(status.message().rfind("no CUDA device", 0), 0U) << status;
}

TEST(CudaDeviceTest, RefusesBadOptions) {
  CudaDeviceOptions options;
  options.gpu_memory_utilization = 1.5;
  EXPECT_EQ(MakeCudaDevice(options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CudaDeviceTest, RefusesAnIndexThatIsNotThere) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  CudaDeviceOptions options = CudaTestOptions();
  options.index = 1000;
  EXPECT_EQ(MakeCudaDevice(options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CudaDeviceTest, MemoryIsBoundedZeroedAlignedAndGivenBack) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  const std::size_t total = device->free_bytes();
  {
    std::vector<Buffer> buffers;
    for (const std::size_t size : {0, 1, 100, 4096, 1 << 20}) {
      buffers.push_back(device->Allocate(MemoryKind::kDevice, size).value());
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffers.back().get()) % 64, 0U);
      std::vector<std::byte> seen(size, std::byte{1});
      stream->Copy(seen.data(), buffers.back().get(), size);
      ASSERT_TRUE(stream->Record()->Await().ok());
      EXPECT_EQ(seen, std::vector<std::byte>(size));
    }
    buffers.erase(buffers.begin() + 1, buffers.begin() + 4);  // a hole of several neighbours is one hole again
    const absl::Status status = device->Allocate(MemoryKind::kDevice, total).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(status.message().find(std::to_string(total)), absl::string_view::npos) << status;
    EXPECT_NE(status.message().find(std::to_string(device->free_bytes())), absl::string_view::npos) << status;
  }
  EXPECT_EQ(device->free_bytes(), total);
  EXPECT_TRUE(device->Allocate(MemoryKind::kDevice, total).ok());
  const Buffer pinned = device->Allocate(MemoryKind::kPinnedHost, 1000).value();
  for (std::size_t i = 0; i < 1000; ++i) ASSERT_EQ(pinned.get()[i], std::byte{0});
}

TEST(CudaStreamTest, CopiesAreBitExactAndInOrder) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto first = device->NewStream().value();
  const auto second = device->NewStream().value();
  Random random(1);
  for (const std::size_t size : {1, 511, 16384, 2 << 20}) {
    const std::vector<std::byte> bytes = RandomBytes(random, size);
    const Buffer from = device->Allocate(MemoryKind::kPinnedHost, size).value();
    const Buffer on_device = device->Allocate(MemoryKind::kDevice, size).value();
    const Buffer to = device->Allocate(MemoryKind::kPinnedHost, size).value();
    std::memcpy(from.get(), bytes.data(), size);
    first->Copy(on_device.get(), from.get(), size);
    second->Wait(first->Record());
    second->Copy(to.get(), on_device.get(), size);
    std::promise<bool> is_same;
    second->Notify([&] { is_same.set_value(std::memcmp(to.get(), bytes.data(), size) == 0); });
    const auto event = second->Record();
    EXPECT_TRUE(is_same.get_future().get());
    EXPECT_TRUE(event->Await().ok());
    EXPECT_TRUE(event->Ready());
  }
}

TEST(CudaStreamTest, HeldCopiesGoBeforeWhateverFollowsThem) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  constexpr std::size_t kSpan = 1000;
  constexpr std::size_t kSpans = 300;
  Random random(2);
  const std::vector<std::byte> bytes = RandomBytes(random, kSpans * kSpan);
  const Buffer from = device->Allocate(MemoryKind::kPinnedHost, bytes.size()).value();
  const Buffer on_device = device->Allocate(MemoryKind::kDevice, bytes.size()).value();
  const Buffer to = device->Allocate(MemoryKind::kPinnedHost, bytes.size()).value();
  std::memcpy(from.get(), bytes.data(), bytes.size());
  std::vector<const std::byte*> spans;  // backwards
  stream->Hold();
  for (std::size_t i = 0; i < kSpans; ++i) {
    stream->Copy(on_device.get() + i * kSpan, from.get() + i * kSpan, i % 7 == 3 ? 0 : kSpan);
    spans.push_back(on_device.get() + (kSpans - 1 - i) * kSpan);
  }
  const std::shared_ptr<Event> event = stream->Record();
  stream->Gather(to.get(), spans, 0, kSpan);
  stream->Copy(on_device.get(), from.get() + kSpan, kSpan);  // after it was gathered
  stream->Resume();
  EXPECT_TRUE(event->Await().ok());
  ASSERT_TRUE(stream->Record()->Await().ok());
  for (std::size_t i = 0; i < kSpans; ++i) {
    const std::byte* const arrived = to.get() + (kSpans - 1 - i) * kSpan;
    EXPECT_EQ(std::memcmp(arrived, bytes.data() + i * kSpan, kSpan) == 0, i % 7 != 3) << i;
  }
}

TEST(CudaStreamTest, EventsTellTheTimeBetweenThemAcrossStreams) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto first = device->NewStream().value();
  const auto second = device->NewStream().value();
  constexpr std::size_t kBytes = std::size_t{32} << 20;
  const Buffer from = device->Allocate(MemoryKind::kDevice, kBytes).value();
  const Buffer to = device->Allocate(MemoryKind::kDevice, kBytes).value();
  const auto begin = first->RecordTime();
  first->Copy(to.get(), from.get(), kBytes);
  const auto end = first->RecordTime();
  second->Wait(end);
  second->Copy(from.get(), to.get(), kBytes);
  const auto later = second->RecordTime();
  ASSERT_TRUE(later->Await().ok());
  EXPECT_GT(end->SecondsSince(*begin), 0);
  EXPECT_GT(later->SecondsSince(*end), 0);
}

// What is queued behind a notification does not wait for the host to have run it.
TEST(CudaStreamTest, ANotificationDoesNotHoldUpItsStream) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
#ifdef SPILLWAY_CUDA_EMULATED
  GTEST_SKIP() << "emulated notifications run where they are queued";
#endif
  const auto stream = device->NewStream().value();
  const Buffer host = device->Allocate(MemoryKind::kPinnedHost, 4096).value();
  const Buffer on_device = device->Allocate(MemoryKind::kDevice, 4096).value();
  std::promise<void> is_copied;
  std::promise<void> is_notified;
  stream->Notify([&] {
    is_copied.get_future().wait();
    is_notified.set_value();
  });
  stream->Copy(on_device.get(), host.get(), 4096);
  ASSERT_TRUE(stream->Record()->Await().ok());
  is_copied.set_value();
  is_notified.get_future().wait();
}

TEST(CudaStreamTest, TheFirstErrorSticksAndNotificationsStillCome) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  const auto dependent = device->NewStream().value();
  const std::vector<std::int32_t> tokens = {1, 99};
  const Buffer memory = device->Allocate(MemoryKind::kDevice, 4096).value();
  stream->Copy(memory.get(), reinterpret_cast<const std::byte*>(tokens.data()), 8);
  EmbedArgs args;
  args.tokens = reinterpret_cast<const std::int32_t*>(memory.get());
  args.num_tokens = 2;
  args.table = {memory.get() + 1024, DType::kF32, 4, 4, 4};
  args.out = reinterpret_cast<float*>(memory.get() + 2048);
  device->kernels().Embed(*stream, args);
  const absl::Status status = stream->Record()->Await();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_NE(status.message().find("99"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find("row 1"), absl::string_view::npos) << status;
  std::promise<void> notified;
  stream->Notify([&] { notified.set_value(); });
  notified.get_future().wait();
  dependent->Wait(stream->Record());
  EXPECT_EQ(dependent->status(), status);
}

// Keeps a stream busy until it is released.
class BusyStream {
 public:
  explicit BusyStream([[maybe_unused]] Stream& stream) {
#ifdef SPILLWAY_CUDA_EMULATED
    emulation::HoldCallbacks(true);
#else
    stream.Notify([this] { released_.get_future().wait(); });
#endif
  }
  void Release() {
#ifdef SPILLWAY_CUDA_EMULATED
    emulation::HoldCallbacks(false);
#else
    released_.set_value();
#endif
  }

 private:
  std::promise<void> released_;
};

TEST(CudaStreamTest, ARefusedCallEndsNoWaitForTheWorkBeforeIt) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  BusyStream busy(*stream);
  std::atomic<int> num_reached = 0;
  std::promise<void> last;
  stream->Notify([&] { ++num_reached; });
  static_cast<cuda::CudaStream&>(*stream).Queue("refused", [](cudaStream_t) { return cudaErrorInvalidValue; });
  EXPECT_FALSE(stream->status().ok());
  stream->Notify([&] {
    ++num_reached;
    last.set_value();
  });
  EXPECT_EQ(num_reached, 0) << "the stream is still busy with what was queued before";
  busy.Release();
  last.get_future().wait();
  EXPECT_EQ(num_reached, 2);
}

// What `gate_up` holds goes to `to`, by way of another stream.
class CudaRepeatTest : public testing::Test {
 protected:
  // SiLU(large) is the identity: out = gate * up.
  static constexpr float kGate = 100;
  static constexpr std::int64_t kSize = 4;

  void Queue(Device& device, Stream& stream, Stream& other, const float* gate_up, float* halfway, float* to) {
    ++times_queued_;
    device.kernels().SiluMul(
        stream, {.gate_up = gate_up, .num_tokens = 1, .inner = kSize, .out = reinterpret_cast<std::byte*>(halfway)});
    other.Wait(stream.Record());
    other.Copy(reinterpret_cast<std::byte*>(to), reinterpret_cast<const std::byte*>(halfway), kSize * sizeof(float));
    if (joins_) stream.Wait(other.Record());
  }
  // The values after each of `rounds` repetitions whose input is 1, 2, ...
  std::vector<float> Run(Device& device, Stream& stream, int rounds, std::uint64_t num_keys = 1) {
    const auto other = device.NewStream().value();
    const auto pinned = [&](std::int64_t size) {
      buffers_.push_back(
          device.Allocate(MemoryKind::kPinnedHost, static_cast<std::size_t>(size) * sizeof(float)).value());
      return reinterpret_cast<float*>(buffers_.back().get());
    };
    float* const gate_up = pinned(2 * kSize);
    float* const halfway = pinned(kSize);
    float* const to = pinned(kSize);
    std::vector<float> seen;
    for (int i = 0; i < rounds; ++i) {
      for (std::int64_t k = 0; k < kSize; ++k) {
        gate_up[k] = kGate;
        gate_up[kSize + k] = static_cast<float>(i + 1) / kGate;
      }
      stream.Repeat(static_cast<std::uint64_t>(i) % num_keys,
                    [&] { Queue(device, stream, *other, gate_up, halfway, to); });
      if (!stream.Record()->Await().ok()) return {};
      seen.push_back(to[kSize - 1]);
    }
    return seen;
  }

  int times_queued_ = 0;
  bool joins_ = true;
  std::vector<Buffer> buffers_;  // outlive the streams
};

TEST_F(CudaRepeatTest, RepeatedWorkIsRecordedOnceAndReadsWhatIsThereNow) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  EXPECT_THAT(Run(*device, *stream, 5), testing::Pointwise(testing::FloatEq(), {1, 2, 3, 4, 5}));
  EXPECT_EQ(times_queued_, 2) << "the first time as it is, the second time to record it";
}

TEST_F(CudaRepeatTest, EveryKeyHasItsOwnWork) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  EXPECT_THAT(Run(*device, *stream, 6, 3), testing::Pointwise(testing::FloatEq(), {1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(times_queued_, 6);
}

TEST_F(CudaRepeatTest, EagerWorkIsQueuedEachTime) {
  CudaDeviceOptions options = CudaTestOptions();
  options.enforce_eager = true;
  SPILLWAY_CUDA_OR_SKIP(device, options);
  const auto stream = device->NewStream().value();
  EXPECT_THAT(Run(*device, *stream, 4), testing::Pointwise(testing::FloatEq(), {1, 2, 3, 4}));
  EXPECT_EQ(times_queued_, 4);
  EXPECT_EQ(device->PaddedRows(9), 9);
}

TEST_F(CudaRepeatTest, AForkThatIsNotJoinedFailsTheStreamByName) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  joins_ = false;
  Run(*device, *stream, 2);
  EXPECT_FALSE(stream->status().ok());
  EXPECT_NE(stream->status().message().find("recording repeated work"), absl::string_view::npos) << stream->status();
}

TEST(CudaDeviceTest, FewSizesOfPaddedSteps) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  std::set<std::int64_t> sizes;
  for (std::int64_t rows = 1; rows <= 1024; ++rows) {
    const std::int64_t padded = device->PaddedRows(rows);
    ASSERT_GE(padded, rows);
    ASSERT_LE(padded, rows <= 8 ? 2 * rows - 1 : std::max<std::int64_t>(rows + 7, rows * 9 / 8)) << rows;
    ASSERT_EQ(device->PaddedRows(padded), padded);
    sizes.insert(padded);
  }
  EXPECT_EQ(sizes.size(), 43U);
}

TEST(CudaGatherTest, RowsOfEverySizeArriveBitExact) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  Random random(2);
  for (const std::int32_t row_bytes : {16, 48, 128, 256, 512, 1024, 8192}) {
    for (const int num_ctas : {0, 1, 5}) {
      constexpr std::int64_t kSlots = 300;
      constexpr std::int64_t kRows = 173;
      const auto size = static_cast<std::size_t>(kSlots * row_bytes);
      const Buffer host = device->Allocate(MemoryKind::kPinnedHost, size).value();
      const std::vector<std::byte> bytes = RandomBytes(random, size);
      std::memcpy(host.get(), bytes.data(), size);
      std::vector<std::int64_t> slots(kSlots);
      std::iota(slots.begin(), slots.end(), 0);
      std::shuffle(slots.begin(), slots.end(), random.engine());
      std::vector<std::int64_t> offsets;  // sources, destinations, then the number of rows
      for (std::int64_t i = 0; i < kRows; ++i) offsets.push_back(random.Below(kSlots) * row_bytes);
      for (std::int64_t i = 0; i < kRows; ++i) offsets.push_back(slots[static_cast<std::size_t>(i)] * row_bytes);
      offsets.push_back(kRows - 3);
      const Buffer table = device->Allocate(MemoryKind::kDevice, offsets.size() * 8).value();
      stream->Copy(table.get(), reinterpret_cast<const std::byte*>(offsets.data()), table.size_bytes);
      const auto* const on_device = reinterpret_cast<const std::int64_t*>(table.get());
      for (const bool counts_on_device : {false, true}) {
        const Buffer to = device->Allocate(MemoryKind::kDevice, size).value();
        cuda::GatherRows(*stream,
                         {.source = host.get(),
                          .destination = to.get(),
                          .source_offsets = on_device,
                          .destination_offsets = on_device + kRows,
                          .num_rows_device =
                              counts_on_device ? reinterpret_cast<const std::int32_t*>(on_device + 2 * kRows) : nullptr,
                          .num_rows = kRows,
                          .row_bytes = row_bytes,
                          .num_ctas = num_ctas});
        std::vector<std::byte> expected(size);
        for (std::int64_t i = 0; i < (counts_on_device ? kRows - 3 : kRows); ++i) {
          std::memcpy(expected.data() + offsets[static_cast<std::size_t>(kRows + i)],
                      bytes.data() + offsets[static_cast<std::size_t>(i)], static_cast<std::size_t>(row_bytes));
        }
        std::vector<std::byte> actual(size);
        stream->Copy(actual.data(), to.get(), size);
        ASSERT_TRUE(stream->Record()->Await().ok()) << stream->status();
        ASSERT_EQ(actual, expected) << row_bytes << " bytes";
      }
    }
  }
}

TEST(CudaGatherTest, RefusesRowsThatAreNotWholePieces) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  cuda::GatherRows(*stream, {.source = nullptr,
                             .destination = nullptr,
                             .source_offsets = nullptr,
                             .destination_offsets = nullptr,
                             .num_rows_device = nullptr,
                             .num_rows = 1,
                             .row_bytes = 24,
                             .num_ctas = 0});
  EXPECT_EQ(stream->status().code(), absl::StatusCode::kInternal);
}

class CudaGemmTest : public testing::TestWithParam<DType> {};

TEST_P(CudaGemmTest, MatchesTheOracleAndARowDoesNotDependOnTheOthers) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const HostFacingKernels kernels(*device);
  const auto stream = device->NewStream().value();
  Random random(3);
  struct Shape {
    std::int64_t columns;
    std::int64_t depth;
  };
  for (const Shape shape : {Shape{1, 1}, {3, 5}, {64, 64}, {65, 40}, {192, 136}, {130, 1024}}) {
    const Array w(GetParam(), random.Normals(static_cast<std::size_t>(shape.columns * shape.depth)));
    // Two parts, the second with a stride: one matrix.
    const std::int64_t split = shape.columns / 2;
    std::vector<MatrixView> parts;
    if (split > 0) parts.push_back({w.data(), GetParam(), split, shape.depth, shape.depth});
    parts.push_back({w.data() + static_cast<std::size_t>(split * shape.depth) * SizeOf(GetParam()), GetParam(),
                     shape.columns - split, shape.depth, shape.depth});
    const auto weight = kernels.Pack(parts).value();
    const std::vector<float> bias = random.Normals(static_cast<std::size_t>(shape.columns));
    constexpr std::int64_t kMaxRows = 100;
    const std::vector<float> values = random.Normals(static_cast<std::size_t>(kMaxRows * shape.depth));
    const std::vector<float> before = random.Normals(static_cast<std::size_t>(kMaxRows * shape.columns));
    for (const bool has_bias : {false, true}) {
      for (const bool adds : {false, true}) {
        std::vector<float> whole;
        for (const std::int64_t num_rows : {std::int64_t{100}, std::int64_t{1}, std::int64_t{17}, std::int64_t{64}}) {
          const Array a(GetParam(), {values.begin(), values.begin() + num_rows * shape.depth});
          std::vector<float> out(before.begin(), before.begin() + num_rows * shape.columns);
          GemmArgs args;
          args.a = a.data();
          args.a_dtype = GetParam();
          args.num_rows = num_rows;
          args.weight = weight.get();
          args.bias = has_bias ? bias.data() : nullptr;
          args.output = adds ? GemmOutput::kAdd : GemmOutput::kStore;
          args.out = out.data();
          kernels.Gemm(*stream, args);
          ASSERT_TRUE(stream->Record()->Await().ok()) << stream->status();
          const std::string what = std::to_string(num_rows) + " x " + std::to_string(shape.columns) + " x " +
                                   std::to_string(shape.depth) + (has_bias ? ", bias" : "") + (adds ? ", added" : "");
          if (!whole.empty()) {
            ExpectSameBits(out, {whole.begin(), whole.begin() + num_rows * shape.columns}, what);
            continue;
          }
          whole = out;
          std::vector<float> oracle;
          for (std::size_t m = 0; m < static_cast<std::size_t>(num_rows); ++m) {
            for (std::size_t n = 0; n < static_cast<std::size_t>(shape.columns); ++n) {
              const auto depth = static_cast<std::size_t>(shape.depth);
              double sum = (has_bias ? bias[n] : 0.0) + (adds ? before[oracle.size()] : 0.0);
              for (std::size_t k = 0; k < depth; ++k) sum += double{a.at(m * depth + k)} * w.at(n * depth + k);
              oracle.push_back(static_cast<float>(sum));
            }
          }
          ExpectNear(out, oracle, 1e-6F * static_cast<float>(shape.depth) + 1e-6F, what);
        }
      }
    }
  }
}

// The fastest algorithm of a power of two of rows may refuse fewer: then one is chosen for these.
TEST(CudaBlasTest, FastestAlgorithmsTakeEveryNumberOfRows) {
  CudaDeviceOptions options = CudaTestOptions();
  options.batch_invariant = false;
  SPILLWAY_CUDA_OR_SKIP(device, options);
  const HostFacingKernels kernels(*device);
  const auto stream = device->NewStream().value();
  Random random(6);
  constexpr std::int64_t kColumns = 40;
  constexpr std::int64_t kDepth = 72;
  const Array w(DType::kBF16, random.Normals(kColumns * kDepth));
  const MatrixView view = {w.data(), DType::kBF16, kColumns, kDepth, kDepth};
  const auto weight = kernels.Pack({&view, 1}).value();
  for (const std::int64_t num_rows : {1, 3, 16, 21, 64, 65}) {
    const Array a(DType::kBF16, random.Normals(static_cast<std::size_t>(num_rows * kDepth)));
    std::vector<float> out(static_cast<std::size_t>(num_rows * kColumns), 1.0F);
    GemmArgs args;
    args.a = a.data();
    args.a_dtype = DType::kBF16;
    args.num_rows = num_rows;
    args.weight = weight.get();
    args.output = GemmOutput::kAdd;
    args.out = out.data();
    kernels.Gemm(*stream, args);
    ASSERT_TRUE(stream->Record()->Await().ok()) << stream->status();
    for (std::int64_t m = 0; m < num_rows; ++m) {
      for (std::int64_t n = 0; n < kColumns; ++n) {
        double sum = 1;
        for (std::int64_t k = 0; k < kDepth; ++k) {
          sum +=
              double{a.at(static_cast<std::size_t>(m * kDepth + k))} * w.at(static_cast<std::size_t>(n * kDepth + k));
        }
        ASSERT_NEAR(out[static_cast<std::size_t>(m * kColumns + n)], sum, 1e-4) << num_rows << " rows";
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaGemmTest, testing::Values(DType::kF32, DType::kBF16, DType::kF16),
                         [](const auto& dtype) { return std::string(NameOf(dtype.param)); });

// Sequences that decode one token each, over a pool of their own.
class DecodeProblem {
 public:
  DecodeProblem(const KvLayout& layout, int num_heads, const std::vector<std::int32_t>& contexts, Random& random)
      : pool_(layout.dtype, 0), q_(layout.dtype, 0) {
    for (const std::int32_t context : contexts) {
      query_begin_.push_back(query_begin_.back() + 1);
      first_position_.push_back(context - 1);
      for (std::int32_t i = 0; i < (context + kBlockTokens - 1) / kBlockTokens; ++i) {
        block_table_.push_back(static_cast<std::int32_t>(block_table_.size()));
      }
      block_begin_.push_back(static_cast<std::int32_t>(block_table_.size()));
    }
    pool_ = Array(layout.dtype, random.Normals(block_table_.size() * layout.block_bytes() / SizeOf(layout.dtype)));
    q_ = Array(layout.dtype, random.Normals(contexts.size() * static_cast<std::size_t>(num_heads * layout.head_dim)));
    args_.q = q_.data();
    args_.q_dtype = layout.dtype;
    args_.num_heads = num_heads;
    args_.scale = 0.3F;
    args_.kv = {pool_.data(), layout};
    args_.num_sequences = args_.num_tokens = static_cast<std::int64_t>(contexts.size());
    args_.query_begin = query_begin_.data();
    args_.first_position = first_position_.data();
    args_.block_begin = block_begin_.data();
    args_.block_table = block_table_.data();
  }
  DecodeProblem(const DecodeProblem&) = delete;
  DecodeProblem& operator=(const DecodeProblem&) = delete;

  std::vector<float> Run(Device& device) const { return Run(device, args_); }
  std::vector<float> RunWithBias(Device& device) const {
    const auto stride = static_cast<std::int64_t>(args_.kv.layout.num_kv_heads) * kBlockTokens;
    std::vector<float> bias(block_table_.size() * static_cast<std::size_t>(stride));
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i % 13) / 4;
    AttentionArgs args = args_;
    args.row_bias = bias.data();
    args.row_bias_stride = stride;
    return Run(device, args);
  }

 private:
  std::vector<float> Run(Device& device, AttentionArgs args) const {
    const Array out(DType::kF32, q_.size());
    args.out = out.data();
    const auto stream = device.NewStream().value();
    HostFacingKernels(device).Attention(*stream, args);
    EXPECT_TRUE(stream->status().ok()) << stream->status();
    return out.Values();
  }

  std::vector<std::int32_t> query_begin_ = {0};
  std::vector<std::int32_t> first_position_;
  std::vector<std::int32_t> block_begin_ = {0};
  std::vector<std::int32_t> block_table_;
  Array pool_;
  Array q_;
  AttentionArgs args_;
};

// With room for no partial state at all every sequence is computed by one CTA per tile; the bits are the same.
TEST(CudaAttentionTest, BitsDoNotDependOnTheWorkspace) {
  CudaDeviceOptions small = CudaTestOptions();
  small.attention_workspace_bytes = 4096;
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  SPILLWAY_CUDA_OR_SKIP(small_device, small);
  Random random(4);
  for (const DType dtype : {DType::kBF16, DType::kF16, DType::kF32}) {
    for (const int head_dim : {64, 128, 40}) {
      const DecodeProblem problem({1, 2, head_dim, dtype}, 6, {1000, 1, 257, 600}, random);
      ExpectSameBits(problem.Run(*small_device), problem.Run(*device), "head_dim " + std::to_string(head_dim));
    }
  }
  // More states than the merge has on their way at once, of few rows and of many.
  for (const int num_heads : {2, 16}) {
    const DecodeProblem problem({1, 1, 64, DType::kBF16}, num_heads, {32000, 16500}, random);
    ExpectSameBits(problem.Run(*small_device), problem.Run(*device), std::to_string(num_heads) + " heads, long");
  }
}

#ifdef SPILLWAY_CUDA_EMULATED
TEST(CudaAttentionTest, BitsDoNotDependOnTheCopyEngine) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  emulation::SetPtxVersion(80);
  SPILLWAY_CUDA_OR_SKIP(older_device, CudaTestOptions());
  emulation::SetPtxVersion(90);
  Random random(6);
  for (const int head_dim : {64, 128}) {
    const DecodeProblem problem({1, 2, head_dim, DType::kF16}, 6, {1000, 1, 257, 600}, random);
    const std::string what = "head_dim " + std::to_string(head_dim);
    ExpectSameBits(problem.Run(*older_device), problem.Run(*device), what);
    ExpectSameBits(problem.RunWithBias(*older_device), problem.RunWithBias(*device), what + ", with a bias");
  }
}
#endif

// A sequence beyond the device's memory: its head is read from pinned host memory in place.
TEST(CudaAttentionTest, PassesOverHostAndDeviceMemoryEqualOneCall) {
  CudaDeviceOptions small = CudaTestOptions();
  small.attention_workspace_bytes = 4096;
  constexpr std::int32_t kContext = 1100;
  constexpr std::int32_t kBlocks = (kContext + kBlockTokens - 1) / kBlockTokens;
  constexpr int kHeads = 8;
  for (const CudaDeviceOptions& options : {CudaTestOptions(), small}) {
    SPILLWAY_CUDA_OR_SKIP(device, options);
    for (const int head_dim : {64, 128, 40}) {
      const KvLayout layout{1, 2, head_dim, DType::kBF16};
      const std::size_t pool_bytes = kBlocks * layout.block_bytes();
      Random random(8);
      std::vector<Buffer> kept;
      const auto pinned = [&]<typename T>(const std::vector<T>& values) {
        kept.push_back(device->Allocate(MemoryKind::kPinnedHost, values.size() * sizeof(T)).value());
        std::memcpy(kept.back().get(), values.data(), kept.back().size_bytes);
        return reinterpret_cast<T*>(kept.back().get());
      };
      const auto normals = [&](std::size_t size) {
        std::vector<std::uint16_t> values(size);
        for (std::uint16_t& value : values) value = BF16FromFloat(random.Normal());
        return reinterpret_cast<std::byte*>(pinned(values));
      };
      std::vector<std::int32_t> table(kBlocks);
      std::iota(table.begin(), table.end(), 0);
      const std::size_t size = kHeads * static_cast<std::size_t>(head_dim);
      float* const out = pinned(std::vector<float>(size));
      AttentionArgs args;
      args.q = normals(size);
      args.q_dtype = DType::kBF16;
      args.num_heads = kHeads;
      args.scale = 0.2F;
      args.num_sequences = args.num_tokens = 1;
      args.query_begin = pinned(std::vector<std::int32_t>{0, 1});
      args.first_position = pinned(std::vector<std::int32_t>{kContext - 1});
      args.block_begin = pinned(std::vector<std::int32_t>{0, kBlocks});
      args.block_table = pinned(table);
      args.out = reinterpret_cast<std::byte*>(out);
      args.states = pinned(std::vector<float>(kHeads * (static_cast<std::size_t>(head_dim) + 2)));
      std::byte* const host_pool = normals(pool_bytes / 2);
      const Buffer device_pool = device->Allocate(MemoryKind::kDevice, pool_bytes).value();
      const auto stream = device->NewStream().value();
      stream->Copy(device_pool.get(), host_pool, pool_bytes);

      const auto attend = [&](AttentionPass pass, std::byte* pool, std::int32_t begin, std::int32_t end) {
        args.pass = pass;
        args.kv = {pool, layout};
        args.key_begin = pinned(std::vector<std::int32_t>{begin});
        args.key_end = pinned(std::vector<std::int32_t>{end});
        args.block_table = pinned(std::vector<std::int32_t>(table.begin() + begin / kBlockTokens, table.end()));
        device->kernels().Attention(*stream, args);
        ASSERT_TRUE(stream->Record()->Await().ok()) << stream->status();
      };
      attend(AttentionPass::kWhole, device_pool.get(), 0, kContext);
      const std::vector<float> whole(out, out + size);
      std::fill(out, out + size, 0.0F);
      attend(AttentionPass::kFirst, host_pool, 0, 512);
      attend(AttentionPass::kMiddle, host_pool, 512, 768);
      attend(AttentionPass::kLast, device_pool.get(), 768, kContext);
      ExpectSameBits({out, out + size}, whole, "head_dim " + std::to_string(head_dim));
    }
  }
}

TEST(CudaAttentionTest, RefusesWhatItHasNoKernelFor) {
  SPILLWAY_CUDA_OR_SKIP(device, CudaTestOptions());
  const auto stream = device->NewStream().value();
  AttentionArgs args;
  args.num_heads = 1;
  args.num_tokens = args.num_sequences = 1;
  args.kv.layout = {1, 1, 512, DType::kBF16};
  device->kernels().Attention(*stream, args);
  EXPECT_EQ(stream->status().code(), absl::StatusCode::kUnimplemented);
}

}  // namespace
}  // namespace spillway
