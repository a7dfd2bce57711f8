// The GEMM body for AVX512_BF16: a tile of up to 12 rows x 2 vectors of sums.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "kernels/cpu/gemm_dot.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace spillway::cpu {

#if defined(__x86_64__)
namespace {

#define SPILLWAY_AVX512_DOT __attribute__((target("avx512f,avx512bf16")))

constexpr std::int64_t kRowsPerTile = 12;
constexpr std::int64_t kGroupsPerBlock = kDotBlockBytes / kDotGroupBytes;
constexpr std::int64_t kGroupBytes = kDotHalfColumns * kDotGroupBytes;  // of one half of a panel
// How far ahead of its use a panel is fetched.
constexpr std::int64_t kPrefetchBytes = 4096;

SPILLWAY_AVX512_DOT inline __m512bh LoadWords(const std::byte* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}
SPILLWAY_AVX512_DOT inline __m512bh BroadcastGroup(const std::byte* from) {
  int group = 0;
  std::memcpy(&group, from, sizeof(group));
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(group));
}

template <int kRows>
SPILLWAY_AVX512_DOT void MultiplyRows(const DotPiece& piece, std::int64_t first_row, bool is_streamed) {
  const std::byte* const a = piece.a + first_row * piece.a_stride;
  float* const sums = piece.sums + first_row * kPanelColumns;
  __m512 first[kRows];
  __m512 second[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    first[r] = piece.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kPanelColumns);
    second[r] = piece.is_first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * kPanelColumns + kDotHalfColumns);
  }
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    const std::byte* const panel = piece.panel + block * 2 * kDotHalfBytes;
    for (std::int64_t group = 0; group < kGroupsPerBlock; ++group) {
      const std::byte* const at = panel + group * kGroupBytes;
      if (is_streamed) {
        _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes + kDotHalfBytes, _MM_HINT_T0);
      }
      const __m512bh weights_first = LoadWords(at);
      const __m512bh weights_second = LoadWords(at + kDotHalfBytes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512bh value = BroadcastGroup(a + r * piece.a_stride + block * kDotBlockBytes + group * kDotGroupBytes);
        first[r] = _mm512_dpbf16_ps(first[r], weights_first, value);
        second[r] = _mm512_dpbf16_ps(second[r], weights_second, value);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_ps(sums + r * kPanelColumns, first[r]);
    _mm512_storeu_ps(sums + r * kPanelColumns + kDotHalfColumns, second[r]);
  }
}

using RowsBody = void (*)(const DotPiece&, std::int64_t, bool);

template <int... kRows>
RowsBody BodyOfRows(std::int64_t rows, std::integer_sequence<int, kRows...> /*unused*/) {
  static constexpr RowsBody kBodies[] = {MultiplyRows<kRows + 1>...};
  return kBodies[rows - 1];
}

void MultiplyPiece(const DotPiece& piece) {
  // All tiles differ by at most one row.
  const std::int64_t num_tiles = (piece.num_rows + kRowsPerTile - 1) / kRowsPerTile;
  std::int64_t m = 0;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    const std::int64_t rows = piece.num_rows / num_tiles + (tile < piece.num_rows % num_tiles ? 1 : 0);
    BodyOfRows(rows, std::make_integer_sequence<int, kRowsPerTile>())(piece, m, tile == 0);
    m += rows;
  }
}

bool HasAvx512BF16() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1U << 5U)) != 0;
}

}  // namespace

absl::StatusOr<DotBody> Avx512DotBody() {
  if (!HasAvx512BF16()) return absl::FailedPreconditionError("this machine has no avx512_bf16");
  return MultiplyPiece;
}

#else

absl::StatusOr<DotBody> Avx512DotBody() { return absl::FailedPreconditionError("avx512_bf16 is of x86 machines only"); }

#endif

}  // namespace spillway::cpu
