// What INT8 costs in accuracy. The model as stored samples sequences at temperature 1; then it and its INT8 form are
// given the same tokens, and their next-token distributions are compared: how often the likeliest token is the same,
// and the KL divergence of INT8 from the model as stored, in nats.
//
//   quantization_accuracy FOLDER...

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"

namespace spillway {
namespace {

constexpr int kSequences = 8;
constexpr std::int32_t kMaxTokens = 256;

std::vector<double> LogProbabilities(const float* logits, std::int64_t vocab) {
  const double max = *std::max_element(logits, logits + vocab);
  double sum = 0;
  for (std::int64_t i = 0; i < vocab; ++i) sum += std::exp(logits[i] - max);
  std::vector<double> values(static_cast<std::size_t>(vocab));
  for (std::int64_t i = 0; i < vocab; ++i) values[static_cast<std::size_t>(i)] = logits[i] - max - std::log(sum);
  return values;
}

// One model over one sequence at a time.
class Runner {
 public:
  Runner(const std::string& folder, Quantization quantization)
      : device_(MakeCpuDevice({}).value()),
        stream_(device_->NewStream().value()),
        model_(Model::Load(folder, DTypeChoice::kAuto, quantization, *device_, nullptr).value()) {
    SPILLWAY_CHECK(model_->Reserve(kMaxTokens, kMaxTokens).ok());
    kv_.layout = model_->kv_layout();
    constexpr std::int32_t kBlocks = kMaxTokens / kBlockTokens;
    memory_ = device_->Allocate(MemoryKind::kDevice, kBlocks * kv_.layout.block_bytes()).value();
    kv_.pool = memory_.get();
    for (std::int32_t block = 0; block < kBlocks; ++block) table_.push_back(block);
  }

  const Model& model() const { return *model_; }

  // Logits after each of `tokens`, which stand at positions from `first` on.
  const float* Run(const std::vector<std::int32_t>& tokens, std::int32_t first) {
    const auto count = static_cast<std::int32_t>(tokens.size());
    std::vector<std::int32_t> positions;
    std::vector<std::int32_t> blocks;
    std::vector<std::int32_t> rows;
    for (std::int32_t i = 0; i < count; ++i) {
      positions.push_back(first + i);
      blocks.push_back((first + i) / kBlockTokens);
      rows.push_back(i);
    }
    const std::int32_t query_begin[] = {0, count};
    const std::int32_t block_begin[] = {0, static_cast<std::int32_t>(table_.size())};
    StepArrays arrays;
    arrays.num_tokens = count;
    arrays.num_sequences = 1;
    arrays.num_sampled = count;
    arrays.tokens = tokens.data();
    arrays.positions = positions.data();
    arrays.blocks = blocks.data();
    arrays.query_begin = query_begin;
    arrays.first_position = &first;
    arrays.block_begin = block_begin;
    arrays.block_table = table_.data();
    arrays.sampled_rows = rows.data();
    const float* const logits = model_->Forward(*stream_, arrays, kv_);
    SPILLWAY_CHECK(stream_->Record()->Await().ok());
    return logits;
  }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Model> model_;
  Buffer memory_;
  KvView kv_;
  std::vector<std::int32_t> table_;
};

std::vector<std::int32_t> Sample(Runner& runner, std::int32_t length, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const std::int64_t vocab = runner.model().config().vocab;
  std::vector<std::int32_t> tokens = {std::max(runner.model().config().bos_token, 0)};
  while (static_cast<std::int32_t>(tokens.size()) < length) {
    const auto position = static_cast<std::int32_t>(tokens.size()) - 1;
    const std::vector<double> logs = LogProbabilities(runner.Run({tokens.back()}, position), vocab);
    double rest = static_cast<double>(random() >> 11U) * 0x1p-53;
    std::int32_t token = 0;
    while (token + 1 < vocab && (rest -= std::exp(logs[static_cast<std::size_t>(token)])) >= 0) ++token;
    tokens.push_back(token);
  }
  return tokens;
}

void Compare(const std::string& folder) {
  Runner stored(folder, Quantization::kNone);
  Runner int8(folder, Quantization::kInt8);
  const std::int64_t vocab = stored.model().config().vocab;
  const auto length =
      static_cast<std::int32_t>(std::min<std::int32_t>(kMaxTokens, stored.model().config().max_positions));
  std::int64_t num_agreed = 0;
  std::int64_t num_tokens = 0;
  std::vector<double> divergences;
  for (int s = 0; s < kSequences; ++s) {
    const std::vector<std::int32_t> tokens = Sample(stored, length, static_cast<std::uint64_t>(s) + 1);
    const float* const expected = stored.Run(tokens, 0);
    const float* const actual = int8.Run(tokens, 0);
    for (std::int64_t t = 0; t < length; ++t, ++num_tokens) {
      const std::vector<double> p = LogProbabilities(expected + t * vocab, vocab);
      const std::vector<double> q = LogProbabilities(actual + t * vocab, vocab);
      num_agreed += std::ranges::max_element(p) - p.begin() == std::ranges::max_element(q) - q.begin() ? 1 : 0;
      double divergence = 0;
      for (std::size_t i = 0; i < p.size(); ++i) divergence += std::exp(p[i]) * (p[i] - q[i]);
      divergences.push_back(divergence);
    }
  }
  double sum = 0;
  for (const double divergence : divergences) sum += divergence;
  std::ranges::sort(divergences);
  std::printf("%s (%s): %lld tokens, same likeliest token %.2f %%, KL mean %.5f, 99th percentile %.5f\n",
              folder.c_str(), std::string(NameOf(stored.model().dtype())).c_str(), static_cast<long long>(num_tokens),
              100.0 * static_cast<double>(num_agreed) / static_cast<double>(num_tokens),
              sum / static_cast<double>(num_tokens), divergences[divergences.size() * 99 / 100]);
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) spillway::Compare(argv[i]);
  return 0;
}
