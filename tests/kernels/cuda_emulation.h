#pragma once

// Runs our CUDA kernels on the CPU, so that their indexing, synchronisation and arithmetic are tested where no GPU is.
// Force-included (g++ -include) in front of a .cu file that is compiled as C++. Every CUDA thread is a fiber; a fiber
// runs until it meets a barrier or a warp-wide operation, so a missing barrier shows as a wrong result. Blocks run one
// after the other, each with poisoned shared memory; neighbouring launches run their threads in opposite order and do
// their asynchronous copies at the earliest and at the latest moment in turn. Not emulated: timing, caches, memory
// order.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "kernels/tensor.h"

#define SPILLWAY_CUDA_EMULATION 1

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#undef __forceinline__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __grid_constant__

namespace spillway::emulation {

// The running fiber's place.
struct Place {
  uint3 thread;
  uint3 block;
  dim3 block_size;
  dim3 grid_size;
};
extern Place place;

// Runs `thread` once per thread of every block. One launch at a time.
cudaError_t RunGrid(const void* kernel, unsigned num_ctas, unsigned num_threads, std::size_t shared_bytes,
                    const std::function<void()>& thread);

// Does `work` at once, or records it where the stream records a graph.
cudaError_t Queue(cudaStream_t stream, std::function<cudaError_t()> work);

std::byte* SharedMemory();
void SyncBlock();

// All lanes of `mask` put in `size` bytes (at most 32) and see each other's.
class Meeting {
 public:
  Meeting(unsigned mask, const void* value, std::size_t size);
  ~Meeting();
  template <typename T>
  T Of(unsigned lane) const {
    T value;
    std::memcpy(&value, Slot(lane % 32), sizeof(T));
    return value;
  }

 private:
  const std::byte* Slot(unsigned lane) const;
  int index_;
};

unsigned Lane();
void CopyAsync(std::byte* to, const std::byte* from, int num_bytes, bool is_valid);
void CommitCopies();
void AwaitCopies(int pending);

// A barrier in shared memory (kernels/cuda/bulk_copy.cuh).
struct Barrier {
  std::int32_t missing_bytes;  // announced and not come; negative: come and not announced yet
  std::uint8_t num_arrivals;
  std::uint8_t missing_arrivals;
  std::uint8_t parity;  // of the phase that goes on
  std::uint8_t is_set_up;
};
static_assert(sizeof(Barrier) == 8);
void InitBarrier(Barrier& barrier, int num_arrivals);
void Arrive(Barrier& barrier, int num_bytes);
void AwaitPhase(Barrier& barrier, int parity);
void CopyBulk(std::byte* to, const std::byte* from, int num_bytes, Barrier& barrier);
void CopyBox(std::byte* to, const CUtensorMap& map, const int (&at)[4], Barrier& barrier);
// In place of cuTensorMapEncodeTiled: 4 dimensions, swizzled by 128 bytes.
CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                     const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                     CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                     CUtensorMapFloatOOBfill fill);
// Whether this launch does what is asynchronous as late as allowed, not as early.
bool IsLazy();

}  // namespace spillway::emulation

#define threadIdx (::spillway::emulation::place.thread)
#define blockIdx (::spillway::emulation::place.block)
#define blockDim (::spillway::emulation::place.block_size)
#define gridDim (::spillway::emulation::place.grid_size)

inline void __syncthreads() { spillway::emulation::SyncBlock(); }
inline void __syncwarp(unsigned mask = 0xffffffffU) { const spillway::emulation::Meeting meeting(mask, "", 0); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  const spillway::emulation::Meeting meeting(mask, &value, sizeof(T));
  return meeting.Of<T>(static_cast<unsigned>(lane));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const spillway::emulation::Meeting meeting(mask, &value, sizeof(T));
  const unsigned lane = spillway::emulation::Lane();
  return lane < delta ? value : meeting.Of<T>(lane - delta);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  const spillway::emulation::Meeting meeting(mask, &value, sizeof(T));
  return meeting.Of<T>(spillway::emulation::Lane() ^ static_cast<unsigned>(bits));
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const spillway::emulation::Meeting meeting(mask, &predicate, sizeof(predicate));
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1U) != 0 && meeting.Of<bool>(lane)) ballot |= 1U << lane;
  }
  return ballot;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline unsigned __match_any_sync(unsigned mask, unsigned value) {
  const spillway::emulation::Meeting meeting(mask, &value, sizeof(value));
  unsigned peers = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1U) != 0 && meeting.Of<unsigned>(lane) == value) peers |= 1U << lane;
  }
  return peers;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const spillway::emulation::Meeting meeting(mask, &value, sizeof(value));
  unsigned sum = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1U) != 0) sum += meeting.Of<unsigned>(lane);
  }
  return sum;
}

// Fibers never interrupt each other.
template <typename T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = static_cast<T>(old + value);
  return old;
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at = old | value;
  return old;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<unsigned>(value)); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }

// The functions of kernels/cuda/intrinsics.cuh; see there for what they mean.
namespace spillway::cuda {

inline std::byte* DynamicShared() { return emulation::SharedMemory(); }

inline std::uint32_t MatrixWord(const std::byte* low, const std::byte* high) {
  std::uint16_t halves[2];
  std::memcpy(&halves[0], low, 2);
  std::memcpy(&halves[1], high, 2);
  return halves[0] | std::uint32_t{halves[1]} << 16;
}
inline void LoadMatrices(std::uint32_t (&out)[4], const std::byte* row) {
  const emulation::Meeting meeting(0xffffffffU, &row, sizeof(row));
  const unsigned lane = emulation::Lane();
  for (unsigned i = 0; i < 4; ++i) {
    const auto* const at = meeting.Of<const std::byte*>(i * 8 + lane / 4) + lane % 4 * 4;
    out[i] = MatrixWord(at, at + 2);
  }
}
inline void LoadMatricesTransposed(std::uint32_t (&out)[4], const std::byte* row) {
  const emulation::Meeting meeting(0xffffffffU, &row, sizeof(row));
  const unsigned lane = emulation::Lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned first = i * 8 + lane % 4 * 2;
    out[i] = MatrixWord(meeting.Of<const std::byte*>(first) + lane / 4 * 2,
                        meeting.Of<const std::byte*>(first + 1) + lane / 4 * 2);
  }
}
template <DType kType>
float HalfOf(std::uint32_t word, unsigned half) {
  const auto bits = static_cast<std::uint16_t>(half == 0 ? word : word >> 16);
  return kType == DType::kBF16 ? FloatFromBF16(bits) : FloatFromF16(bits);
}
template <DType kType>
void MultiplyAdd(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  const std::uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const emulation::Meeting meeting(0xffffffffU, mine, sizeof(mine));
  struct Words {
    std::uint32_t v[6];
  };
  const unsigned lane = emulation::Lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8;
    const unsigned column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (unsigned k = 0; k < 16; ++k) {
      const Words left = meeting.Of<Words>(row % 8 * 4 + k % 8 / 2);
      const Words right = meeting.Of<Words>(column * 4 + k % 8 / 2);
      sum += double{HalfOf<kType>(left.v[row / 8 + k / 8 * 2], k % 2)} * HalfOf<kType>(right.v[4 + k / 8], k % 2);
    }
    c[i] = static_cast<float>(c[i] + sum);
  }
}
template <DType kType>
std::uint32_t PackPair(float low, float high) {
  const auto round = [](float value) -> std::uint32_t {
    if (value != value) return 0x7fffU;  // the canonical NaN
    return kType == DType::kBF16 ? BF16FromFloat(value) : F16FromFloat(value);
  };
  return round(low) | round(high) << 16;
}
inline float Exp2Hardware(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126F ? 0.0F : y;  // .ftz
}
inline void CopyAsync(std::byte* to, const std::byte* from, bool is_valid) {
  emulation::CopyAsync(to, from, 16, is_valid);
}
inline void CopyAsync(float& to, const float& from) {
  emulation::CopyAsync(reinterpret_cast<std::byte*>(&to), reinterpret_cast<const std::byte*>(&from), 4, true);
}
inline int ThreadAnew() { return static_cast<int>(threadIdx.x); }
inline void CopyAsync(std::byte* to, const std::byte* from) { emulation::CopyAsync(to, from, 16, true); }
inline void CommitCopies() { emulation::CommitCopies(); }
template <int kPending>
void AwaitCopies() {
  emulation::AwaitCopies(kPending);
}

// The functions of kernels/cuda/bulk_copy.cuh.
using emulation::AwaitPhase;
using emulation::Barrier;
using emulation::CopyBulk;
using emulation::InitBarrier;
inline void Arrive(Barrier& barrier) { emulation::Arrive(barrier, 0); }
inline void ArriveExpecting(Barrier& barrier, int num_bytes) { emulation::Arrive(barrier, num_bytes); }
inline void FenceShared() {}
inline void PrefetchMap(const CUtensorMap& /*map*/) {}
inline void CopyBox(std::byte* to, const CUtensorMap& map, int strip, int column, Barrier& barrier) {
  emulation::CopyBox(to, map, {0, 0, column, strip}, barrier);
}
inline void CopyBoxOnce(std::byte* to, const CUtensorMap& map, int strip, int column, Barrier& barrier) {
  CopyBox(to, map, strip, column, barrier);
}
inline uint4 LoadOnce(const std::byte* from) { return *reinterpret_cast<const uint4*>(from); }

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), unsigned num_ctas, unsigned num_threads, std::size_t shared_bytes,
                   cudaStream_t stream, Args... args) {
  return emulation::Queue(stream, [=] {
    return emulation::RunGrid(reinterpret_cast<const void*>(kernel), num_ctas, num_threads, shared_bytes,
                              [&] { kernel(static_cast<Params>(args)...); });
  });
}

}  // namespace spillway::cuda

#include "tests/kernels/cuda_emulated_wgmma.h"
