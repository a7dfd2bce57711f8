#pragma once

// TierDirectory: a directory that only its owner can enter and one process at a time writes. OwnedFile: an open file in
// it. Whatever another account could have put there or could read is refused, and no symbolic link is followed.

#include <cstddef>
#include <cstdint>
#include <ctime>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spillway {

// Move-only. Reads and writes come from any thread.
class OwnedFile {
 public:
  explicit OwnedFile(int descriptor) : descriptor_(descriptor) {}
  OwnedFile(OwnedFile&& other) noexcept;
  OwnedFile& operator=(OwnedFile&& other) noexcept;
  OwnedFile(const OwnedFile&) = delete;
  OwnedFile& operator=(const OwnedFile&) = delete;
  ~OwnedFile();

  int descriptor() const { return descriptor_; }

  // How many bytes were read: fewer than asked for only at the end of the file.
  absl::StatusOr<std::size_t> ReadAt(std::int64_t offset, std::span<std::byte> into) const;
  // RESOURCE_EXHAUSTED: no room, and some of the bytes may be written.
  absl::Status WriteAt(std::int64_t offset, std::span<const std::byte> bytes) const;
  absl::Status Resize(std::int64_t size_bytes) const;
  absl::StatusOr<std::int64_t> SizeBytes() const;
  absl::StatusOr<std::int64_t> UsedBytes() const;  // as du counts

 private:
  int descriptor_;
};

class TierDirectory {
 public:
  // Makes the last component if it is absent, and holds the lock until destroyed.
  static absl::StatusOr<TierDirectory> Open(const std::string& path);

  struct BlockFileEntry {
    std::string name;
    std::int64_t used_bytes = 0;
    std::timespec modified{};
  };
  struct Survey {
    std::vector<BlockFileEntry> block_files;  // least recently written first
    std::int64_t other_bytes = 0;             // the directory itself, the lock and what is none of ours
  };
  // FAILED_PRECONDITION: a block file is not ours to trust. Does not look into directories inside.
  absl::StatusOr<Survey> Look() const;

  // Opens a block file, made if absent.
  absl::StatusOr<OwnedFile> OpenBlockFile(const std::string& name) const;
  absl::Status Remove(const std::string& name) const;
  absl::StatusOr<std::int64_t> RoomBytes() const;  // what the file system has left for us

 private:
  TierDirectory(std::string path, OwnedFile directory, OwnedFile lock);

  std::string path_;
  OwnedFile directory_;
  OwnedFile lock_;
};

}  // namespace spillway
