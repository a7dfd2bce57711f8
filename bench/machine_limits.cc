#include "bench/machine_limits.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels/cpu/bf16_tiles.h"

namespace spillway {
namespace {

constexpr int kRuns = 6;

// Best of several runs of body(thread) on all threads at once, in seconds.
double BestSeconds(int num_threads, int num_runs, const std::function<void(int)>& body) {
  double best = 1e9;
  for (int run = 0; run < num_runs; ++run) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t) threads.emplace_back(body, t);
    for (std::thread& thread : threads) thread.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) float FmaAvx512(std::int64_t rounds) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1);
  const __m512 factor = _mm512_set1_ps(0.999F);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (__m512& sum : sums) sum = _mm512_fmadd_ps(sum, factor, factor);
  }
  float total = 0;
  for (const __m512& sum : sums) total += _mm512_cvtss_f32(sum);
  return total;
}

__attribute__((target("avx2,fma"))) float FmaAvx2(std::int64_t rounds) {
  __m256 sums[12];
  for (__m256& sum : sums) sum = _mm256_set1_ps(1);
  const __m256 factor = _mm256_set1_ps(0.999F);
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (__m256& sum : sums) sum = _mm256_fmadd_ps(sum, factor, factor);
  }
  float total = 0;
  for (const __m256& sum : sums) total += _mm256_cvtss_f32(sum);
  return total;
}
#endif

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"))) float DotAvx512(std::int64_t rounds) {
  __m512 sums[16];
  for (__m512& sum : sums) sum = _mm512_set1_ps(1);
  const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3c003c00));
  for (std::int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (__m512& sum : sums) sum = _mm512_dpbf16_ps(sum, factor, factor);
  }
  float total = 0;
  for (const __m512& sum : sums) total += _mm512_cvtss_f32(sum);
  return total;
}

// Random values of ordinary size: the multipliers draw more power with them than with zeros, and clock accordingly.
alignas(64) constexpr std::array<std::uint16_t, 4 * 512> kTiles = [] {
  std::array<std::uint16_t, 4 * 512> values{};
  std::uint32_t state = 1;
  for (std::uint16_t& value : values) {
    state = state * 1664525U + 1013904223U;
    value = static_cast<std::uint16_t>(0x3c00U | (state >> 16U & 0x80ffU));
  }
  return values;
}();

// Four sums of 16 x 16, as many as operands leave room for.
__attribute__((target("amx-tile,amx-bf16"))) float DotAmx(std::int64_t rounds) {
  cpu::kAmxTiles.begin();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, kTiles.data(), 64);
  _tile_loadd(5, kTiles.data() + 512, 64);
  _tile_loadd(6, kTiles.data() + 1024, 64);
  _tile_loadd(7, kTiles.data() + 1536, 64);
  for (std::int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  cpu::kAmxTiles.end();
  return 0;
}

// The operands of one thread's GEMM: 512 rows x 512 k, 32 columns, and the sums.
constexpr std::int64_t kGemmPairs = 16;    // of tiles of rows
constexpr std::int64_t kGemmBlocks = 16;   // of 32 k
constexpr std::int64_t kPairBytes = 2048;  // of two tiles
struct GemmOperands {
  alignas(64) std::array<std::byte, kGemmPairs * kGemmBlocks * kPairBytes> rows;
  alignas(64) std::array<std::byte, kGemmBlocks * kPairBytes> columns;
  alignas(64) std::array<std::byte, kGemmPairs * 2 * kPairBytes> sums;

  GemmOperands() {
    for (std::size_t at = 0; at < rows.size(); at += sizeof(kTiles))
      std::memcpy(&rows[at], kTiles.data(), sizeof(kTiles));
    for (std::size_t at = 0; at < columns.size(); at += sizeof(kTiles)) {
      std::memcpy(&columns[at], kTiles.data(), sizeof(kTiles));
    }
    sums.fill(std::byte{0});
  }
};

// Rows stream from the second-level cache past columns that stay in the first; sums are loaded and stored.
__attribute__((target("amx-tile,amx-bf16"))) void GemmAmx(GemmOperands& operands, std::int64_t rounds) {
  cpu::kAmxTiles.begin();
  for (std::int64_t round = 0; round < rounds; ++round) {
    for (std::int64_t pair = 0; pair < kGemmPairs; ++pair) {
      std::byte* const sums = operands.sums.data() + pair * 2 * kPairBytes;
      const std::byte* rows = operands.rows.data() + pair * kGemmBlocks * kPairBytes;
      const std::byte* columns = operands.columns.data();
      _tile_loadd(0, sums, 64);
      _tile_loadd(1, sums + 1024, 64);
      _tile_loadd(2, sums + 2048, 64);
      _tile_loadd(3, sums + 3072, 64);
      for (std::int64_t block = 0; block < kGemmBlocks; ++block) {
        _tile_stream_loadd(4, rows, 64);
        _tile_loadd(6, columns, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, columns + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_stream_loadd(5, rows + 1024, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        rows += kPairBytes;
        columns += kPairBytes;
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 1024, 64);
      _tile_stored(2, sums + 2048, 64);
      _tile_stored(3, sums + 3072, 64);
    }
  }
  cpu::kAmxTiles.end();
}
#endif

// 0: this machine has no AMX.
double Bf16GemmPeak([[maybe_unused]] int num_threads, [[maybe_unused]] int num_runs,
                    [[maybe_unused]] std::int64_t num_rounds) {
#if defined(__x86_64__)
  if (!cpu::HasAmx()) return 0;
  std::vector<std::unique_ptr<GemmOperands>> operands;
  for (int t = 0; t < num_threads; ++t) operands.push_back(std::make_unique<GemmOperands>());
  const double seconds = BestSeconds(
      num_threads, num_runs, [&](int thread) { GemmAmx(*operands[static_cast<std::size_t>(thread)], num_rounds); });
  constexpr double kFlopsPerRound = kGemmPairs * kGemmBlocks * 4 * 16 * 16 * 32 * 2;
  return kFlopsPerRound * static_cast<double>(num_rounds) * num_threads / seconds * 1e-9;
#else
  return 0;
#endif
}

// 0: this machine has no products of bf16.
double Bf16Peak([[maybe_unused]] int num_threads, [[maybe_unused]] int num_runs,
                [[maybe_unused]] std::int64_t num_rounds) {
#if defined(__x86_64__)
  if (!cpu::HasAvx512Bf16()) return 0;
  const bool has_amx = cpu::HasAmx();
  const double flops_per_round = has_amx ? 4 * 16 * 16 * 32 * 2 : 16 * 32 * 2;
  std::vector<float> sinks(static_cast<std::size_t>(num_threads) * 16);
  const auto run = has_amx ? DotAmx : DotAvx512;
  const double seconds = BestSeconds(
      num_threads, num_runs, [&](int thread) { sinks[static_cast<std::size_t>(thread) * 16] = run(num_rounds); });
  return flops_per_round * static_cast<double>(num_rounds) * num_threads / seconds * 1e-9;
#else
  return 0;
#endif
}

double FmaPeak(int num_threads, int num_runs, std::int64_t num_rounds) {
  std::vector<float> sinks(static_cast<std::size_t>(num_threads) * 16);
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") != 0;
  const double flops_per_round = has_avx512 ? 16 * 16 * 2 : 12 * 8 * 2;
  const auto run = has_avx512 ? FmaAvx512 : FmaAvx2;
#else
  const double flops_per_round = 2;
  const auto run = [](std::int64_t rounds) {
    float sum = 1;
    for (std::int64_t i = 0; i < rounds; ++i) sum = __builtin_fmaf(sum, 0.999F, 0.999F);
    return sum;
  };
#endif
  const double seconds = BestSeconds(
      num_threads, num_runs, [&](int thread) { sinks[static_cast<std::size_t>(thread) * 16] = run(num_rounds); });
  return flops_per_round * static_cast<double>(num_rounds) * num_threads / seconds * 1e-9;
}

std::uint64_t ReadWords(const std::byte* from, std::size_t size_bytes) {
  std::uint64_t sum = 0;
  for (std::size_t i = 0; i + 8 <= size_bytes; i += 8) {
    std::uint64_t word;
    std::memcpy(&word, from + i, 8);
    sum += word;
  }
  return sum;
}

#if defined(__x86_64__)
// Several pages at once, each ahead of its use: one stream alone does not fill the line-fill buffers.
__attribute__((target("avx2"))) std::uint64_t ReadAvx2(const std::byte* from, std::size_t size_bytes) {
  constexpr std::size_t kStreams = 4;
  const std::size_t stream_bytes = size_bytes / kStreams;
  __m256i sums[kStreams] = {};
  for (std::size_t i = 0; i + 64 <= stream_bytes; i += 64) {
#pragma GCC unroll 4
    for (std::size_t s = 0; s < kStreams; ++s) {
      const auto* const at = reinterpret_cast<const __m256i*>(from + s * stream_bytes + i);
      _mm_prefetch(reinterpret_cast<const char*>(at) + 1024, _MM_HINT_T0);
      sums[s] = _mm256_add_epi64(sums[s], _mm256_add_epi64(_mm256_load_si256(at), _mm256_load_si256(at + 1)));
    }
  }
  std::uint64_t total = 0;
  for (const __m256i& sum : sums) total += static_cast<std::uint64_t>(_mm256_extract_epi64(sum, 0));
  return total;
}
#endif

std::uint64_t (*ReadOfThisMachine())(const std::byte*, std::size_t) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") != 0) return ReadAvx2;
#endif
  return ReadWords;
}

double ReadPeak(int num_threads, int num_runs, const std::byte* from, std::size_t bytes_per_thread) {
  std::vector<std::uint64_t> sinks(static_cast<std::size_t>(num_threads) * 8);
  const auto read = ReadOfThisMachine();
  const double seconds = BestSeconds(num_threads, num_runs, [&](int thread) {
    const auto t = static_cast<std::size_t>(thread);
    sinks[t * 8] += read(from + t * bytes_per_thread, bytes_per_thread);
  });
  return static_cast<double>(bytes_per_thread) * num_threads / seconds * 1e-9;
}

}  // namespace

MachineLimits MeasureLimits(Device& device, int num_threads) {
  constexpr std::int64_t kRounds = 2'000'000;
  MachineLimits limits;
  const std::size_t bytes_per_thread = (std::size_t{512} << 20) / static_cast<std::size_t>(num_threads) / 4096 * 4096;
  const std::size_t num_bytes = bytes_per_thread * static_cast<std::size_t>(num_threads);
  const Buffer from = device.Allocate(MemoryKind::kPinnedHost, num_bytes).value();
  const Buffer to = device.Allocate(MemoryKind::kPinnedHost, num_bytes).value();
  std::memset(from.get(), 3, num_bytes);
  std::memset(to.get(), 5, num_bytes);
  limits.read_gigabytes = ReadPeak(num_threads, kRuns, from.get(), bytes_per_thread);
  limits.copy_gigabytes = static_cast<double>(num_bytes) * 1e-9 / BestSeconds(num_threads, kRuns, [&](int thread) {
                            const std::size_t begin = static_cast<std::size_t>(thread) * bytes_per_thread;
                            std::memcpy(to.get() + begin, from.get() + begin, bytes_per_thread);
                          });
  limits.fma_gigaflops = FmaPeak(num_threads, kRuns, 2 * kRounds);
  limits.bf16_gigaflops = std::max(limits.fma_gigaflops, Bf16Peak(num_threads, kRuns, kRounds));
  limits.bf16_gemm_gigaflops = Bf16GemmPeak(num_threads, kRuns, kRounds / 300);
  if (limits.bf16_gemm_gigaflops == 0) limits.bf16_gemm_gigaflops = limits.bf16_gigaflops;
  return limits;
}

LimitProbe::LimitProbe(Device& device, int num_threads)
    : num_threads_(num_threads),
      bytes_per_thread_((std::size_t{512} << 20) / static_cast<std::size_t>(num_threads) / 4096 * 4096),
      memory_(
          device.Allocate(MemoryKind::kPinnedHost, bytes_per_thread_ * static_cast<std::size_t>(num_threads)).value()) {
  std::memset(memory_.get(), 3, memory_.size_bytes);
}

double LimitProbe::ReadGigabytes() const { return ReadPeak(num_threads_, 1, memory_.get(), bytes_per_thread_); }
double LimitProbe::Bf16Gigaflops() const { return std::max(FmaGigaflops(), Bf16Peak(num_threads_, 1, 150'000)); }
double LimitProbe::Bf16GemmGigaflops() const {
  const double peak = Bf16GemmPeak(num_threads_, 1, 600);
  return peak > 0 ? peak : Bf16Gigaflops();
}
double LimitProbe::FmaGigaflops() const { return FmaPeak(num_threads_, 1, 1'000'000); }

}  // namespace spillway
