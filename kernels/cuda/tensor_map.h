#pragma once

// A layer of the pool of blocks as the copy engine sees it (bulk_copy.cuh).

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/launch.h"

namespace spillway::cuda {

// Bytes of a strip's rows that lie side by side in shared memory.
inline constexpr int kColumnBytes = 128;

// Elements of 16 bits, whatever they mean, in four dimensions, of which the first is contiguous; a box of it is what
// one copy brings, 64 elements wide. In shared memory a box is rows of 128 bytes, and of row r the 16-byte piece p lies
// at p ^ (r & 7). Base and strides are 16-byte aligned.
struct Tensor {
  std::byte* base;
  cuuint64_t sizes[4];
  cuuint64_t strides[3];  // bytes, of the second dimension and on, in any order
  cuuint32_t box[4];
};
inline constexpr cuuint64_t kNoEnd = 0x7fffffff;  // as a size: what is asked for is there
// cudaErrorNotSupported: the driver has no such maps.
cudaError_t EncodeTensor(const Tensor& tensor, CUtensorMap* map);

// Strip b * (block_bytes / strip_bytes) + h is the one of kv head h in block b. A box is num_columns columns of 128
// bytes of a strip's 16 rows: of head_dim 128 in 16 bits K has the columns 0 and 1, V 2 and 3. In shared memory a
// column is 16 rows. Rows are a whole number of columns, block_bytes of strips.
cudaError_t EncodeStrips(const KvLayer& kv, int num_columns, CUtensorMap* map);

}  // namespace spillway::cuda
