#include "kvstore/file_tier_budget.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

// Shrinking by less than this would cost a system call per block.
constexpr std::int64_t kShrinkBytes = 64LL << 20U;

}  // namespace

absl::StatusOr<FileTierBudget> FileTierBudget::Make(const TierDirectory& directory, const std::string& own_file,
                                                    std::int64_t budget_bytes) {
  ASSIGN_OR_RETURN(TierDirectory::Survey survey, directory.Look());
  ASSIGN_OR_RETURN(const std::int64_t room_bytes, directory.RoomBytes());
  std::int64_t reusable_bytes = survey.other_bytes;
  for (const TierDirectory::BlockFileEntry& file : survey.block_files) reusable_bytes += file.used_bytes;
  if (room_bytes < budget_bytes - reusable_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("file tier: the budget is ", budget_bytes, " bytes, but the file system has room for ", room_bytes,
                     " beside the ", reusable_bytes, " already there; lower the budget or make room"));
  }
  FileTierBudget budget(directory, budget_bytes);
  budget.other_bytes_ = survey.other_bytes;
  std::erase_if(survey.block_files, [&](const TierDirectory::BlockFileEntry& file) { return file.name == own_file; });
  budget.other_spaces_ = std::move(survey.block_files);
  return budget;
}

bool FileTierBudget::MakeRoom(std::int64_t own_bytes) {
  while (true) {
    std::int64_t over_bytes = own_bytes - ceiling_bytes();
    for (const TierDirectory::BlockFileEntry& file : other_spaces_) over_bytes += file.used_bytes;
    if (over_bytes <= 0) return true;
    if (other_spaces_.empty()) return false;
    if (!ShrinkOldest(std::max(over_bytes, kShrinkBytes)).ok()) {
      // It cannot be had: from now on it counts as what is none of ours.
      other_bytes_ += other_spaces_.front().used_bytes;
      other_spaces_.erase(other_spaces_.begin());
    }
  }
}

absl::Status FileTierBudget::ShrinkOldest(std::int64_t by_bytes) {
  TierDirectory::BlockFileEntry& oldest = other_spaces_.front();
  ASSIGN_OR_RETURN(const OwnedFile file, directory_->OpenBlockFile(oldest.name));
  ASSIGN_OR_RETURN(const std::int64_t size_bytes, file.SizeBytes());
  if (size_bytes > by_bytes) {
    RETURN_IF_ERROR(file.Resize(size_bytes - by_bytes));
    ASSIGN_OR_RETURN(oldest.used_bytes, file.UsedBytes());
    return absl::OkStatus();
  }
  RETURN_IF_ERROR(directory_->Remove(oldest.name));
  other_spaces_.erase(other_spaces_.begin());
  return absl::OkStatus();
}

absl::Status FileTierBudget::RemoveOtherSpaces() {
  while (!other_spaces_.empty()) {
    RETURN_IF_ERROR(directory_->Remove(other_spaces_.back().name));
    other_spaces_.pop_back();
  }
  return absl::OkStatus();
}

}  // namespace spillway
