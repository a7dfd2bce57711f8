// Put and Get of the file tier against pwrite and pread of the same spans, in the page cache of the directory's file
// system. Raw and tier take turns; medians of several rounds. One JSON object per line.
//
//   file_tier_bench [directory]     the directory must exist; what is made in it is removed

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "kernels/check.h"
#include "kvstore/file_tier.h"
#include "kvstore/file_tier_format.h"

namespace spillway {
namespace {

constexpr std::size_t kTotalBytes = 256U << 20U;
constexpr std::size_t kBuffers = 16;
constexpr std::uint64_t kRounds = 7;

enum class Cache { kWarm, kCold };  // whether what is read is in the page cache

struct Setting {
  std::size_t span_bytes = 0;
  int threads = 0;  // of the tier, and of the raw copies
  int depth = 0;    // tier calls in flight
  Cache cache = Cache::kWarm;
};

double CpuSeconds() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

// GB/s by the clock, and by the CPU time of all threads, which says more on a machine that is busy with something else.
class Rates {
 public:
  void Add(const std::function<void()>& work) {
    const double cpu_start = CpuSeconds();
    const auto start = std::chrono::steady_clock::now();
    work();
    wall_.push_back(kTotalBytes / std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() /
                    1e9);
    cpu_.push_back(kTotalBytes / (CpuSeconds() - cpu_start) / 1e9);
  }
  // Without the first round, which allocates.
  double Wall() const { return Median(wall_); }
  double Cpu() const { return Median(cpu_); }

 private:
  static double Median(std::vector<double> values) {
    values.erase(values.begin());
    std::ranges::sort(values);
    return values[values.size() / 2];
  }
  std::vector<double> wall_;
  std::vector<double> cpu_;
};

void Print(const char* what, const Rates& tier, const Rates& raw) {
  std::printf(
      ", \"%s_gbps\": %.2f, \"raw_%s_gbps\": %.2f, \"%s_ratio\": %.2f, \"%s_cpu_gbps\": %.2f, \"raw_%s_cpu_gbps\": "
      "%.2f, "
      "\"%s_cpu_ratio\": %.2f",
      what, tier.Wall(), what, raw.Wall(), what, tier.Wall() / raw.Wall(), what, tier.Cpu(), what, raw.Cpu(), what,
      tier.Cpu() / raw.Cpu());
}

BlockKey KeyOf(std::uint64_t number) {
  BlockKey key;
  const std::uint64_t mixed = (number + 1) * 0x9e3779b97f4a7c15ULL;
  std::memcpy(key.bytes.data(), &mixed, sizeof(mixed));
  return key;
}

class Bench {
 public:
  Bench(std::string directory, const Setting& setting)
      : directory_(std::move(directory)), setting_(setting), num_spans_(kTotalBytes / setting.span_bytes) {
    std::mt19937_64 random(1);
    for (std::size_t i = 0; i < kBuffers; ++i) {
      sources_.emplace_back(setting.span_bytes);
      for (std::byte& byte : sources_.back()) byte = static_cast<std::byte>(random());
      targets_.emplace_back(setting.span_bytes);
    }
    for (std::size_t i = 0; i < num_spans_; ++i) order_.push_back(i);
    std::ranges::shuffle(order_, random);
    raw_ = ::open((directory_ + "/raw").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    SPILLWAY_CHECK(raw_ >= 0) << directory_;
    // Room for one set, so that every later set goes into recycled slots, as the raw file is written over.
    absl::StatusOr<std::unique_ptr<Tier>> tier = MakeFileTier({
        .directory = directory_ + "/tier",
        .budget_bytes = BlockFileLayout(setting.span_bytes).Charge(static_cast<std::uint32_t>(num_spans_)) + (64 << 10),
        .block_bytes = setting.span_bytes,
        .space = "bench",
        .num_threads = setting.threads,
    });
    SPILLWAY_CHECK(tier.ok()) << tier.status();
    tier_ = *std::move(tier);
  }
  ~Bench() {
    tier_.reset();
    ::close(raw_);
    std::filesystem::remove_all(directory_ + "/tier");
    std::filesystem::remove(directory_ + "/raw");
  }

  void Run() {
    Rates raw_put;
    Rates put;
    Rates raw_get;
    Rates get;
    for (std::uint64_t round = 0; round <= kRounds; ++round) {
      raw_put.Add([&] { RawCopies(Direction::kWrite); });
      put.Add([&] { Puts(round); });
      DropCache(directory_ + "/raw");
      raw_get.Add([&] { RawCopies(Direction::kRead); });
      DropCache(directory_ + "/tier/" + BlockFileName(MakeSpaceDigest("bench", setting_.span_bytes)));
      get.Add([&] { Gets(round); });
      CheckOneRound(round);
    }
    std::printf("{\"bench\": \"file_tier\", \"span_bytes\": %zu, \"threads\": %d, \"depth\": %d, \"cache\": \"%s\"",
                setting_.span_bytes, setting_.threads, setting_.depth,
                setting_.cache == Cache::kWarm ? "warm" : "cold");
    Print("put", put, raw_put);
    Print("get", get, raw_get);
    std::printf("}\n");
  }

 private:
  enum class Direction { kRead, kWrite };

  void RawCopies(Direction direction) {
    std::atomic<std::size_t> next{0};
    const auto work = [&] {
      for (std::size_t i = next++; i < num_spans_; i = next++) {
        const auto offset = static_cast<off_t>(order_[i] * setting_.span_bytes);
        const ssize_t copied = direction == Direction::kWrite
                                   ? ::pwrite(raw_, sources_[i % kBuffers].data(), setting_.span_bytes, offset)
                                   : ::pread(raw_, targets_[i % kBuffers].data(), setting_.span_bytes, offset);
        SPILLWAY_CHECK(copied == static_cast<ssize_t>(setting_.span_bytes));
      }
    };
    std::vector<std::thread> threads;
    for (int i = 0; i < setting_.threads; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
  }

  void DropCache(const std::string& path) const {
    if (setting_.cache == Cache::kWarm) return;
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    SPILLWAY_CHECK(file >= 0 && ::fdatasync(file) == 0 && ::posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED) == 0)
        << path;
    ::close(file);
  }

  void Puts(std::uint64_t round) {
    std::counting_semaphore<kBuffers> free(setting_.depth);
    for (std::size_t i = 0; i < num_spans_; ++i) {
      free.acquire();
      tier_->Put(KeyOf(round * num_spans_ + i), BlockTokens{}, sources_[i % kBuffers],
                 [&free](const absl::Status& status) {
                   SPILLWAY_CHECK(status.ok()) << status;
                   free.release();
                 });
    }
    for (int i = 0; i < setting_.depth; ++i) free.acquire();
  }

  // A target is one call's at a time, and calls do not end in the order in which they began.
  void Gets(std::uint64_t round) {
    std::counting_semaphore<kBuffers> num_free(setting_.depth);
    std::mutex mutex;
    std::vector<std::size_t> free;
    for (std::size_t i = 0; i < kBuffers; ++i) free.push_back(i);
    for (const std::size_t span : order_) {
      num_free.acquire();
      std::unique_lock<std::mutex> lock(mutex);
      const std::size_t target = free.back();
      free.pop_back();
      lock.unlock();
      tier_->Get(KeyOf(round * num_spans_ + span), BlockTokens{}, targets_[target],
                 [&num_free, &mutex, &free, target](const absl::Status& status) {
                   SPILLWAY_CHECK(status.ok()) << status;
                   {
                     const std::lock_guard<std::mutex> give_back(mutex);
                     free.insert(free.begin(), target);
                   }
                   num_free.release();
                 });
    }
    for (int i = 0; i < setting_.depth; ++i) num_free.acquire();
  }

  void CheckOneRound(std::uint64_t round) {
    for (std::size_t i = 0; i < num_spans_; ++i) {
      std::binary_semaphore done(0);
      tier_->Get(KeyOf(round * num_spans_ + i), BlockTokens{}, targets_[0],
                 [&done](const absl::Status&) { done.release(); });
      done.acquire();
      SPILLWAY_CHECK(targets_[0] == sources_[i % kBuffers]);
    }
  }

  const std::string directory_;
  const Setting setting_;
  const std::size_t num_spans_;
  std::vector<std::vector<std::byte>> sources_;
  std::vector<std::vector<std::byte>> targets_;
  std::vector<std::size_t> order_;
  int raw_ = -1;
  std::unique_ptr<Tier> tier_;
};

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  std::string directory = argc > 1 ? argv[1] : std::filesystem::temp_directory_path().string();
  directory += "/file_tier_bench.XXXXXX";
  if (::mkdtemp(directory.data()) == nullptr) {
    std::cerr << "cannot make " << directory << "\n";
    return 1;
  }
  for (const std::size_t span_bytes : {64U << 10U, 256U << 10U, 2U << 20U}) {
    for (const auto& [threads, depth] : {std::pair(1, 1), std::pair(1, 8), std::pair(2, 8)}) {
      for (const spillway::Cache cache : {spillway::Cache::kWarm, spillway::Cache::kCold}) {
        spillway::Bench(directory, {.span_bytes = span_bytes, .threads = threads, .depth = depth, .cache = cache})
            .Run();
      }
    }
  }
  std::filesystem::remove(directory);
}
