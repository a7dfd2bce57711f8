// Seeded damage to valid checkpoints: an error or a checkpoint whose tensors lie inside the file, never anything else.

#include <gtest/gtest.h>

#include <cstddef>
#include <memory>
#include <string>

#include "engine/safetensors.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/mutate.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

// Touches every byte that the checkpoint hands out, which the address sanitizer watches only through the mapping's end.
void TouchAll(const Checkpoint& checkpoint, std::size_t file_bytes) {
  int sum = 0;
  std::size_t total = 0;
  for (const std::string& name : checkpoint.Names()) {
    const auto view = checkpoint.Find(name);
    if (!view.ok()) continue;
    std::uint64_t count = SizeOf(view->dtype);
    for (const std::int64_t dimension : view->shape) count *= static_cast<std::uint64_t>(dimension);
    EXPECT_EQ(count, view->size_bytes);
    for (std::size_t i = 0; i < view->size_bytes; ++i) sum += std::to_integer<int>(view->data[i]);
    checkpoint.Release(*view);
    total += view->size_bytes;
  }
  EXPECT_LE(total, file_bytes);
  EXPECT_GE(sum, 0);
}

std::vector<NamedTensor> SmallTensors() {
  return {
      {"a", DType::kF32, {2, 3}, {0, 1, 2, 3, 4, 5}}, {"b", DType::kBF16, {3}, {1, 2, 3}}, {"c", DType::kF16, {0}, {}}};
}

TEST(FuzzSafetensors, DamagedFiles) {
  const std::string valid = SafetensorsBytes(SmallTensors());
  const TempFolder folder;
  Mutator mutator(1);
  int num_accepted = 0;
  for (int round = 0; round < 6000; ++round) {
    // Mostly the header, else nothing but tensor data would be hit.
    const std::string bytes = round % 8 == 0
                                  ? mutator.Bytes(valid)
                                  : mutator.Bytes(valid.substr(0, valid.size() - 30)) + valid.substr(valid.size() - 30);
    folder.Write("model.safetensors", bytes);
    const auto checkpoint = Checkpoint::Open(folder.path());
    if (!checkpoint.ok()) continue;
    ++num_accepted;
    TouchAll(**checkpoint, bytes.size());
  }
  EXPECT_GT(num_accepted, 0);
}

TEST(FuzzSafetensors, DamagedHeadersOfTheRightLength) {
  const std::string valid = SafetensorsBytes(SmallTensors());
  std::uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | static_cast<unsigned char>(valid[i]);
  const auto header = nlohmann::json::parse(valid.substr(8, header_bytes));
  const TempFolder folder;
  Mutator mutator(2);
  for (int round = 0; round < 4000; ++round) {
    const std::string text = mutator.Document(header).dump();
    std::string bytes(8, '\0');
    for (int i = 0; i < 8; ++i) bytes[i] = static_cast<char>(text.size() >> (8 * i));
    bytes += text + valid.substr(8 + header_bytes);
    folder.Write("model.safetensors", bytes);
    const auto checkpoint = Checkpoint::Open(folder.path());
    if (checkpoint.ok()) TouchAll(**checkpoint, bytes.size());
  }
}

TEST(FuzzSafetensors, DamagedIndexes) {
  const TempFolder folder;
  ASSERT_TRUE(WriteCheckpoint(folder.path(), "{}", SmallTensors(), 2).ok());
  std::ifstream file(folder.File("model.safetensors.index.json"));
  const auto index = nlohmann::json::parse(file);
  Mutator mutator(3);
  for (int round = 0; round < 2000; ++round) {
    folder.Write("model.safetensors.index.json",
                 round % 2 == 0 ? mutator.Bytes(index.dump()) : mutator.Document(index).dump());
    const auto checkpoint = Checkpoint::Open(folder.path());
    if (checkpoint.ok()) TouchAll(**checkpoint, 1 << 16);
  }
}

}  // namespace
}  // namespace spillway
