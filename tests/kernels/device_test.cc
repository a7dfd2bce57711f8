#include "kernels/device.h"

#include <atomic>
#include <cstring>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "kernels/cpu/stream.h"
#include "tests/kernels/kernel_rig.h"

namespace spillway {
namespace {

std::unique_ptr<Device> MakeDevice(CpuDeviceOptions options = {}) {
  if (options.num_workers == 0) options.num_workers = 2;
  return MakeCpuDevice(options).value();
}

// Blocks a stream until opened.
class Gate {
 public:
  void Open() { promise_.set_value(); }
  std::function<absl::Status(const cpu::WorkPlace&)> Work() {
    return [future = future_](const cpu::WorkPlace&) {
      future.wait();
      return absl::OkStatus();
    };
  }

 private:
  std::promise<void> promise_;
  std::shared_future<void> future_ = promise_.get_future().share();
};

cpu::CpuStream& CpuStreamOf(Stream& stream) { return static_cast<cpu::CpuStream&>(stream); }

TEST(DeviceTest, RefusesBadOptions) {
  CpuDeviceOptions options;
  options.target = "sse";
  const absl::Status status = MakeCpuDevice(options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  for (const std::string& target : AllTargets()) {
    EXPECT_NE(status.message().find(target), absl::string_view::npos) << status;
  }
  options.target = "auto";
  options.gemm = "blas";
  EXPECT_EQ(MakeCpuDevice(options).status().code(), absl::StatusCode::kInvalidArgument);
  options.gemm = "auto";
  options.num_workers = -1;
  EXPECT_EQ(MakeCpuDevice(options).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(DeviceTest, DescribesItself) {
  for (const std::string& target : AllTargets()) {
    Rig rig(target);
    EXPECT_EQ(rig.device().description().rfind("cpu " + target, 0), 0U) << rig.device().description();
  }
}

TEST(DeviceTest, CopiesEverySizeAndAlignment) {
  constexpr std::size_t kMost = 40'000;
  std::vector<std::byte> from(kMost + 64);
  for (std::size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 131 >> 3);
  const auto device = MakeDevice();
  const auto stream = device->NewStream().value();
  for (const std::size_t size : {0UL, 1UL, 63UL, 64UL, 16'383UL, 16'384UL, 16'385UL, kMost}) {
    for (const std::size_t skew : {0UL, 1UL, 32UL}) {
      const Buffer to = device->Allocate(MemoryKind::kDevice, kMost + 128).value();
      stream->Copy(to.get() + skew, from.data() + skew, size);
      ASSERT_TRUE(stream->Record()->Await().ok());
      EXPECT_EQ(std::memcmp(to.get() + skew, from.data() + skew, size), 0) << size << " bytes, skewed by " << skew;
      for (std::size_t i = 0; i < skew; ++i) EXPECT_EQ(to.get()[i], std::byte{0});
      EXPECT_EQ(to.get()[skew + size], std::byte{0}) << size;
    }
  }
}

TEST(DeviceTest, GathersSpansOfEverySize) {
  constexpr std::size_t kSpans = 5;
  constexpr std::size_t kOffset = 192;
  std::vector<std::byte> source(kSpans * 20'000);
  for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::byte>(i * 131 >> 3);
  const auto device = MakeDevice();
  const auto stream = device->NewStream().value();
  for (const std::size_t size : {1UL, 64UL, 2047UL, 2048UL, 2112UL, 2113UL, 16'384UL}) {
    std::vector<const std::byte*> from;
    for (std::size_t i = 0; i < kSpans; ++i) from.push_back(source.data() + (i * 3 % kSpans) * 20'000);
    std::vector<std::byte> to(kSpans * size + 64);
    stream->Gather(to.data(), from, kOffset, size);
    ASSERT_TRUE(stream->Record()->Await().ok());
    for (std::size_t i = 0; i < kSpans; ++i) {
      EXPECT_EQ(std::memcmp(to.data() + i * size, from[i] + kOffset, size), 0) << "span " << i << " of " << size;
    }
    EXPECT_EQ(to[kSpans * size], std::byte{0}) << "written behind the end";
  }
}

TEST(DeviceTest, MemoryIsBoundedZeroedAlignedAndGivenBack) {
  CpuDeviceOptions options;
  options.memory_bytes = std::size_t{8} << 20;
  const auto device = MakeDevice(options);
  EXPECT_EQ(device->free_bytes(), options.memory_bytes);
  {
    const Buffer small = device->Allocate(MemoryKind::kDevice, 100).value();
    const Buffer large = device->Allocate(MemoryKind::kDevice, std::size_t{5} << 20).value();
    for (const Buffer& buffer : {small, large}) {
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.get()) % 64, 0U);
      for (std::size_t i = 0; i < buffer.size_bytes; ++i) ASSERT_EQ(buffer.get()[i], std::byte{0});
      std::memset(buffer.get(), 0xff, buffer.size_bytes);
    }
    EXPECT_EQ(device->free_bytes(), options.memory_bytes - 100 - (std::size_t{5} << 20));
    const absl::Status status = device->Allocate(MemoryKind::kDevice, std::size_t{4} << 20).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(status.message().find("4194304"), absl::string_view::npos) << status;
    EXPECT_NE(status.message().find(std::to_string(device->free_bytes())), absl::string_view::npos) << status;
    EXPECT_TRUE(device->Allocate(MemoryKind::kPinnedHost, std::size_t{64} << 20).ok());
  }
  EXPECT_EQ(device->free_bytes(), options.memory_bytes);
  EXPECT_TRUE(device->Allocate(MemoryKind::kDevice, options.memory_bytes).ok());
  EXPECT_TRUE(device->Allocate(MemoryKind::kDevice, 0).ok());
}

TEST(DeviceTest, BuffersMayOutliveTheDevice) {
  Buffer buffer;
  {
    const auto device = MakeDevice();
    buffer = device->Allocate(MemoryKind::kDevice, 1000).value();
  }
  buffer.get()[999] = std::byte{1};
}

TEST(StreamTest, IsAFifo) {
  const auto device = MakeDevice();
  const auto stream = device->NewStream().value();
  std::vector<int> order;
  for (int i = 0; i < 1000; ++i) {
    CpuStreamOf(*stream).Enqueue([&order, i](const cpu::WorkPlace&) {
      order.push_back(i);
      return absl::OkStatus();
    });
  }
  ASSERT_TRUE(stream->Record()->Await().ok());
  ASSERT_EQ(order.size(), 1000U);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(order[static_cast<std::size_t>(i)], i);
}

TEST(StreamTest, CopyEventAndNotifyComeInOrder) {
  const auto device = MakeDevice();
  const auto stream = device->NewStream().value();
  Gate gate;
  CpuStreamOf(*stream).Enqueue(gate.Work());
  std::vector<std::byte> from(1000, std::byte{7});
  std::vector<std::byte> to(1000);
  stream->Copy(to.data(), from.data(), from.size());
  std::promise<std::byte> seen;
  stream->Notify([&] { seen.set_value(to[999]); });
  const auto event = stream->Record();
  EXPECT_FALSE(event->Ready());
  gate.Open();
  EXPECT_EQ(seen.get_future().get(), std::byte{7});
  EXPECT_TRUE(event->Await().ok());
  EXPECT_TRUE(event->Ready());
}

TEST(StreamTest, WhatIsHeldBeginsWithResumeInOrder) {
  std::unique_ptr<Device> device = MakeDevice();
  std::unique_ptr<Stream> stream = *device->NewStream();
  std::vector<int> order;
  stream->Hold();
  stream->Notify([&order] { order.push_back(1); });
  const std::shared_ptr<Event> held = stream->Record();
  ASSERT_TRUE((*device->NewStream())->Record()->Await().ok());  // another stream goes on
  EXPECT_FALSE(held->Ready());
  stream->Notify([&order] { order.push_back(2); });
  stream->Resume();
  stream->Notify([&order] { order.push_back(3); });
  ASSERT_TRUE(stream->Record()->Await().ok());
  EXPECT_TRUE(held->Ready());
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

TEST(StreamTest, EventsTellTheTimeBetweenThemAcrossStreams) {
  const auto device = MakeDevice();
  const auto first = device->NewStream().value();
  const auto second = device->NewStream().value();
  std::vector<std::byte> from(1 << 20);
  std::vector<std::byte> to(1 << 20);
  const auto begin = first->RecordTime();
  Gate gate;
  CpuStreamOf(*first).Enqueue(gate.Work());
  const auto end = first->RecordTime();
  EXPECT_EQ(end->SecondsSince(*begin), 0) << "not reached yet";
  gate.Open();
  second->Wait(end);
  second->Copy(to.data(), from.data(), to.size());
  const auto later = second->RecordTime();
  ASSERT_TRUE(later->Await().ok());
  EXPECT_GE(end->SecondsSince(*begin), 0);
  EXPECT_GT(later->SecondsSince(*end), 0);
  EXPECT_EQ(begin->SecondsSince(*later), -later->SecondsSince(*begin));
}

TEST(StreamTest, WaitOrdersTwoStreamsWithoutBlockingTheCaller) {
  const auto device = MakeDevice();
  const auto first = device->NewStream().value();
  const auto second = device->NewStream().value();
  Gate gate;
  int value = 0;
  CpuStreamOf(*first).Enqueue(gate.Work());
  CpuStreamOf(*first).Enqueue([&value](const cpu::WorkPlace&) {
    value = 42;
    return absl::OkStatus();
  });
  second->Wait(first->Record());
  int seen = 0;
  CpuStreamOf(*second).Enqueue([&value, &seen](const cpu::WorkPlace&) {
    seen = value;
    return absl::OkStatus();
  });
  const auto done = second->Record();
  EXPECT_FALSE(done->Ready());
  gate.Open();
  ASSERT_TRUE(done->Await().ok());
  EXPECT_EQ(seen, 42);
}

TEST(StreamTest, TheFirstErrorSticksAndSkipsLaterWork) {
  const auto device = MakeDevice();
  const auto stream = device->NewStream().value();
  const auto dependent = device->NewStream().value();
  std::atomic<int> num_run = 0;
  const auto before = stream->Record();
  CpuStreamOf(*stream).Enqueue([](const cpu::WorkPlace&) { return absl::InternalError("first"); });
  CpuStreamOf(*stream).Enqueue([&num_run](const cpu::WorkPlace&) {
    ++num_run;
    return absl::InternalError("second");
  });
  std::byte to{1};
  const std::byte from{2};
  stream->Copy(&to, &from, 1);
  std::promise<void> notified;
  stream->Notify([&notified] { notified.set_value(); });
  const auto after = stream->Record();
  dependent->Wait(after);
  EXPECT_TRUE(before->Await().ok());
  EXPECT_EQ(after->Await().message(), "first");
  notified.get_future().wait();
  EXPECT_EQ(stream->status().message(), "first");
  EXPECT_EQ(num_run, 0);
  EXPECT_EQ(to, std::byte{1});
  EXPECT_EQ(dependent->Record()->Await().message(), "first") << "what follows a failed event would read garbage";
}

TEST(StreamTest, DestructorRunsWhatIsQueued) {
  const auto device = MakeDevice();
  std::atomic<int> num_run = 0;
  {
    const auto stream = device->NewStream().value();
    for (int i = 0; i < 100; ++i) {
      CpuStreamOf(*stream).Enqueue([&num_run](const cpu::WorkPlace&) {
        ++num_run;
        return absl::OkStatus();
      });
    }
  }
  EXPECT_EQ(num_run, 100);
}

TEST(FaultHookTest, BeforeItemRunsOnTheStreamsThreadBeforeEveryItem) {
  std::atomic<int> num_calls = 0;
  std::thread::id thread;
  CpuDeviceOptions options;
  options.before_item = [&] {
    thread = std::this_thread::get_id();
    ++num_calls;
  };
  const auto device = MakeDevice(options);
  const auto stream = device->NewStream().value();
  std::byte to{};
  const std::byte from{1};
  stream->Copy(&to, &from, 1);
  stream->Notify([] {});
  ASSERT_TRUE(stream->Record()->Await().ok());
  EXPECT_EQ(num_calls, 3);
  EXPECT_NE(thread, std::this_thread::get_id());
}

TEST(FaultHookTest, IgnoredOrderShowsTheWrongValue) {
  CpuDeviceOptions options;
  options.ignored_order = IgnoredOrder::kWaitAndNotify;
  const auto device = MakeDevice(options);
  const auto writer = device->NewStream().value();
  const auto reader = device->NewStream().value();
  Gate gate;
  std::atomic<int> value = 0;
  CpuStreamOf(*writer).Enqueue(gate.Work());
  CpuStreamOf(*writer).Enqueue([&value](const cpu::WorkPlace&) {
    value = 42;
    return absl::OkStatus();
  });
  bool is_notified = false;
  writer->Notify([&is_notified] { is_notified = true; });
  EXPECT_TRUE(is_notified) << "before the work queued ahead of it";
  reader->Wait(writer->Record());
  int seen = -1;
  CpuStreamOf(*reader).Enqueue([&value, &seen](const cpu::WorkPlace&) {
    seen = value;
    return absl::OkStatus();
  });
  ASSERT_TRUE(reader->Record()->Await().ok());
  EXPECT_EQ(seen, 0);
  gate.Open();
}

}  // namespace
}  // namespace spillway
