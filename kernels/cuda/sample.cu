// The specified sampler (docs/sampling.md): one CTA per row, everything that decides in integers whose sums do not
// depend on order. One primitive does all selection (top_k, top_p, ties, the draw, the likeliest tokens): SelectPrefix,
// a radix search over any integer that orders the ids. Rows are read from L2 once per pass; a plain temperature needs 5
// passes.

#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"
#include "kernels/cuda/sample_math.cuh"

namespace spillway::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 256;
constexpr int kMaxVocab = 1 << 20;  // one bit each in shared memory, where ids are banned

struct SampleShared {
  std::uint64_t bins[kBins];
  std::uint64_t sums[kWarps];
  std::uint64_t before;
  std::uint64_t at;
  int bin;
  int count;
  std::uint32_t keys[kMaxReportedLogprobs];
  std::int32_t ids[kMaxReportedLogprobs];
};

template <typename T, typename Combine>
__device__ T ReduceBlock(T value, T* slots, Combine combine) {
  for (int step = 16; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  __syncthreads();  // the slots' last readers are done
  if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32] = value;
  __syncthreads();
  T total = slots[0];
  for (int w = 1; w < kWarps; ++w) total = combine(total, slots[w]);
  return total;
}
__device__ std::uint64_t SumBlock(std::uint64_t value, SampleShared& shared) {
  return ReduceBlock(value, shared.sums, [](std::uint64_t a, std::uint64_t b) { return a + b; });
}
__device__ std::uint64_t MaxBlock(std::uint64_t value, SampleShared& shared) {
  return ReduceBlock(value, shared.sums, [](std::uint64_t a, std::uint64_t b) { return MaxOf(a, b); });
}

// One id of the row: its place in the order at hand and what it counts; 0 where it takes no part. Below 2^32.
struct Ranked {
  std::uint32_t value;
  std::uint32_t measure;
};

// The smallest value up to which the measures reach `wanted`.
struct Selection {
  std::uint32_t value;
  std::uint64_t before;  // measures of smaller values
  std::uint64_t at;      // measures of this value
};

// All that take part have values in [low, high] and measures that sum to `total` >= wanted >= 1. rank(id) -> Ranked.
template <typename Rank>
__device__ Selection SelectPrefix(int vocab, std::uint32_t low, std::uint32_t high, std::uint64_t total,
                                  std::uint64_t wanted, SampleShared& shared, Rank rank) {
  const auto thread = static_cast<int>(threadIdx.x);
  Selection selection = {low, 0, total};
  while (low < high) {
    const int shift = MaxOf(0, 24 - __clz(static_cast<int>(high - low)));  // (high - low) >> shift < kBins
    __syncthreads();
    for (int bin = thread; bin < kBins; bin += kThreads) shared.bins[bin] = 0;
    __syncthreads();
    for (int first = 0; first < vocab; first += kThreads) {
      const int id = first + thread;
      Ranked ranked = {0, 0};
      if (id < vocab) ranked = rank(id);
      const bool takes_part = ranked.measure != 0 && ranked.value >= low && ranked.value <= high;
      const std::uint32_t bin = takes_part ? (ranked.value - low) >> shift : kBins;
      // Lanes that meet in a bin add up first: logits crowd into few bins, and atomics on one address queue.
      const unsigned peers = __match_any_sync(kAllLanes, bin);
      if (!takes_part) continue;
      const unsigned low_half = __reduce_add_sync(peers, ranked.measure & 0xffffU);
      const unsigned high_half = __reduce_add_sync(peers, ranked.measure >> 16);
      if (thread % 32 == __ffs(static_cast<int>(peers)) - 1) {
        atomicAdd(reinterpret_cast<unsigned long long*>(&shared.bins[bin]),
                  low_half + (static_cast<unsigned long long>(high_half) << 16));
      }
    }
    __syncthreads();
    if (thread < 32) {
      std::uint64_t mine = 0;
      for (int i = 0; i < kBins / 32; ++i) mine += shared.bins[thread * (kBins / 32) + i];
      std::uint64_t before = mine;
      for (int step = 1; step < 32; step *= 2) {
        const std::uint64_t below = __shfl_up_sync(kAllLanes, before, step);
        if (thread >= step) before += below;
      }
      before += selection.before - mine;
      if (before < wanted && before + mine >= wanted) {  // one lane
        int bin = thread * (kBins / 32);
        while (before + shared.bins[bin] < wanted) before += shared.bins[bin++];
        shared.bin = bin;
        shared.before = before;
        shared.at = shared.bins[bin];
      }
    }
    __syncthreads();
    low += static_cast<std::uint32_t>(shared.bin) << shift;
    high = MinOf(high, low + ((1U << shift) - 1));
    selection = {low, shared.before, shared.at};
  }
  return selection;
}

// The ids that are still in: those with a key above `key`, and those at it up to `last_id`.
struct Cutoff {
  std::uint32_t key = kNoKey;
  std::int32_t last_id = kMaxVocab;

  __device__ bool Keeps(std::uint32_t at, std::int32_t id) const { return at > key || (at == key && id <= last_id); }
};

class RowSampler {
 public:
  // `banned_bits` is null where nothing is banned.
  __device__ RowSampler(const float* logits, int vocab, const std::uint32_t* banned_bits, SampleShared& shared)
      : logits_(logits), vocab_(vocab), banned_bits_(banned_bits), shared_(shared) {}

  __device__ std::uint32_t KeyAt(std::int32_t id) const {
    if (banned_bits_ != nullptr && (banned_bits_[id / 32] >> (id % 32) & 1U) != 0) return kNoKey;
    return KeyOf(logits_[id]);
  }

  // Largest key in the high half, the complement of the lowest id that has it in the low one.
  __device__ std::uint64_t Largest() const {
    std::uint64_t best = 0;
    for (int id = static_cast<int>(threadIdx.x); id < vocab_; id += kThreads) {
      best = MaxOf(best, std::uint64_t{KeyAt(id)} << 32 | static_cast<std::uint32_t>(~id));
    }
    return MaxBlock(best, shared_);
  }

  // False: every id is banned.
  __device__ bool Choose(const SampleRowParams& row, std::int32_t& token) {
    const std::uint64_t largest = Largest();
    max_key_ = static_cast<std::uint32_t>(largest >> 32);
    if (max_key_ == kNoKey) return false;
    token = static_cast<std::int32_t>(~static_cast<std::uint32_t>(largest));
    if (IsGreedyRow(row)) return true;
    scale_ = kLog2E / row.temperature;
    lowest_ = LowestKept(row.min_p);

    std::uint64_t count = 0;
    std::uint64_t total = 0;
    std::uint64_t furthest = 0;  // of the weighted ids, from max_key_
    for (int id = static_cast<int>(threadIdx.x); id < vocab_; id += kThreads) {
      const std::uint32_t key = KeyAt(id);
      const std::uint32_t weight = WeightOf(key);
      if (weight == 0) continue;
      ++count;
      total += weight;
      furthest = MaxOf<std::uint64_t>(furthest, max_key_ - key);
    }
    count = SumBlock(count, shared_);
    total = SumBlock(total, shared_);
    const auto high = static_cast<std::uint32_t>(MaxBlock(furthest, shared_));

    Cutoff cutoff;
    // Ids without weight are behind all others, so top_k among those with weight is top_k among all.
    if (row.top_k > 0 && static_cast<std::uint64_t>(row.top_k) < count) {
      total = KeepLikeliest(high, count, static_cast<std::uint64_t>(row.top_k), cutoff);
    }
    if (row.top_p < 1) total = KeepWeight(high, total, WantedWeight(row.top_p, total), cutoff);
    const std::uint64_t target = TargetOf(row, total);
    token = static_cast<std::int32_t>(
        Select(0, static_cast<std::uint32_t>(vocab_ - 1), total, target + 1, [&](std::int32_t id) -> Ranked {
          return {static_cast<std::uint32_t>(id), KeptWeight(id, cutoff)};
        }).value);
    return true;
  }

  // Of raw logits: nothing may be banned.
  __device__ void ReportLogprobs(std::int32_t token, int num_wanted, SampleRowResult& result) {
    const auto max_key = static_cast<std::uint32_t>(Largest() >> 32);
    const float max = LogitOf(max_key);
    const std::uint32_t token_key = KeyAt(token);
    double sum = 0;
    std::uint64_t rank = 0;
    for (int id = static_cast<int>(threadIdx.x); id < vocab_; id += kThreads) {
      const std::uint32_t key = KeyAt(id);
      sum += static_cast<double>(expf(LogitOf(key) - max));
      if (key > token_key || (key == token_key && id < token)) ++rank;
    }
    rank = SumBlock(rank, shared_);
    sum = ReduceBlock(sum, reinterpret_cast<double*>(shared_.sums), [](double a, double b) { return a + b; });
    const double log_sum = static_cast<double>(max) + log(sum);

    const int num_top = MinOf(MinOf(num_wanted, kMaxReportedLogprobs), vocab_);
    if (num_top > 0) CollectLikeliest(max_key, num_top);
    if (threadIdx.x != 0) return;
    result.logprob = static_cast<float>(static_cast<double>(LogitOf(token_key)) - log_sum);
    result.rank = static_cast<std::int32_t>(rank) + 1;
    result.num_top = num_top;
    for (int i = 0; i < num_top; ++i) {
      int place = 0;
      for (int j = 0; j < num_top; ++j) {
        place += shared_.keys[j] > shared_.keys[i] ||
                 (shared_.keys[j] == shared_.keys[i] && shared_.ids[j] < shared_.ids[i]);
      }
      result.top_tokens[place] = shared_.ids[i];
      result.top_logprobs[place] = static_cast<float>(static_cast<double>(LogitOf(shared_.keys[i])) - log_sum);
    }
  }

 private:
  template <typename Rank>
  __device__ Selection Select(std::uint32_t low, std::uint32_t high, std::uint64_t total, std::uint64_t wanted,
                              Rank rank) {
    return SelectPrefix(vocab_, low, high, total, wanted, shared_, rank);
  }

  __device__ std::uint32_t WeightOf(std::uint32_t key) const {
    return key == kNoKey ? 0 : WeightAt(DistanceOf(key, max_key_, scale_), lowest_);
  }
  __device__ std::uint32_t KeptWeight(std::int32_t id, const Cutoff& cutoff) const {
    const std::uint32_t key = KeyAt(id);
    return cutoff.Keeps(key, id) ? WeightOf(key) : 0;
  }

  // Lowers last_id so that of the `num_ties` kept ids at cutoff.key the lowest `wanted` stay.
  __device__ void KeepLowestIds(std::uint64_t num_ties, std::uint64_t wanted, Cutoff& cutoff) {
    if (wanted >= num_ties) return;
    const Cutoff before = cutoff;
    cutoff.last_id = static_cast<std::int32_t>(
        Select(0, static_cast<std::uint32_t>(vocab_ - 1), num_ties, wanted, [&](std::int32_t id) -> Ranked {
          const std::uint32_t key = KeyAt(id);
          return {static_cast<std::uint32_t>(id), key == before.key && before.Keeps(key, id) ? 1U : 0U};
        }).value);
  }

  // Step 6 over `count` > top_k weighted ids. Returns the weight that is left.
  __device__ std::uint64_t KeepLikeliest(std::uint32_t high, std::uint64_t count, std::uint64_t top_k, Cutoff& cutoff) {
    const Selection selection = Select(0, high, count, top_k, [&](std::int32_t id) -> Ranked {
      const std::uint32_t key = KeyAt(id);
      return {max_key_ - key, WeightOf(key) != 0 ? 1U : 0U};
    });
    cutoff = {max_key_ - selection.value, kMaxVocab};
    KeepLowestIds(selection.at, top_k - selection.before, cutoff);
    std::uint64_t total = 0;
    for (int id = static_cast<int>(threadIdx.x); id < vocab_; id += kThreads) total += KeptWeight(id, cutoff);
    return SumBlock(total, shared_);
  }

  // Step 7 over kept ids that weigh `total`. Returns the weight that is left.
  __device__ std::uint64_t KeepWeight(std::uint32_t high, std::uint64_t total, std::uint64_t wanted, Cutoff& cutoff) {
    const Cutoff before = cutoff;
    const Selection selection = Select(0, high, total, wanted, [&](std::int32_t id) -> Ranked {
      return {max_key_ - KeyAt(id), KeptWeight(id, before)};
    });
    // Ids of one key weigh the same.
    const std::uint32_t key = max_key_ - selection.value;
    const std::uint64_t weight = WeightOf(key);
    const std::uint64_t num_ties = selection.at / weight;
    const std::uint64_t num_kept = CeilDiv(wanted - selection.before, weight);
    cutoff = {key, key == before.key ? before.last_id : kMaxVocab};
    KeepLowestIds(num_ties, num_kept, cutoff);
    return selection.before + num_kept * weight;
  }

  // The num_top likeliest ids into shared_.keys and ids, in any order.
  __device__ void CollectLikeliest(std::uint32_t max_key, int num_top) {
    const auto wanted = static_cast<std::uint64_t>(num_top);
    const Selection selection =
        Select(0, max_key, static_cast<std::uint64_t>(vocab_), wanted, [&](std::int32_t id) -> Ranked {
          return {max_key - KeyAt(id), 1};
        });
    Cutoff cutoff = {max_key - selection.value, kMaxVocab};
    KeepLowestIds(selection.at, wanted - selection.before, cutoff);
    __syncthreads();
    if (threadIdx.x == 0) shared_.count = 0;
    __syncthreads();
    for (int id = static_cast<int>(threadIdx.x); id < vocab_; id += kThreads) {
      const std::uint32_t key = KeyAt(id);
      if (!cutoff.Keeps(key, id)) continue;
      const int place = atomicAdd(&shared_.count, 1);
      shared_.keys[place] = key;
      shared_.ids[place] = id;
    }
    __syncthreads();
  }

  const float* const logits_;
  const int vocab_;
  const std::uint32_t* const banned_bits_;
  SampleShared& shared_;
  std::uint32_t max_key_ = kNoKey;
  float scale_ = 0;
  float lowest_ = 0;
};

// FNV-1a over the row's words is one chain of multiplications: a warp reads ahead, every lane computes the same.
__device__ std::uint64_t HashRow(const float* logits, int vocab) {
  std::uint64_t hash = 0xcbf29ce484222325U;
  const auto lane = static_cast<int>(threadIdx.x % 32);
  for (int first = 0; first < vocab; first += 32) {
    const std::uint32_t word = first + lane < vocab ? __float_as_uint(logits[first + lane]) : 0;
    const int count = MinOf(32, vocab - first);
    for (int i = 0; i < count; ++i) hash = (hash ^ __shfl_sync(kAllLanes, word, i)) * 0x100000001b3U;
  }
  return hash;
}

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleParams params) {
  __shared__ SampleShared shared;
  const std::int64_t r = blockIdx.x;
  const float* const logits = params.logits + r * params.vocab;
  const SampleRowParams row = params.rows[r];

  const bool has_bans = params.banned_begin != nullptr && params.banned_begin[r + 1] > params.banned_begin[r];
  auto* const bits = reinterpret_cast<std::uint32_t*>(DynamicShared());
  if (has_bans) {
    for (int i = static_cast<int>(threadIdx.x); i < CeilDiv(params.vocab, 32); i += kThreads) bits[i] = 0;
    __syncthreads();
    for (int i = params.banned_begin[r] + static_cast<int>(threadIdx.x); i < params.banned_begin[r + 1];
         i += kThreads) {
      const std::int32_t id = params.banned[i];
      if (id >= 0 && id < params.vocab) atomicOr(&bits[id / 32], 1U << (id % 32));
    }
    __syncthreads();
  }

  RowSampler raw(logits, params.vocab, nullptr, shared);
  RowSampler allowed(logits, params.vocab, has_bans ? bits : nullptr, shared);
  std::int32_t token = 0;
  if (!allowed.Choose(row, token)) raw.Choose(row, token);

  SampleRowResult& result = params.results[r];
  if (threadIdx.x == 0) {
    result = SampleRowResult{};
    result.token = token;
  }
  if (row.num_logprobs >= 0) raw.ReportLogprobs(token, row.num_logprobs, result);
  if (params.hash_logits && threadIdx.x < 32) {
    const std::uint64_t hash = HashRow(logits, params.vocab);
    if (threadIdx.x == 0) result.logits_hash = hash;
  }
}

}  // namespace

cudaError_t LaunchSample(const SampleParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  if (params.vocab <= 0 || params.vocab > kMaxVocab) return cudaErrorInvalidValue;
  const std::size_t bits_bytes =
      params.banned_begin != nullptr ? static_cast<std::size_t>(CeilDiv(params.vocab, 32)) * 4 : 0;
  const cudaError_t error = AllowShared(SampleKernel, bits_bytes);
  if (error != cudaSuccess) return error;
  return Launch(SampleKernel, static_cast<unsigned>(params.num_rows), kThreads, bits_bytes, stream, params);
}

}  // namespace spillway::cuda
