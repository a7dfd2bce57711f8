#pragma once

// What the attention tests share: a pool of blocks, the new tokens of sequences, a plain oracle.

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "tests/kernels/kernel_rig.h"

namespace spillway {

using TargetAndDType = std::tuple<std::string, DType>;

inline std::string NameOfTargetAndDType(const testing::TestParamInfo<TargetAndDType>& param) {
  return std::get<0>(param.param) + "_" + std::string(NameOf(std::get<1>(param.param)));
}

struct Heads {
  int num_kv_heads;
  int group;
  int head_dim;
};

// A pool of blocks filled with one or more sequences' keys and values. Blocks are handed out in a shuffled order, and
// everything that no token wrote is NaN, which must never leak.
class Pool {
 public:
  Pool(Heads heads, DType dtype, int num_layers, std::int64_t num_blocks, std::uint64_t seed) : random_(seed) {
    layout_.num_layers = num_layers;
    layout_.num_kv_heads = heads.num_kv_heads;
    layout_.head_dim = heads.head_dim;
    layout_.dtype = dtype;
    const std::size_t size = static_cast<std::size_t>(num_blocks) * layout_.block_bytes() / SizeOf(dtype);
    pool_ = std::make_shared<Array>(dtype, std::vector<float>(size, std::numeric_limits<float>::quiet_NaN()));
    free_.resize(static_cast<std::size_t>(num_blocks));
    std::iota(free_.begin(), free_.end(), 0);
    std::shuffle(free_.begin(), free_.end(), random_.engine());
  }

  KvView view() const { return {pool_->data(), layout_}; }
  const KvLayout& layout() const { return layout_; }

  // Blocks of a new sequence whose K and V rows are `rows` ([token][kv head][2 * head_dim]) in layer `layer`.
  std::vector<std::int32_t> Add(const std::vector<float>& rows, int layer) {
    const std::size_t row_size = 2 * static_cast<std::size_t>(layout_.head_dim);
    const std::size_t num_tokens = rows.size() / row_size / static_cast<std::size_t>(layout_.num_kv_heads);
    std::vector<std::int32_t> blocks;
    for (std::size_t t = 0; t < num_tokens; ++t) {
      if (t % kBlockTokens == 0) {
        blocks.push_back(free_.back());
        free_.pop_back();
      }
      for (int h = 0; h < layout_.num_kv_heads; ++h) {
        const std::size_t at = static_cast<std::size_t>(blocks.back()) * layout_.block_bytes() +
                               layout_.strip_offset(layer, h) + t % kBlockTokens * layout_.row_bytes();
        const std::size_t from =
            (t * static_cast<std::size_t>(layout_.num_kv_heads) + static_cast<std::size_t>(h)) * row_size;
        for (std::size_t i = 0; i < row_size; ++i) {
          StoreElement(pool_->data() + at, layout_.dtype, static_cast<std::int64_t>(i), rows[from + i]);
        }
      }
    }
    return blocks;
  }

 private:
  KvLayout layout_;
  Random random_;
  std::shared_ptr<Array> pool_;
  std::vector<std::int32_t> free_;
};

// New tokens of one sequence.
struct Part {
  std::vector<std::int32_t> blocks;
  std::int32_t first_position = 0;
  std::vector<float> q;  // [token][head][head_dim]
};

// One call over some parts, and the arrays it reads and writes.
class AttentionCall {
 public:
  AttentionCall(const Pool& pool, int group, int layer, DType dtype, const std::vector<Part>& parts) {
    const int num_heads = pool.layout().num_kv_heads * group;
    const std::size_t token_size = static_cast<std::size_t>(num_heads * pool.layout().head_dim);
    std::vector<float> q;
    for (const Part& part : parts) {
      q.insert(q.end(), part.q.begin(), part.q.end());
      query_begin_.push_back(static_cast<std::int32_t>(q.size() / token_size));
      first_position_.push_back(part.first_position);
      block_table_.insert(block_table_.end(), part.blocks.begin(), part.blocks.end());
      block_begin_.push_back(static_cast<std::int32_t>(block_table_.size()));
    }
    queries_ = Array(dtype, q, 1);
    out_ = Array(DType::kF32, q.size(), 1);
    args.q = queries_.data();
    args.q_dtype = dtype;
    args.num_heads = num_heads;
    args.layer = layer;
    args.scale = 1.0F / std::sqrt(static_cast<float>(pool.layout().head_dim));
    args.kv = pool.view();
    args.num_sequences = static_cast<std::int64_t>(parts.size());
    args.num_tokens = query_begin_.back();
    args.query_begin = query_begin_.data();
    args.first_position = first_position_.data();
    args.block_begin = block_begin_.data();
    args.block_table = block_table_.data();
    args.out = out_.data();
  }
  AttentionCall(const AttentionCall&) = delete;
  AttentionCall& operator=(const AttentionCall&) = delete;

  std::vector<float> Run(Rig& rig) {
    rig.kernels().Attention(rig.stream(), args);
    rig.Finish();
    return out_.Values();
  }

  AttentionArgs args;

 private:
  std::vector<std::int32_t> query_begin_ = {0};
  std::vector<std::int32_t> first_position_;
  std::vector<std::int32_t> block_begin_ = {0};
  std::vector<std::int32_t> block_table_;
  Array queries_{DType::kF32, 0};
  Array out_{DType::kF32, 0};
};

inline std::vector<float> RunAttention(Rig& rig, const Pool& pool, int group, int layer, DType dtype,
                                       const std::vector<Part>& parts) {
  return AttentionCall(pool, group, layer, dtype, parts).Run(rig);
}

inline std::size_t RowsSize(const Pool& pool, std::size_t num_tokens) {
  return num_tokens * static_cast<std::size_t>(pool.layout().num_kv_heads * 2 * pool.layout().head_dim);
}

// Plain softmax attention of all queries of a part, from the same rounded values; window as AttentionArgs has it; bias,
// if any, of the rows, [token][kv head].
inline std::vector<float> Oracle(const Pool& pool, int group, DType dtype, const std::vector<float>& rows,
                                 const Part& part, std::size_t window = 0, const std::vector<float>& bias = {}) {
  const auto kv_heads = static_cast<std::size_t>(pool.layout().num_kv_heads);
  const auto dim = static_cast<std::size_t>(pool.layout().head_dim);
  const std::size_t num_heads = kv_heads * static_cast<std::size_t>(group);
  const std::vector<float> kv = Array(pool.layout().dtype, rows).Values();
  const std::vector<float> q = Array(dtype, part.q).Values();
  std::vector<float> out;
  for (std::size_t t = 0; t < q.size() / (num_heads * dim); ++t) {
    for (std::size_t h = 0; h < num_heads; ++h) {
      const std::size_t num_keys = static_cast<std::size_t>(part.first_position) + t + 1;
      const std::size_t first = window > 0 && num_keys > window ? num_keys - window : 0;
      const auto at = [&](std::size_t p, std::size_t i) {
        return kv[(p * kv_heads + h / static_cast<std::size_t>(group)) * 2 * dim + i];
      };
      std::vector<double> p(num_keys);
      for (std::size_t j = first; j < num_keys; ++j) {
        for (std::size_t i = 0; i < dim; ++i) p[j] += double{q[(t * num_heads + h) * dim + i]} * at(j, i);
        p[j] /= std::sqrt(static_cast<double>(dim));
        if (!bias.empty()) p[j] += bias[j * kv_heads + h / static_cast<std::size_t>(group)];
      }
      const double max = *std::max_element(p.begin() + static_cast<std::ptrdiff_t>(first), p.end());
      double sum = 0;
      for (std::size_t j = first; j < num_keys; ++j) sum += p[j] = std::exp(p[j] - max);
      for (std::size_t i = 0; i < dim; ++i) {
        double value = 0;
        for (std::size_t j = first; j < num_keys; ++j) value += p[j] * at(j, dim + i);
        out.push_back(static_cast<float>(value / sum));
      }
    }
  }
  return out;
}

}  // namespace spillway
