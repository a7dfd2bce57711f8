#pragma once

// A layer of the pool of blocks as the copy engine sees it (bulk_copy.cuh).

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "kernels/cuda/launch.h"

namespace spillway::cuda {

// Bytes of a strip's rows that lie side by side in shared memory.
inline constexpr int kColumnBytes = 128;

// Strip b * (block_bytes / strip_bytes) + h is the one of kv head h in block b. A box is num_columns columns of 128
// bytes of a strip's 16 rows: of head_dim 128 in 16 bits K has the columns 0 and 1, V 2 and 3. In shared memory a
// column is 16 rows of 128 bytes, and of row r the 16-byte piece p lies at p ^ (r & 7). Rows are a whole number of
// columns, block_bytes of strips; the pool is 16-byte aligned. cudaErrorNotSupported: the driver has no such maps.
cudaError_t EncodeStrips(const KvLayer& kv, int num_columns, CUtensorMap* map);

}  // namespace spillway::cuda
