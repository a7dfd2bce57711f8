#include "kvstore/file_tier_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/string_view.h"
#include "kernels/status_macros.h"
#include "kvstore/file_tier_format.h"

namespace spillway {
namespace {

constexpr char kLockName[] = "lock";
constexpr std::int64_t kStatBlockBytes = 512;  // st_blocks counts these, whatever the file system's blocks are

absl::Status ErrorOf(int error, absl::string_view what) {
  if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
    return absl::ResourceExhaustedError(absl::StrCat("file tier: ", what, ": no room (errno ", error, ")"));
  }
  return absl::ErrnoToStatus(error, absl::StrCat("file tier: ", what));
}

absl::Status Distrust(absl::string_view path, absl::string_view why) {
  return absl::FailedPreconditionError(absl::StrCat("file tier: ", path, " ", why));
}

// Only whom we run as may have made it, be able to change it and be able to read it. Wrong modes are refused and not
// mended: it has been open to others already.
absl::Status TrustFile(const struct stat& stat, absl::string_view path) {
  if (!S_ISREG(stat.st_mode)) return Distrust(path, "is not a regular file; remove it");
  if (stat.st_uid != ::geteuid()) return Distrust(path, "belongs to another user; remove it");
  if ((stat.st_mode & 07777U) != 0600) {
    return Distrust(path, absl::StrFormat("has mode %04o, wanted 0600; remove it", stat.st_mode & 07777U));
  }
  if (stat.st_nlink != 1) return Distrust(path, "has another name (hard link); remove it");
  return absl::OkStatus();
}

absl::Status TrustDirectory(const struct stat& stat, absl::string_view path) {
  if (stat.st_uid != ::geteuid()) return Distrust(path, "belongs to another user");
  if ((stat.st_mode & 0777U) != 0700) {
    return Distrust(path, absl::StrFormat("has mode %04o; it holds users' prompts: chmod 0700", stat.st_mode & 07777U));
  }
  return absl::OkStatus();
}

absl::StatusOr<OwnedFile> OpenFileIn(const OwnedFile& directory, const char* name, absl::string_view path) {
  OwnedFile file(
      ::openat(directory.descriptor(), name, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0600));
  if (file.descriptor() < 0) {
    if (errno == ELOOP) return Distrust(path, "is a symbolic link; remove it");
    return ErrorOf(errno, absl::StrCat("open ", path));
  }
  struct stat stat {};
  if (::fstat(file.descriptor(), &stat) != 0) return ErrorOf(errno, absl::StrCat("stat ", path));
  RETURN_IF_ERROR(TrustFile(stat, path));
  return file;
}

bool IsOlder(const TierDirectory::BlockFileEntry& a, const TierDirectory::BlockFileEntry& b) {
  return std::pair(a.modified.tv_sec, a.modified.tv_nsec) < std::pair(b.modified.tv_sec, b.modified.tv_nsec);
}

}  // namespace

OwnedFile::OwnedFile(OwnedFile&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}

OwnedFile& OwnedFile::operator=(OwnedFile&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  return *this;
}

OwnedFile::~OwnedFile() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

absl::StatusOr<std::size_t> OwnedFile::ReadAt(std::int64_t offset, std::span<std::byte> into) const {
  std::size_t total = 0;
  while (total < into.size()) {
    const ssize_t got =
        ::pread(descriptor_, into.data() + total, into.size() - total, offset + static_cast<std::int64_t>(total));
    if (got == 0) break;
    if (got > 0) {
      total += static_cast<std::size_t>(got);
    } else if (errno != EINTR) {
      return ErrorOf(errno, "read");
    }
  }
  return total;
}

absl::Status OwnedFile::WriteAt(std::int64_t offset, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t put = ::pwrite(descriptor_, bytes.data(), bytes.size(), offset);
    if (put >= 0) {
      bytes = bytes.subspan(static_cast<std::size_t>(put));
      offset += put;
    } else if (errno != EINTR) {
      return ErrorOf(errno, "write");
    }
  }
  return absl::OkStatus();
}

absl::Status OwnedFile::Resize(std::int64_t size_bytes) const {
  while (::ftruncate(descriptor_, size_bytes) != 0) {
    if (errno != EINTR) return ErrorOf(errno, "resize");
  }
  return absl::OkStatus();
}

absl::StatusOr<std::int64_t> OwnedFile::SizeBytes() const {
  struct stat stat {};
  if (::fstat(descriptor_, &stat) != 0) return ErrorOf(errno, "stat");
  return stat.st_size;
}

absl::StatusOr<std::int64_t> OwnedFile::UsedBytes() const {
  struct stat stat {};
  if (::fstat(descriptor_, &stat) != 0) return ErrorOf(errno, "stat");
  return stat.st_blocks * kStatBlockBytes;
}

TierDirectory::TierDirectory(std::string path, OwnedFile directory, OwnedFile lock)
    : path_(std::move(path)), directory_(std::move(directory)), lock_(std::move(lock)) {}

absl::StatusOr<TierDirectory> TierDirectory::Open(const std::string& given) {
  std::string path = given;
  // With a slash behind it, a symbolic link would be followed in spite of O_NOFOLLOW.
  while (path.size() > 1 && path.back() == '/') path.pop_back();
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return absl::FailedPreconditionError(ErrorOf(errno, absl::StrCat("make directory ", path)).message());
  }
  OwnedFile directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  if (directory.descriptor() < 0) {
    if (errno == ENOTDIR || errno == ELOOP) return Distrust(path, "is a symbolic link or not a directory");
    return absl::FailedPreconditionError(ErrorOf(errno, absl::StrCat("open ", path)).message());
  }
  struct stat stat {};
  if (::fstat(directory.descriptor(), &stat) != 0) return ErrorOf(errno, absl::StrCat("stat ", path));
  RETURN_IF_ERROR(TrustDirectory(stat, path));

  ASSIGN_OR_RETURN(OwnedFile lock, OpenFileIn(directory, kLockName, absl::StrCat(path, "/", kLockName)));
  if (::flock(lock.descriptor(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) return Distrust(path, "is in use by another process");
    return ErrorOf(errno, absl::StrCat("lock ", path));
  }
  return TierDirectory(std::move(path), std::move(directory), std::move(lock));
}

absl::StatusOr<TierDirectory::Survey> TierDirectory::Look() const {
  Survey survey;
  ASSIGN_OR_RETURN(survey.other_bytes, directory_.UsedBytes());
  // A descriptor of its own, since reading entries moves its offset and closing the list closes it.
  const int listed = ::openat(directory_.descriptor(), ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const std::unique_ptr<DIR, int (*)(DIR*)> entries(listed < 0 ? nullptr : ::fdopendir(listed), ::closedir);
  if (entries == nullptr) return ErrorOf(errno, absl::StrCat("list ", path_));
  while (const dirent* entry = ::readdir(entries.get())) {
    const std::string name = entry->d_name;
    if (name == "." || name == "..") continue;
    struct stat stat {};
    if (::fstatat(directory_.descriptor(), name.c_str(), &stat, AT_SYMLINK_NOFOLLOW) != 0) {
      return ErrorOf(errno, absl::StrCat("stat ", path_, "/", name));
    }
    const std::int64_t used_bytes = stat.st_blocks * kStatBlockBytes;
    if (!IsBlockFileName(name)) {
      survey.other_bytes += used_bytes;
      continue;
    }
    RETURN_IF_ERROR(TrustFile(stat, absl::StrCat(path_, "/", name)));
    survey.block_files.push_back({.name = name, .used_bytes = used_bytes, .modified = stat.st_mtim});
  }
  std::sort(survey.block_files.begin(), survey.block_files.end(), IsOlder);
  return survey;
}

absl::StatusOr<OwnedFile> TierDirectory::OpenBlockFile(const std::string& name) const {
  return OpenFileIn(directory_, name.c_str(), absl::StrCat(path_, "/", name));
}

absl::Status TierDirectory::Remove(const std::string& name) const {
  if (::unlinkat(directory_.descriptor(), name.c_str(), 0) == 0) return absl::OkStatus();
  return ErrorOf(errno, absl::StrCat("remove ", path_, "/", name));
}

absl::StatusOr<std::int64_t> TierDirectory::RoomBytes() const {
  struct statvfs stat {};
  if (::fstatvfs(directory_.descriptor(), &stat) != 0) return ErrorOf(errno, absl::StrCat("statvfs ", path_));
  return static_cast<std::int64_t>(stat.f_bavail) * static_cast<std::int64_t>(stat.f_frsize);
}

}  // namespace spillway
