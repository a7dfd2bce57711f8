// The GEMM bodies for AVX512_BF16 and VNNI: a tile of up to 12 rows x 2 vectors of sums.

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

#define SPILLWAY_AVX512_DOT __attribute__((target("avx512f,avx512bf16,avx512vnni")))

constexpr std::int64_t kRowsPerTile = 12;
constexpr std::int64_t kGroupsPerBlock = kDotBlockBytes / kDotGroupBytes;
constexpr std::int64_t kGroupBytes = kDotHalfColumns * kDotGroupBytes;  // of one half of a panel
constexpr std::int64_t kSumsStride = 2 * kGroupBytes;
// How far ahead of its use a panel is fetched.
constexpr std::int64_t kPrefetchBytes = 4096;

struct BF16 {
  SPILLWAY_AVX512_DOT static __m512i Dot(__m512i sums, __m512i weights, __m512i values) {
    return _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sums), reinterpret_cast<__m512bh>(weights),
                                                reinterpret_cast<__m512bh>(values)));
  }
};
struct Int8 {
  SPILLWAY_AVX512_DOT static __m512i Dot(__m512i sums, __m512i weights, __m512i values) {
    return _mm512_dpbusd_epi32(sums, weights, values);
  }
};

SPILLWAY_AVX512_DOT inline __m512i BroadcastGroup(const std::byte* from) {
  int group = 0;
  std::memcpy(&group, from, sizeof(group));
  return _mm512_set1_epi32(group);
}

template <typename Element, int kRows>
SPILLWAY_AVX512_DOT void MultiplyRows(const DotPiece& piece, std::int64_t first_row, bool is_streamed) {
  const std::byte* const a = piece.a.data + first_row * piece.a.row_stride;
  std::byte* const sums = piece.sums + first_row * kSumsStride;
  __m512i first[kRows];
  __m512i second[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    first[r] = piece.is_first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + r * kSumsStride);
    second[r] = piece.is_first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + r * kSumsStride + kGroupBytes);
  }
  for (std::int64_t block = 0; block < piece.num_blocks; ++block) {
    const std::byte* const panel = piece.panel + block * 2 * kDotHalfBytes;
    for (std::int64_t group = 0; group < kGroupsPerBlock; ++group) {
      const std::byte* const at = panel + group * kGroupBytes;
      if (is_streamed) {
        _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes, _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes + kDotHalfBytes, _MM_HINT_T0);
      }
      const __m512i weights_first = _mm512_loadu_si512(at);
      const __m512i weights_second = _mm512_loadu_si512(at + kDotHalfBytes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512i value =
            BroadcastGroup(a + r * piece.a.row_stride + block * kDotBlockBytes + group * kDotGroupBytes);
        first[r] = Element::Dot(first[r], weights_first, value);
        second[r] = Element::Dot(second[r], weights_second, value);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(sums + r * kSumsStride, first[r]);
    _mm512_storeu_si512(sums + r * kSumsStride + kGroupBytes, second[r]);
  }
}

using RowsBody = void (*)(const DotPiece&, std::int64_t, bool);

template <typename Element, int... kRows>
RowsBody BodyOfRows(std::int64_t rows, std::integer_sequence<int, kRows...> /*unused*/) {
  static constexpr RowsBody kBodies[] = {MultiplyRows<Element, kRows + 1>...};
  return kBodies[rows - 1];
}

template <typename Element>
void MultiplyPiece(const DotPiece& piece) {
  for (std::int64_t part = 0; part < piece.num_parts; ++part) piece.background(part);
  // All tiles differ by at most one row.
  const std::int64_t num_tiles = (piece.num_rows + kRowsPerTile - 1) / kRowsPerTile;
  std::int64_t m = 0;
  for (std::int64_t tile = 0; tile < num_tiles; ++tile) {
    const std::int64_t rows = piece.num_rows / num_tiles + (tile < piece.num_rows % num_tiles ? 1 : 0);
    BodyOfRows<Element>(rows, std::make_integer_sequence<int, kRowsPerTile>())(piece, m,
                                                                               tile == 0 && piece.is_read_once);
    m += rows;
  }
}

bool HasInstructions() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  const bool has_vnni = __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (c & (1U << 11U)) != 0;
  const bool has_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1U << 5U)) != 0;
  return has_vnni && has_bf16;
}

}  // namespace

absl::StatusOr<DotBodies> Avx512DotBodies() {
  if (!HasInstructions()) return absl::FailedPreconditionError("this machine has no avx512_bf16");
  return DotBodies{{MultiplyPiece<BF16>}, {MultiplyPiece<Int8>}};
}

#else

absl::StatusOr<DotBodies> Avx512DotBodies() {
  return absl::FailedPreconditionError("avx512_bf16 is of x86 machines only");
}

#endif

}  // namespace spillway::cpu
