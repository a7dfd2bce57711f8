#pragma once

// A folder of its own for a test, gone afterwards.

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

#include "tests/support/byte_tokenizer.h"

namespace spillway {

class TempFolder {
 public:
  TempFolder() {
    std::string pattern = ::testing::TempDir() + "/spillway-XXXXXX";
    path_ = ::mkdtemp(pattern.data()) == nullptr ? std::string() : pattern;
    EXPECT_FALSE(path_.empty()) << "no temporary folder at " << pattern;
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }
  std::string File(std::string_view name) const { return path_ + "/" + std::string(name); }
  void Write(std::string_view name, std::string_view bytes) const {
    const absl::Status written = WriteTextFile(File(name), bytes);
    EXPECT_TRUE(written.ok()) << written;
  }

 private:
  std::string path_;
};

}  // namespace spillway
