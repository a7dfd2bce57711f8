// Kernels that work on rows of a step: embedding, RMSNorm, rotary angles, RoPE with KV append, SiLU-mul. Memory-bound,
// so: neighbouring threads on neighbouring elements, one CTA per row, fixed order of every sum.

#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/numeric.cuh"
#include "kernels/kv_layout.h"

namespace spillway::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sum over the block in an order that depends on nothing but kThreads. Every thread gets it.
__device__ float BlockSum(float value) {
  __shared__ float sums[kWarps];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kWarps; ++w) total += sums[w];
  return total;
}

__global__ void EmbedKernel(EmbedParams params) {
  const std::int64_t t = blockIdx.x;
  std::int32_t token = params.tokens[t];
  if (token < 0 && params.sampled != nullptr) token = params.sampled[-1 - token].token;
  const bool is_known = token >= 0 && token < params.vocab;
  float* const out = params.out + t * params.hidden;
  for (std::int64_t i = threadIdx.x; i < params.hidden; i += blockDim.x) {
    out[i] = is_known ? LoadAs(params.table, params.dtype, token * params.row_stride + i) : 0.0F;
  }
  if (!is_known && threadIdx.x == 0) {
    *static_cast<volatile Fault*>(params.fault) = TokenFault(static_cast<std::int32_t>(t), token);
  }
}

// kVector consecutive elements per thread and step; hidden is a multiple of it.
template <int kVector>
__global__ void RmsNormKernel(RmsNormParams params) {
  struct alignas(4 * kVector) Vector {
    float v[kVector];
  };
  const std::int64_t t = blockIdx.x;
  const std::int64_t row = params.rows != nullptr ? params.rows[t] : t;
  const auto* const x = reinterpret_cast<const Vector*>(params.x + row * params.hidden);
  const auto* const weight = reinterpret_cast<const Vector*>(params.weight);
  const std::int64_t num_vectors = params.hidden / kVector;
  float sum = 0;
  for (std::int64_t i = threadIdx.x; i < num_vectors; i += kThreads) {
    const Vector value = x[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum = fmaf(value.v[j], value.v[j], sum);
  }
  const float mean = BlockSum(sum) / static_cast<float>(params.hidden);
  const float scale = 1.0F / sqrtf(mean + params.epsilon);
  for (std::int64_t i = threadIdx.x; i < num_vectors; i += kThreads) {
    const Vector value = x[i];
    const Vector factor = weight[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      StoreAs(params.out, params.out_dtype, t * params.hidden + i * kVector + j, value.v[j] * scale * factor.v[j]);
    }
  }
}

__global__ void RopeAnglesKernel(RopeAnglesParams params) {
  const std::int64_t index = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= params.num_tokens * params.half) return;
  const std::int64_t t = index / params.half;
  const std::int64_t i = index % params.half;
  double sine;
  double cosine;
  sincos(params.positions[t] * params.inverse_frequency[i], &sine, &cosine);
  float* const out = params.cos_sin + t * 2 * params.half;
  out[i] = static_cast<float>(cosine);
  out[params.half + i] = static_cast<float>(sine);
}

// Row [K | V] of a token in its block.
__device__ __forceinline__ std::byte* RowOf(const RopeAppendParams& params, std::int32_t block, unsigned t,
                                            unsigned kv_head) {
  return params.kv.pool + block * params.kv.block_bytes + kv_head * params.kv.strip_bytes +
         params.positions[t] % kBlockTokens * params.kv.row_bytes;
}

// A thread per pair (i, i + half) of q, K and V: those of q and K become (a cos - b sin, b cos + a sin). One CTA per
// token would be too few to hide what a load takes: 5.5 us for a single token instead of 2.
__global__ void RopeAppendKernel(RopeAppendParams params) {
  const int dim = params.kv.head_dim;
  const auto half = static_cast<unsigned>(dim / 2);
  const auto num_heads = static_cast<unsigned>(params.num_heads);
  const auto num_kv_heads = static_cast<unsigned>(params.kv.num_kv_heads);
  const unsigned all_heads = num_heads + 2 * num_kv_heads;
  const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned row = index / half;  // of heads, token by token
  const auto i = static_cast<int>(index % half);
  const unsigned t = row / all_heads;
  const unsigned head = row % all_heads;
  if (t >= params.num_tokens) return;
  const std::int32_t block = params.blocks[t];
  if (head >= num_heads && block < 0) return;

  const float* const from = params.qkv + std::int64_t{row} * dim;
  const float first = from[i];
  const float second = from[half + i];
  if (head >= num_heads + num_kv_heads) {
    std::byte* const to = RowOf(params, block, t, head - num_heads - num_kv_heads);
    StoreAs(to, params.kv.dtype, dim + i, first);
    StoreAs(to, params.kv.dtype, dim + half + i, second);
    return;
  }
  const float* const cos_sin = params.cos_sin + std::int64_t{t} * dim;
  const float cosine = cos_sin[i];
  const float sine = cos_sin[half + i];
  const float low = fmaf(first, cosine, -(second * sine));
  const float high = fmaf(second, cosine, first * sine);
  if (head < num_heads) {
    const std::int64_t at = (std::int64_t{t} * num_heads + head) * dim + i;
    StoreAs(params.q, params.q_dtype, at, low);
    StoreAs(params.q, params.q_dtype, at + half, high);
  } else {
    std::byte* const to = RowOf(params, block, t, head - num_heads);
    StoreAs(to, params.kv.dtype, i, low);
    StoreAs(to, params.kv.dtype, half + i, high);
  }
}

__global__ void SiluMulKernel(SiluMulParams params) {
  const std::int64_t index = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= params.num_tokens * params.inner) return;
  const std::int64_t t = index / params.inner;
  const std::int64_t i = index % params.inner;
  const float x = params.gate_up[t * 2 * params.inner + i];
  const float up = params.gate_up[(t * 2 + 1) * params.inner + i];
  // e = exp(-|x|), so that nothing overflows; sigmoid(x) is 1 / (1 + e) or e / (1 + e) by sign.
  const float e = Exp2Polynomial(fabsf(x) * -kLog2E);
  const float silu = x * ((x < 0 ? e : 1.0F) / (1.0F + e));
  StoreAs(params.out, params.out_dtype, index, silu * up);
}

__global__ void EmptyKernel() {}

unsigned BlocksFor(std::int64_t num_items) { return static_cast<unsigned>(CeilDiv<std::int64_t>(num_items, kThreads)); }

}  // namespace

cudaError_t LaunchEmbed(const EmbedParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return Launch(EmbedKernel, static_cast<unsigned>(params.num_tokens), kThreads, 0, stream, params);
}

cudaError_t LaunchRmsNorm(const RmsNormParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const bool is_wide = params.hidden % 4 == 0 && reinterpret_cast<std::uintptr_t>(params.x) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(params.weight) % 16 == 0;
  return Launch(is_wide ? RmsNormKernel<4> : RmsNormKernel<1>, static_cast<unsigned>(params.num_rows), kThreads, 0,
                stream, params);
}

cudaError_t LaunchRopeAngles(const RopeAnglesParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return Launch(RopeAnglesKernel, BlocksFor(params.num_tokens * params.half), kThreads, 0, stream, params);
}

cudaError_t LaunchRopeAppend(const RopeAppendParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  const std::int64_t num_pairs =
      params.num_tokens * (params.num_heads + 2 * params.kv.num_kv_heads) * (params.kv.head_dim / 2);
  if (num_pairs >= std::int64_t{1} << 31) return cudaErrorInvalidValue;  // 0.7 million tokens of Llama-3-8B
  return Launch(RopeAppendKernel, BlocksFor(num_pairs), kThreads, 0, stream, params);
}

cudaError_t LaunchSiluMul(const SiluMulParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  return Launch(SiluMulKernel, BlocksFor(params.num_tokens * params.inner), kThreads, 0, stream, params);
}

cudaError_t LaunchEmpty(cudaStream_t stream) { return Launch(EmptyKernel, 1, 32, 0, stream); }

}  // namespace spillway::cuda
