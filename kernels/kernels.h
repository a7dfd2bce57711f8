#pragma once

// The arithmetic a transformer step needs, over plain structs. Every call queues work on a stream and returns.
// The structs are copied; the arrays they point to are device memory that stays alive and unchanged until the
// work is done. `tokens` below are rows of one step: the new tokens of all its sequences, concatenated.
//
// What every implementation holds: a row's result depends on that row's inputs alone, never on how many rows
// share the call, on how they were split into calls, or on the number of workers. That is what makes a batch
// equal a solo run, and a chunked prefill a whole one, bit for bit. The cuda device holds it where it is
// batch-invariant (CudaDeviceOptions).

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "kernels/device.h"
#include "kernels/kv_layout.h"
#include "kernels/tensor.h"

namespace spillway {

// A weight matrix in the form its device multiplies fastest. Logical shape [rows = outputs, cols = inputs].
class PackedMatrix {
 public:
  virtual ~PackedMatrix() = default;
  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  std::size_t size_bytes() const { return size_bytes_; }

 protected:
  PackedMatrix(std::int64_t rows, std::int64_t cols, std::size_t size_bytes)
      : rows_(rows), cols_(cols), size_bytes_(size_bytes) {}

 private:
  std::int64_t rows_;
  std::int64_t cols_;
  std::size_t size_bytes_;
};

// An embedding table, gathered by row. On the cpu device it is a view: the caller keeps the host memory alive.
struct EmbeddingTable {
  MatrixView view;  // device-readable
  Buffer storage;   // empty where `view` is the caller's memory
};

struct SampleResult;

// out[t, :] = table[token of t, :], which is tokens[t], in [0, table.rows), or, where tokens[t] is SampledFrom(r), the
// token of sampled[r]: so a step can follow one whose tokens no host has seen yet.
struct EmbedArgs {
  const std::int32_t* tokens = nullptr;  // [num_tokens]
  std::int64_t num_tokens = 0;
  MatrixView table;                       // [vocab, hidden]
  float* out = nullptr;                   // [num_tokens, hidden]
  const SampleResult* sampled = nullptr;  // device memory that an earlier Sample wrote; null: no token is from there
};
constexpr std::int32_t SampledFrom(std::int32_t row) { return -1 - row; }

// out[t, :] = x[t, :] / sqrt(mean(x[t, :]^2) + epsilon) * weight
// Gathering form: row t of the output reads row rows[t] of x where rows is given (the rows that are sampled).
struct RmsNormArgs {
  const float* x = nullptr;            // [*, hidden]
  const float* weight = nullptr;       // [hidden]
  const std::int32_t* rows = nullptr;  // [num_rows] or null = 0, 1, 2, ...
  float epsilon = 0;
  std::int64_t num_rows = 0;
  std::int64_t hidden = 0;
  std::byte* out = nullptr;  // [num_rows, hidden] of out_dtype
  DType out_dtype = DType::kF32;
};

enum class GemmOutput : std::uint8_t { kStore, kAdd };  // kAdd: out += product, one addition at the end

// out[m, n] = sum over k of a[m, k] * weight[n, k] (+ bias[n])
// Accumulated in float. Bits of a row do not depend on num_rows.
struct GemmArgs {
  const std::byte* a = nullptr;  // [num_rows, weight.cols] of a_dtype
  DType a_dtype = DType::kF32;   // the weight's; F32 or BF16 with an INT8 one
  std::int64_t num_rows = 0;
  const PackedMatrix* weight = nullptr;
  const float* bias = nullptr;  // [weight.rows] or null
  GemmOutput output = GemmOutput::kStore;
  float* out = nullptr;  // [num_rows, weight.rows]
  // A hint: the weight that the stream multiplies by next, so that the cpu device may fetch it while workers are idle.
  const PackedMatrix* next = nullptr;
};

// cos_sin[t, i] = cos(a), cos_sin[t, half + i] = sin(a) with a = positions[t] * inverse_frequency[i], computed in
// double. Once per step; every layer reads it.
struct RopeAnglesArgs {
  const std::int32_t* positions = nullptr;    // [num_tokens]
  const double* inverse_frequency = nullptr;  // [half], half = rotary dim / 2
  std::int64_t num_tokens = 0;
  int half = 0;
  float* cos_sin = nullptr;  // [num_tokens, 2 * half]
};

// Where a step's KV lives: `pool` is the device tier's slab of blocks.
struct KvView {
  std::byte* pool = nullptr;
  KvLayout layout;
};

// Splits the fused projection, rotates q and k (rotate-half form: pairs (i, i + half)), writes q, and writes K and V
// rows, rounded to the layout's dtype, into their blocks.
inline constexpr std::int32_t kNoBlock = -1;  // of a row that pads a step: its K and V go nowhere

struct RopeAppendArgs {
  const float* qkv = nullptr;               // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const float* cos_sin = nullptr;           // [num_tokens, head_dim], as RopeAngles wrote it
  const std::int32_t* positions = nullptr;  // [num_tokens]; row in its block = position % 16
  const std::int32_t* blocks = nullptr;     // [num_tokens]: the block that holds this token, or kNoBlock
  std::int64_t num_tokens = 0;
  int num_heads = 0;
  int layer = 0;
  KvView kv;
  std::byte* q = nullptr;  // [num_tokens, num_heads, head_dim] of q_dtype
  DType q_dtype = DType::kF32;
};

// Causal attention of each sequence's new tokens over its blocks, its own new tokens included (already appended).
// Query head h reads kv head h / (num_heads / num_kv_heads).
//
// One arithmetic for 1 or 512 query rows (see docs/architecture.md): segments of kSegmentTokens positions, each a
// partial state (output, max, sum), merged in position order.
inline constexpr int kSegmentTokens = 256;

// Which part of a row's attention a call makes. kWhole: all of it. Else one layer's attention is made in several calls
// over KV that lies in different places, and partial states are carried from call to call: kFirst starts them empty,
// kLast merges its range and then normalizes into `out`, kMiddle does neither. The bits are those of one kWhole call.
// The KV of a call may be pinned host memory: the cuda device reads it in place.
enum class AttentionPass : std::uint8_t { kWhole, kFirst, kMiddle, kLast };

struct AttentionArgs {
  const std::byte* q = nullptr;  // [num_tokens, num_heads, head_dim] of q_dtype
  DType q_dtype = DType::kF32;
  int num_heads = 0;
  int layer = 0;
  float scale = 0;
  KvView kv;
  std::int64_t num_sequences = 0;
  std::int64_t num_tokens = 0;
  // [num_sequences + 1]: token rows of sequence s. Rows of none of the sequences are left alone.
  const std::int32_t* query_begin = nullptr;
  const std::int32_t* first_position = nullptr;  // [num_sequences]: position of its first token row
  const std::int32_t* block_begin = nullptr;     // [num_sequences + 1] into block_table
  const std::int32_t* block_table = nullptr;     // blocks of each sequence in position order
  std::byte* out = nullptr;                      // [num_tokens, num_heads, head_dim] of out_dtype
  DType out_dtype = DType::kF32;
  // A row at position p sees the keys of (p - window, p]; 0: all up to p. On the cuda device values before the window
  // may be multiplied by 0: there they must be finite.
  std::int32_t window = 0;

  // Added to the scores of a row of KV, for all heads that read it: ln(n) where the row stands for n tokens. Null:
  // nothing is added. Found by block as the rows are: that of row t of block b and kv head h, of this layer, is
  // row_bias[b * row_bias_stride + h * kBlockTokens + t]; read in place where KV is. Minus infinity: as if the row were
  // not there, if its values are finite. 0 for all: the bits of no bias. Needs a scale above 0.
  const float* row_bias = nullptr;
  std::int64_t row_bias_stride = 0;  // floats from block to block

  // With a pass other than kWhole: the call reads keys [key_begin[s], key_end[s]) of sequence s only, and block_table
  // lists the blocks of that range alone. key_begin is a multiple of kSegmentTokens, key_end too or the end of the
  // sequence; the range may be empty. Ranges of successive calls ascend and leave no key out.
  AttentionPass pass = AttentionPass::kWhole;
  const std::int32_t* key_begin = nullptr;  // [num_sequences]
  const std::int32_t* key_end = nullptr;    // [num_sequences]
  float* states = nullptr;                  // [num_tokens, num_heads, head_dim + 2]: out, max, sum (attention_state.h)
};

// out[t, i] = silu(gate_up[t, i]) * gate_up[t, inner + i]
struct SiluMulArgs {
  const float* gate_up = nullptr;  // [num_tokens, 2 * inner]
  std::int64_t num_tokens = 0;
  std::int64_t inner = 0;
  std::byte* out = nullptr;  // [num_tokens, inner] of out_dtype
  DType out_dtype = DType::kF32;
};

// out[t, i] = silu(product[t, i]) * product[t, inner + i], the product being a * weight: a Gemm and a SiluMul, with the
// same bits.
struct GateUpArgs {
  const std::byte* a = nullptr;  // as in GemmArgs
  DType a_dtype = DType::kF32;
  std::int64_t num_rows = 0;
  const PackedMatrix* weight = nullptr;  // [2 * inner, hidden]: packed of gate and up
  float* product = nullptr;              // [num_rows, 2 * inner], working memory
  std::byte* out = nullptr;              // [num_rows, inner] of out_dtype, apart from `a`
  DType out_dtype = DType::kF32;
  const PackedMatrix* next = nullptr;  // as in GemmArgs
};

GemmArgs GemmOf(const GateUpArgs& args);
SiluMulArgs SiluMulOf(const GateUpArgs& args);

// Sampling of one row. docs/sampling.md is the specification that all devices share.
struct SampleRow {
  float temperature = 0;   // 0 = greedy
  float top_p = 1;         // (0, 1]
  float min_p = 0;         // [0, 1]
  std::int32_t top_k = 0;  // 0 = all
  std::uint64_t seed = 0;
  std::uint32_t choice = 0;        // Philox counter: which of the n choices
  std::uint32_t output_index = 0;  // Philox counter: index of the token being sampled
  std::int32_t num_logprobs = -1;  // -1 = none; 0 = the sampled token's; N = and the N most likely
};

// Most likely tokens reported per row at most.
inline constexpr int kMaxLogprobs = 20;

struct SampleResult {
  std::int32_t token = 0;
  // Of raw logits, natural log. Rank 1 = most likely; equal logits rank by lower id. Valid where num_logprobs >= 0.
  float logprob = 0;
  std::int32_t rank = 0;
  std::int32_t num_top = 0;
  std::int32_t top_tokens[kMaxLogprobs] = {};
  float top_logprobs[kMaxLogprobs] = {};
  std::uint64_t logits_hash = 0;  // of the row's bits where SampleArgs.hash_logits is set
};

// The token of row t; one that is in no table where `sampled` is needed and absent.
inline std::int32_t TokenAt(const EmbedArgs& args, std::int64_t t) {
  const std::int32_t token = args.tokens[t];
  return token < 0 && args.sampled != nullptr ? args.sampled[SampledFrom(token)].token : token;
}

struct SampleArgs {
  const float* logits = nullptr;  // [num_rows, vocab]
  std::int64_t num_rows = 0;
  std::int64_t vocab = 0;
  const SampleRow* rows = nullptr;  // [num_rows]
  // Tokens that may not be sampled (CSR over rows): min_tokens bans end-of-sequence and stop ids. Logprobs ignore bans.
  const std::int32_t* banned_begin = nullptr;  // [num_rows + 1]
  const std::int32_t* banned = nullptr;
  bool hash_logits = false;  // identity tests: FNV-1a (64 bit) over the row's float bits, as little-endian 32-bit words
  SampleResult* results = nullptr;  // [num_rows]
};

// Any thread may queue on its own stream; the object itself is immutable.
class Kernels {
 public:
  virtual ~Kernels() = default;

  // Whether weights, activations and KV may have this dtype. F32 and BF16 always may.
  virtual bool Computes(DType dtype) const { return dtype != DType::kF16; }

  // Start-up only, synchronous. Stacks `parts` by rows (fused QKV, gate-up): same dtype and cols.
  // Dtypes: those that Computes() is true of. The parts' memory is not needed afterwards.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const = 0;
  // As Pack, rounded to 8-bit integers with one scale per row. Gemm rounds the activations likewise, by row; int8.h has
  // the arithmetic. UNIMPLEMENTED where a device has none.
  virtual absl::StatusOr<std::unique_ptr<PackedMatrix>> PackInt8(std::span<const MatrixView> parts) const = 0;
  virtual absl::StatusOr<EmbeddingTable> MakeEmbeddingTable(const MatrixView& table) const = 0;

  virtual void Embed(Stream& stream, const EmbedArgs& args) const = 0;
  virtual void RmsNorm(Stream& stream, const RmsNormArgs& args) const = 0;
  virtual void Gemm(Stream& stream, const GemmArgs& args) const = 0;
  virtual void RopeAngles(Stream& stream, const RopeAnglesArgs& args) const = 0;
  virtual void RopeAppend(Stream& stream, const RopeAppendArgs& args) const = 0;
  virtual void Attention(Stream& stream, const AttentionArgs& args) const = 0;
  virtual void SiluMul(Stream& stream, const SiluMulArgs& args) const = 0;
  virtual void Sample(Stream& stream, const SampleArgs& args) const = 0;

  // Gemm, then SiluMul, unless a device does both in one pass.
  virtual void GateUp(Stream& stream, const GateUpArgs& args) const;
};

}  // namespace spillway
