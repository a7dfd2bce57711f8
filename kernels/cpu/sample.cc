#include "kernels/cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <span>

#include "kernels/sampler.h"

namespace spillway::cpu {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Candidate {
  float logit = 0;
  std::int32_t id = 0;
  std::uint64_t weight = 0;
};

bool Likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Working memory for one row, carved from the worker's scratch.
struct RowMemory {
  std::span<float> logits;  // a copy without the banned ids
  std::span<std::uint32_t> weights;
  std::span<std::uint64_t> block_sums;
  std::span<std::int32_t> ids;      // collected, ascending
  std::span<Candidate> candidates;  // those of ids with a weight, in any order

  RowMemory(std::int64_t vocab, Scratch& scratch) {
    const auto size = static_cast<std::size_t>(vocab);
    const std::size_t num_blocks = (size + kWeightBlock - 1) / kWeightBlock;
    std::byte* at = scratch.Get(size * (sizeof(Candidate) + 12) + num_blocks * 8);
    const auto take = [&at]<typename T>(std::span<T>& part, std::size_t count) {
      part = {reinterpret_cast<T*>(at), count};
      at += count * sizeof(T);
    };
    take(candidates, size);
    take(block_sums, num_blocks);
    take(logits, size);
    take(weights, size);
    take(ids, size);
  }
};

// Partitions candidates so that the shortest likeliest prefix that weighs `wanted` comes first; returns its last one
// and its weight.
struct Prefix {
  Candidate last;
  std::uint64_t weight = 0;
};

Prefix PrefixOfWeight(std::span<Candidate> candidates, std::uint64_t wanted) {
  std::size_t begin = 0;
  std::size_t end = candidates.size();
  std::uint64_t sum = 0;
  while (end - begin > 64) {
    const std::size_t middle = begin + (end - begin) / 2;
    const auto at = [&](std::size_t i) { return candidates.begin() + static_cast<std::ptrdiff_t>(i); };
    std::nth_element(at(begin), at(middle), at(end), Likelier);
    std::uint64_t half = 0;
    for (std::size_t i = begin; i < middle; ++i) half += candidates[i].weight;
    if (sum + half >= wanted) {
      end = middle;
    } else {
      sum += half;
      begin = middle;
    }
  }
  const std::span<Candidate> rest = candidates.subspan(begin, end - begin);
  std::sort(rest.begin(), rest.end(), Likelier);
  std::size_t i = 0;
  do {
    sum += rest[i++].weight;
  } while (sum < wanted && i < rest.size());
  return {rest[i - 1], sum};
}

// Steps 6 and 7 over all candidates that can be kept.
Prefix Truncate(const SampleRow& row, std::span<Candidate> candidates) {
  if (row.top_k > 0 && static_cast<std::size_t>(row.top_k) < candidates.size()) {
    std::nth_element(candidates.begin(), candidates.begin() + row.top_k, candidates.end(), Likelier);
    candidates = candidates.first(static_cast<std::size_t>(row.top_k));
  }
  std::uint64_t total = 0;
  for (const Candidate& candidate : candidates) total += candidate.weight;
  if (row.top_p < 1) return PrefixOfWeight(candidates, PrefixWeight(row.top_p, total));
  return {*std::max_element(candidates.begin(), candidates.end(), Likelier), total};
}

// Step 8 over the candidates up to and with prefix.last, which come in ascending order of id.
std::int32_t Draw(const SampleRow& row, const Prefix& prefix, std::span<const Candidate> candidates) {
  const std::uint64_t target = DrawTarget(row, prefix.weight);
  std::uint64_t sum = 0;
  for (const Candidate& candidate : candidates) {
    if (Likelier(prefix.last, candidate)) continue;
    sum += candidate.weight;
    if (sum > target) return candidate.id;
  }
  return prefix.last.id;
}

// A logit that enough(logit) accepts, low enough that nothing likelier is missing and high enough that few are left; if
// none is accepted, one that no weight lies below.
template <typename Enough>
float Threshold(float max, float scale, float lowest_distance, Enough enough) {
  const float furthest = 1.0F - lowest_distance;
  float reach = 1.0F;
  while (reach < furthest && !enough(max - reach / scale)) reach *= 2;
  if (reach >= furthest) return max - furthest / scale;
  float step = reach / 2;
  for (int i = 0; i < 3; ++i) {
    step /= 2;
    if (enough(max - (reach - step) / scale)) reach -= step;
  }
  return max - reach / scale;
}

class RowSampler {
 public:
  RowSampler(const SampleBodies& bodies, const SampleArgs& args, std::int64_t r, Scratch& scratch)
      : bodies_(bodies),
        row_(args.rows[r]),
        raw_(args.logits + r * args.vocab),
        vocab_(args.vocab),
        memory_(args.vocab, scratch) {
    if (args.banned_begin != nullptr) {
      banned_ = {args.banned + args.banned_begin[r], args.banned + args.banned_begin[r + 1]};
    }
  }

  std::int32_t Choose() {
    const float* logits = raw_;
    if (!banned_.empty()) {
      std::copy_n(raw_, vocab_, memory_.logits.begin());
      for (const std::int32_t id : banned_) memory_.logits[static_cast<std::size_t>(id)] = kNan;
      logits = memory_.logits.data();
    }
    const float max = bodies_.max(logits, vocab_);
    if (max == kNothing) return ChooseAmongEquals();
    if (IsGreedy(row_)) return static_cast<std::int32_t>(bodies_.first_equal(logits, vocab_, max));

    const float scale = DistanceScale(row_);
    const float lowest =
        row_.min_p > 0 ? std::max(kLowestWeightedDistance, LowestDistance(row_.min_p)) : kLowestWeightedDistance;
    bodies_.weigh(logits, vocab_, max, scale, lowest, memory_.weights.data(), memory_.block_sums.data());
    const std::uint64_t total = std::accumulate(memory_.block_sums.begin(), memory_.block_sums.end(), std::uint64_t{0});
    const bool has_top_k = row_.top_k > 0 && row_.top_k < vocab_;
    if (!has_top_k && row_.top_p >= 1) return DrawAmongAll(DrawTarget(row_, total));

    const std::uint64_t wanted = PrefixWeight(row_.top_p, total);
    const float threshold = Threshold(max, scale, lowest, [&](float logit) {
      if (has_top_k) return bodies_.count_at_least(logits, vocab_, logit) >= row_.top_k;
      return bodies_.weight_at_least(logits, memory_.weights.data(), vocab_, logit) >= wanted;
    });
    return ChooseAtLeast(logits, threshold, has_top_k ? 0 : total);
  }

  void ReportLogprobs(SampleResult& result) {
    const float max = bodies_.max(raw_, vocab_);
    const double log_sum = max + std::log(bodies_.sum_exp(raw_, vocab_, max));
    const float logit = raw_[result.token];
    result.logprob = static_cast<float>(logit - log_sum);
    result.rank = RankOf(result.token);
    const std::int64_t num_top = std::min<std::int64_t>({row_.num_logprobs, kMaxLogprobs, vocab_});
    if (num_top == 0) return;
    const std::span<Candidate> top = Likeliest(max, num_top);
    result.num_top = static_cast<std::int32_t>(num_top);
    for (std::size_t i = 0; i < top.size(); ++i) {
      result.top_tokens[i] = top[i].id;
      result.top_logprobs[i] = static_cast<float>(top[i].logit - log_sum);
    }
  }

 private:
  // Without truncation: the block in which the running sum passes target, then the id in it.
  std::int32_t DrawAmongAll(std::uint64_t target) const {
    std::uint64_t sum = 0;
    std::size_t block = 0;
    while (sum + memory_.block_sums[block] <= target) sum += memory_.block_sums[block++];
    std::size_t id = block * kWeightBlock;
    while (sum + memory_.weights[id] <= target) sum += memory_.weights[id++];
    return static_cast<std::int32_t>(id);
  }

  // All that can be kept are at least `threshold`. `total` is the weight before truncation where top_k plays no part.
  std::int32_t ChooseAtLeast(const float* logits, float threshold, std::uint64_t total) {
    const std::int64_t count = bodies_.collect_at_least(logits, vocab_, threshold, memory_.ids.data());
    std::size_t num_candidates = 0;
    for (const std::int32_t id : memory_.ids.first(static_cast<std::size_t>(count))) {
      const std::uint32_t weight = memory_.weights[static_cast<std::size_t>(id)];
      if (weight != 0) memory_.candidates[num_candidates++] = {logits[id], id, weight};
    }
    const std::span<Candidate> candidates = memory_.candidates.first(num_candidates);
    const Prefix prefix =
        total != 0 ? PrefixOfWeight(candidates, PrefixWeight(row_.top_p, total)) : Truncate(row_, candidates);
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    return Draw(row_, prefix, candidates);
  }

  // Every id left is minus infinity (or there is none, and the bans are ignored): all weigh the same.
  std::int32_t ChooseAmongEquals() {
    std::size_t num_candidates = 0;
    for (std::int32_t id = 0; id < vocab_; ++id) {
      if (std::find(banned_.begin(), banned_.end(), id) != banned_.end()) continue;
      memory_.candidates[num_candidates++] = {kNothing, id, WeightOf(0)};
    }
    if (num_candidates == 0) {
      banned_ = {};
      return Choose();
    }
    const std::span<Candidate> candidates = memory_.candidates.first(num_candidates);
    if (IsGreedy(row_)) return candidates.front().id;
    const Prefix prefix = Truncate(row_, candidates);
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
    return Draw(row_, prefix, candidates);
  }

  // NaN counts as minus infinity, which the vector passes do not see.
  std::int32_t RankOf(std::int32_t token) const {
    const float logit = raw_[token];
    if (logit > kNothing) {
      const std::int64_t before = bodies_.count_at_least(raw_, token, logit) - bodies_.count_above(raw_, token, logit);
      return static_cast<std::int32_t>(bodies_.count_above(raw_, vocab_, logit) + before) + 1;
    }
    const std::int64_t above = bodies_.count_above(raw_, vocab_, kNothing);
    return static_cast<std::int32_t>(above + token - bodies_.count_above(raw_, token, kNothing)) + 1;
  }

  // In order. Raw logits.
  std::span<Candidate> Likeliest(float max, std::int64_t count) {
    const float threshold =
        Threshold(max, 1.0F, -64.0F, [&](float logit) { return bodies_.count_at_least(raw_, vocab_, logit) >= count; });
    std::int64_t num_found = bodies_.collect_at_least(raw_, vocab_, threshold, memory_.ids.data());
    if (num_found < count) {
      std::iota(memory_.ids.begin(), memory_.ids.end(), 0);
      num_found = vocab_;
    }
    const std::span<Candidate> candidates = memory_.candidates.first(static_cast<std::size_t>(num_found));
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      const float logit = raw_[memory_.ids[i]];
      candidates[i] = {std::isnan(logit) ? kNothing : logit, memory_.ids[i], 0};
    }
    std::partial_sort(candidates.begin(), candidates.begin() + count, candidates.end(), Likelier);
    return candidates.first(static_cast<std::size_t>(count));
  }

  const SampleBodies& bodies_;
  const SampleRow& row_;
  const float* const raw_;
  const std::int64_t vocab_;
  std::span<const std::int32_t> banned_;
  const RowMemory memory_;
};

}  // namespace

void RunSample(const SampleBodies& bodies, const WorkPlace& place, const SampleArgs& args) {
  place.pool.ParallelFor(args.num_rows, place.worker, [&](std::int64_t r, Scratch& scratch) {
    SampleResult result;
    RowSampler sampler(bodies, args, r, scratch);
    result.token = sampler.Choose();
    if (args.rows[r].num_logprobs >= 0) sampler.ReportLogprobs(result);
    if (args.hash_logits) {
      result.logits_hash = HashLogits({args.logits + r * args.vocab, static_cast<std::size_t>(args.vocab)});
    }
    args.results[r] = result;
  });
}

}  // namespace spillway::cpu
