#pragma once

// The file tier: a directory with a byte budget that outlives the process.
//
// It holds users' prompts: the directory is 0700, its files 0600, opened with O_NOFOLLOW, and one process owns it by a
// lock file. Blocks are written in extents of several; each carries its key, tokens, length and XXH3 checksum. What is
// sound is served again after a restart, if `space` is the same. Nothing is synced: what a crash tore is discarded when
// the directory is opened again, or is DATA_LOSS when it is read.
//
// Clear removes the files of other spaces too.

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "kvstore/tier.h"

namespace spillway {

struct FileTierOptions {
  std::string directory;          // made if absent
  std::int64_t budget_bytes = 0;  // everything under the directory, metadata included
  std::size_t block_bytes = 0;    // of every block
  // What the bytes mean: model digest, KV dtype, block size, compute id and so on, as one string. A directory written
  // for another space keeps its files until the budget takes them, but nothing of it is served.
  std::string space;
  int num_threads = 2;  // one of them may write; with only one, a read may wait for the write of a block
  std::size_t max_pending_bytes = 64U << 20U;  // writes waiting beyond this are declined
};

// INVALID_ARGUMENT: a bad option, named. FAILED_PRECONDITION: another process owns the directory, or it is not ours to
// trust (owner, mode, symbolic link). RESOURCE_EXHAUSTED: the file system has less room than the budget.
absl::StatusOr<std::unique_ptr<Tier>> MakeFileTier(const FileTierOptions& options);

}  // namespace spillway
