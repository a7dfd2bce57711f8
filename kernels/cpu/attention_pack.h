#pragma once

// Queries and strips of bf16 as the tiles of products (bf16_tiles.h), for attention_bf16.cc.

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/bf16_tiles.h"
#include "kernels/cpu/bf16_vectors.h"
#include "kernels/cpu/strip_fetcher.h"

#if defined(__x86_64__)

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

namespace spillway::cpu {

// The right-hand tile of the sums of weights.
alignas(64) inline constexpr auto kOnes = [] {
  std::array<std::uint16_t, kTileBytes / 2> ones{};
  ones.fill(0x3f80);
  return ones;
}();

class StripPacker {
 public:
  StripPacker(const TileRows& rows, StripFetcher& fetcher)
      : rows_(rows),
        fetcher_(fetcher),
        dim_(rows.args().kv.layout.head_dim),
        padded_dim_((dim_ + kTileDepth - 1) / kTileDepth * kTileDepth) {}

  // All query rows of the tile: [rows][padded_dim].
  SPILLWAY_AVX512_BF16 void CopyQueries(std::uint16_t* to) const {
    for (std::int64_t r = 0; r < rows_.size(); ++r) {
      const auto* const from = reinterpret_cast<const std::uint16_t*>(rows_.args().q) + rows_.OffsetOf(r);
      for (std::int64_t d = 0; d < padded_dim_; d += 32) {
        _mm512_storeu_si512(to + r * padded_dim_ + d, LoadWords(from + d, dim_ - d));
      }
    }
  }

  // Keys of [begin, end): tiles [strip][depth].
  SPILLWAY_AVX512_BF16 void PackKeys(std::int64_t begin, std::int64_t end, std::byte* to) {
    for (std::int64_t block = begin / kBlockTokens; block * kBlockTokens < end; ++block) {
      const auto* const strip = reinterpret_cast<const std::uint16_t*>(rows_.StripOf(block));
      fetcher_.Read(0, block);
      for (std::int64_t d = 0; d < dim_; d += kTileDepth, to += kTileBytes) {
        fetcher_.Fetch(16);
        if (d + kTileDepth <= dim_) {
          TransposeTile(strip + d, 2 * dim_, to);
          continue;
        }
        alignas(64) std::uint16_t tail[kBlockTokens * kTileDepth];
        for (std::int64_t j = 0; j < kBlockTokens; ++j) {
          _mm512_store_si512(tail + j * kTileDepth, LoadWords(strip + j * 2 * dim_ + d, dim_ - d));
        }
        TransposeTile(tail, kTileDepth, to);
      }
    }
  }

  // Values of [begin, end), zero up to whole tiles and before `seen_from`: tiles [depth][columns]. False: one that some
  // row does not see is infinite or NaN.
  SPILLWAY_AVX512_BF16 bool PackValues(std::int64_t begin, std::int64_t end, std::int64_t seen_from, std::byte* to) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    __mmask32 not_finite = 0;
    for (std::int64_t at = begin; at < end; at += kTileDepth, to += padded_dim_ / kTileColumns * kTileBytes) {
      const bool all_see = rows_.AllSee(at, std::min(at + kTileDepth, end));
      for (std::int64_t j = 0; j < kTileDepth; j += 2) {
        const std::int64_t position = at + j;
        const std::int64_t block = std::min(position, end - 1) / kBlockTokens;
        const auto* const values =
            reinterpret_cast<const std::uint16_t*>(rows_.StripOf(block)) + (position % kBlockTokens * 2 + 1) * dim_;
        const bool has_even = seen_from <= position && position < end;
        const bool has_odd = seen_from <= position + 1 && position + 1 < end;
        fetcher_.Read(0, block);
        for (std::int64_t d = 0; d < padded_dim_; d += 32) {
          fetcher_.Fetch(2);
          const __m512i even = has_even ? LoadWords(values + d, dim_ - d) : _mm512_setzero_si512();
          const __m512i odd = has_odd ? LoadWords(values + d + 2 * dim_, dim_ - d) : _mm512_setzero_si512();
          std::byte* const pair = to + d / kTileColumns * kTileBytes + j * 32;
          _mm512_storeu_si512(pair, _mm512_permutex2var_epi16(even, low, odd));
          _mm512_storeu_si512(pair + kTileBytes, _mm512_permutex2var_epi16(even, high, odd));
          if (all_see) continue;
          not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
          not_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
        }
      }
    }
    return not_finite == 0;
  }

 private:
  const TileRows& rows_;
  StripFetcher& fetcher_;
  const std::int64_t dim_;
  const std::int64_t padded_dim_;
};

}  // namespace spillway::cpu

#endif
