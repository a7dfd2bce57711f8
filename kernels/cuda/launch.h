#pragma once

// The only door between the host code of the cuda device (g++, Abseil) and its kernels (nvcc, neither Abseil nor
// containers): plain structs of device pointers and functions that queue a kernel and return CUDA's error code.
// Shapes and meaning are those of kernels/kernels.h; here every stride is spelled out in elements unless it says bytes.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/tensor.h"

namespace spillway::cuda {

// What a kernel tells of input it cannot honour, in pinned mapped host memory: a word written by one store, since links
// carry no atomics. Of several faults any one may be what the host reads.
using Fault = std::uint64_t;
inline constexpr Fault kNoFault = 0;
// A token outside the table: the row and one in the upper half, the token in the lower.
constexpr Fault TokenFault(std::int32_t row, std::int32_t token) {
  return (static_cast<Fault>(row) + 1) << 32 | static_cast<std::uint32_t>(token);
}
constexpr std::int32_t RowOfFault(Fault fault) { return static_cast<std::int32_t>(fault >> 32) - 1; }
constexpr std::int32_t TokenOfFault(Fault fault) { return static_cast<std::int32_t>(fault & 0xffffffffU); }

// Field by field SampleRow and SampleResult of kernels/kernels.h, which nvcc does not read.
inline constexpr int kMaxReportedLogprobs = 20;
struct SampleRowParams {
  float temperature;
  float top_p;
  float min_p;
  std::int32_t top_k;
  std::uint64_t seed;
  std::uint32_t choice;
  std::uint32_t output_index;
  std::int32_t num_logprobs;
};
struct SampleRowResult {
  std::int32_t token;
  float logprob;
  std::int32_t rank;
  std::int32_t num_top;
  std::int32_t top_tokens[kMaxReportedLogprobs];
  float top_logprobs[kMaxReportedLogprobs];
  std::uint64_t logits_hash;
};

struct EmbedParams {
  const std::int32_t* tokens;  // [num_tokens]
  std::int64_t num_tokens;
  const std::byte* table;  // [vocab, hidden] of dtype
  DType dtype;
  std::int64_t vocab;
  std::int64_t hidden;
  std::int64_t row_stride;
  float* out;                      // [num_tokens, hidden]
  const SampleRowResult* sampled;  // of tokens[t] = -1 - r: row r's token; or null
  Fault* fault;                    // TokenFault: the row is left as zeros
};
cudaError_t LaunchEmbed(const EmbedParams& params, cudaStream_t stream);

struct RmsNormParams {
  const float* x;            // [*, hidden]
  const float* weight;       // [hidden]
  const std::int32_t* rows;  // [num_rows] or null
  float epsilon;
  std::int64_t num_rows;
  std::int64_t hidden;
  std::byte* out;  // [num_rows, hidden] of out_dtype
  DType out_dtype;
};
cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream);

struct RopeAnglesParams {
  const std::int32_t* positions;    // [num_tokens]
  const double* inverse_frequency;  // [half]
  std::int64_t num_tokens;
  int half;
  float* cos_sin;  // [num_tokens, 2 * half]
};
cudaError_t LaunchRopeAngles(const RopeAnglesParams& params, cudaStream_t stream);

// One layer of the pool of blocks (kernels/kv_layout.h).
struct KvLayer {
  std::byte* pool;  // at this layer's first strip of block 0
  std::int64_t block_bytes;
  std::int64_t strip_bytes;
  std::int64_t row_bytes;
  int num_kv_heads;
  int head_dim;
  DType dtype;
};

struct RopeAppendParams {
  const float* qkv;               // [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
  const float* cos_sin;           // [num_tokens, head_dim]
  const std::int32_t* positions;  // [num_tokens]
  const std::int32_t* blocks;     // [num_tokens]; negative: none
  std::int64_t num_tokens;
  int num_heads;
  KvLayer kv;
  std::byte* q;  // [num_tokens, num_heads, head_dim] of q_dtype
  DType q_dtype;
};
cudaError_t LaunchRopeAppend(const RopeAppendParams& params, cudaStream_t stream);

struct SiluMulParams {
  const float* gate_up;  // [num_tokens, 2 * inner]
  std::int64_t num_tokens;
  std::int64_t inner;
  std::byte* out;  // [num_tokens, inner] of out_dtype
  DType out_dtype;
};
cudaError_t LaunchSiluMul(const SiluMulParams& params, cudaStream_t stream);

// What the merging kernel needs to know of one token row; written by the kernels that attend.
struct alignas(16) TokenPlan {
  std::int32_t state_base;    // first state of the sequence
  std::int32_t num_segments;  // of every item; 0: the row is finished
  std::int32_t num_rows;      // query rows of the sequence per kv head
  std::int32_t token;         // within the sequence
  // Where items are split only if their units fall into several runs (attention_runs.cuh); all 0: all of them are.
  std::int32_t unit_base;  // first unit of the sequence
  std::int32_t run_length;
  std::int32_t num_longer_runs;
};

inline constexpr std::int32_t kNoWindow = 1 << 30;
struct AttentionParams {
  const std::byte* q;  // [num_tokens, num_heads, head_dim] of q_dtype
  DType q_dtype;
  int num_heads;
  float scale;
  KvLayer kv;
  std::int32_t num_sequences;
  std::int32_t num_tokens;
  const std::int32_t* query_begin;     // [num_sequences + 1]
  const std::int32_t* first_position;  // [num_sequences]
  const std::int32_t* block_begin;     // [num_sequences + 1]
  const std::int32_t* block_table;
  std::byte* out;  // [num_tokens, num_heads, head_dim] of out_dtype
  DType out_dtype;
  std::int32_t window;           // a row sees so many keys, itself the last; kNoWindow: all up to itself
  const float* row_bias;         // of this layer, as AttentionArgs has it; or null
  std::int64_t row_bias_stride;  // floats from block to block
  float row_bias_unit;           // 1 / scale: what makes it a term of the product that is scaled
  // A pass over a part of the keys (AttentionPass of kernels/kernels.h); key_begin is null: all of them.
  const std::int32_t* key_begin;  // [num_sequences]
  const std::int32_t* key_end;    // [num_sequences]
  float* carried;                 // [num_tokens, num_heads, head_dim + 2]: out, max, sum of a row, from pass to pass
  bool starts_empty;              // else from `carried`
  bool finishes;                  // results to `out`, else states to `carried`
  // Workspace: partial states of sequences whose segments are computed by several CTAs. A sequence that does not fit is
  // computed by one CTA per tile, with the same bits.
  std::int64_t state_capacity;  // states
  float* state_out;             // [state_capacity, head_dim]
  float2* state_max_sum;        // [state_capacity] (max, sum)
  TokenPlan* plan;              // [num_tokens]
  int num_multiprocessors;
  bool has_copy_engine;  // as FindCopyEngine has it
  // Whether prefill may be the kernel of attention_hopper.cu, with bits of its own: on compute capability 9.0, where
  // the device need not be batch-invariant.
  bool may_use_wgmma;
  unsigned* tickets;  // [2]; zeros before and after every launch
};
// Whether this thread's device runs our code for compute capability 9.0 or newer, and has the shared memory for it.
cudaError_t FindCopyEngine(bool* has_copy_engine);
// Queues the kernels for head_dim 64 and 128 on tensor cores where q and KV are BF16 or F16, the plain one otherwise,
// and the merge.
cudaError_t LaunchAttention(const AttentionParams& params, cudaStream_t stream);
// The parts of the above.
bool TensorAttentionFits(const AttentionParams& params);
// Of the sequences with max_rows query rows at most.
cudaError_t LaunchDecodeAttention(const AttentionParams& params, int max_rows, cudaStream_t stream);
cudaError_t LaunchTensorAttention(const AttentionParams& params, cudaStream_t stream);
// Prefill by wgmma: sequences of min_rows or more query rows, in one call over all their keys, without a row bias.
// Built where SPILLWAY_CUDA_ARCHITECTURES has sm_90a; else it never fits.
bool HopperPrefillIsBuilt();
bool HopperPrefillFits(const AttentionParams& params);
cudaError_t LaunchHopperPrefill(const AttentionParams& params, int min_rows, cudaStream_t stream);
cudaError_t LaunchPlainAttention(const AttentionParams& params, cudaStream_t stream);
enum class MergeExponential : std::uint8_t { kHardware, kPolynomial };
// Only sequences of at most max_rows query rows were split; 0: any may have been.
cudaError_t LaunchMergeAttention(const AttentionParams& params, MergeExponential exponential, int max_rows,
                                 cudaStream_t stream);

struct SampleParams {
  const float* logits;  // [num_rows, vocab]
  std::int64_t num_rows;
  std::int32_t vocab;
  const SampleRowParams* rows;       // [num_rows]
  const std::int32_t* banned_begin;  // [num_rows + 1] or null
  const std::int32_t* banned;
  bool hash_logits;
  SampleRowResult* results;  // [num_rows]
};
cudaError_t LaunchSample(const SampleParams& params, cudaStream_t stream);

// destination[destination_offsets[i]] = source[source_offsets[i]], row_bytes each: rows of KV from pinned, mapped host
// memory straight into their slots. Few CTAs on a side stream suffice: the link is the limit, not the multiprocessors.
struct GatherParams {
  const std::byte* source;                  // device address of mapped host memory (or device memory); 16-byte aligned
  std::byte* destination;                   // 16-byte aligned
  const std::int64_t* source_offsets;       // [num_rows] bytes, multiples of 16
  const std::int64_t* destination_offsets;  // [num_rows] bytes, multiples of 16
  const std::int32_t* num_rows_device;      // where the number is known to the device only; else null
  std::int64_t num_rows;                    // the number, or its upper bound
  std::int32_t row_bytes;                   // a multiple of 16
  int num_ctas;                             // 0: kDefaultGatherCtas
};
inline constexpr int kDefaultGatherCtas = 16;
cudaError_t LaunchGatherRows(const GatherParams& params, cudaStream_t stream);

// out[m, n] = sum over k of a[m, k] * weight[n, k] (+ bias[n]), or out += that. Used where cuBLASLt is absent or has no
// algorithm for the shape: float accumulation over ascending k, so that a row never depends on num_rows.
struct PlainGemmParams {
  const std::byte* a;       // [num_rows, cols] of dtype
  const std::byte* weight;  // [rows, cols] of dtype
  DType dtype;
  std::int64_t num_rows;  // m
  std::int64_t rows;      // n
  std::int64_t cols;      // k
  const float* bias;      // [rows] or null
  bool add;
  float* out;  // [num_rows, rows]
};
cudaError_t LaunchPlainGemm(const PlainGemmParams& params, cudaStream_t stream);

// Reads and writes nothing; what one launch costs.
cudaError_t LaunchEmpty(cudaStream_t stream);

}  // namespace spillway::cuda
