#pragma once

// A directory of a test's own, blocks whose bytes follow from their number, and calls that wait.

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <latch>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kvstore/file_tier.h"
#include "kvstore/file_tier_format.h"
#include "tests/support/temp_folder.h"

namespace spillway {

inline BlockKey KeyOf(std::uint64_t number) {
  BlockKey key;
  const std::uint64_t mixed = (number + 1) * 0x9e3779b97f4a7c15ULL;
  std::memcpy(key.bytes.data(), &mixed, sizeof(mixed));
  std::memcpy(key.bytes.data() + sizeof(mixed), &number, sizeof(number));
  return key;
}

inline BlockTokens TokensOf(std::uint64_t number) {
  BlockTokens tokens{};
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(number * 16 + i);
  return tokens;
}

inline std::vector<std::byte> BytesOf(std::uint64_t number, std::size_t size_bytes) {
  std::vector<std::byte> bytes(size_bytes);
  std::uint64_t state = number + 1;
  for (std::size_t i = 0; i < size_bytes; i += sizeof(state)) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    std::memcpy(bytes.data() + i, &state, std::min(sizeof(state), size_bytes - i));
  }
  return bytes;
}

inline absl::Status PutAndWait(Tier& tier, std::uint64_t number, const std::vector<std::byte>& bytes) {
  std::latch done(1);
  absl::Status result;
  tier.Put(KeyOf(number), TokensOf(number), bytes, [&](absl::Status status) {
    result = std::move(status);
    done.count_down();
  });
  done.wait();
  return result;
}

inline absl::Status GetAndWait(Tier& tier, std::uint64_t number, std::vector<std::byte>& into) {
  std::latch done(1);
  absl::Status result;
  tier.Get(KeyOf(number), TokensOf(number), into, [&](absl::Status status) {
    result = std::move(status);
    done.count_down();
  });
  done.wait();
  return result;
}

class FileTierFixture : public ::testing::Test {
 protected:
  FileTierFixture() {
    options_ = {.directory = root_ + "/tier", .budget_bytes = 1 << 20, .block_bytes = 4096, .space = "a model"};
  }

  std::unique_ptr<Tier> Open() const {
    absl::StatusOr<std::unique_ptr<Tier>> tier = MakeFileTier(options_);
    EXPECT_TRUE(tier.ok()) << tier.status();
    return tier.ok() ? *std::move(tier) : nullptr;
  }
  absl::Status TryOpen() const { return MakeFileTier(options_).status(); }

  std::vector<std::byte> Bytes(std::uint64_t number) const { return BytesOf(number, options_.block_bytes); }
  absl::Status Put(Tier& tier, std::uint64_t number) const { return PutAndWait(tier, number, Bytes(number)); }
  // The bytes of a block that is served are right; the status tells whether it was.
  absl::Status Get(Tier& tier, std::uint64_t number) const {
    std::vector<std::byte> into(options_.block_bytes);
    absl::Status status = GetAndWait(tier, number, into);
    if (status.ok()) {
      EXPECT_TRUE(into == Bytes(number)) << "wrong bytes of block " << number;
    }
    return status;
  }

  std::string BlockFilePath() const {
    return options_.directory + "/" + BlockFileName(MakeSpaceDigest(options_.space, options_.block_bytes));
  }
  static std::string ReadWhole(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // In place: truncating to nothing first makes ext4 flush the file at every close.
  static void WriteWhole(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary | std::ios::app);
    std::fstream(path, std::ios::binary | std::ios::in | std::ios::out) << content;
    std::filesystem::resize_file(path, content.size());
  }

  // As du counts: the directory and what is in it.
  std::int64_t DiskUsage() const {
    struct stat stat {};
    EXPECT_EQ(::stat(options_.directory.c_str(), &stat), 0);
    std::int64_t used_bytes = stat.st_blocks * 512;
    for (const auto& entry : std::filesystem::directory_iterator(options_.directory)) {
      EXPECT_EQ(::lstat(entry.path().c_str(), &stat), 0);
      used_bytes += stat.st_blocks * 512;
    }
    return used_bytes;
  }
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(options_.directory)) {
      names.push_back(entry.path().filename().string());
    }
    return names;
  }

  static int OpenDescriptors() {
    int count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
    return count;
  }

  const TempFolder folder_;
  const std::string& root_ = folder_.path();
  FileTierOptions options_;
};

}  // namespace spillway
