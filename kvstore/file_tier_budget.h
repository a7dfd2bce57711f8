#pragma once

// FileTierBudget: what a tier's directory may occupy, and who gives way. Block files of other spaces stay until this
// space needs their bytes, then shrink from their ends, the least recently written first; what is not a block file is
// counted and left alone.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvstore/file_tier_directory.h"

namespace spillway {

// One thread at a time. `directory` outlives it.
class FileTierBudget {
 public:
  // RESOURCE_EXHAUSTED: the file system has less room than the budget.
  static absl::StatusOr<FileTierBudget> Make(const TierDirectory& directory, const std::string& own_file,
                                             std::int64_t budget_bytes);

  // The most that our own file can ever occupy.
  std::int64_t ceiling_bytes() const { return budget_bytes_ - other_bytes_; }
  // True: our own file may occupy this much now.
  bool MakeRoom(std::int64_t own_bytes);
  absl::Status RemoveOtherSpaces();

 private:
  FileTierBudget(const TierDirectory& directory, std::int64_t budget_bytes)
      : directory_(&directory), budget_bytes_(budget_bytes) {}
  absl::Status ShrinkOldest(std::int64_t by_bytes);

  const TierDirectory* directory_;
  std::int64_t budget_bytes_;
  std::int64_t other_bytes_ = 0;
  std::vector<TierDirectory::BlockFileEntry> other_spaces_;
};

}  // namespace spillway
