#pragma once

// The bytes of a block file: extents one after another, each a table of kExtentSlots records and then as many payloads.
// The tables make opening quick: one short read finds 64 blocks.
//
//   extent   [record 0 .. record 63][hole][payload 0 .. payload 63]
//   record   256 bytes that say all about one payload, under a checksum of their own
//   payload  one block, padded to whole pages, so that writing one never touches the page of another
//   hole     occupies nothing; puts every payload at a multiple of its size, since page caches keep aligned spans in
//   larger
//            pieces and copy them faster
//
// Slots are counted through all extents. Numbers are little-endian.

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "absl/strings/string_view.h"
#include "kernels/kv_layout.h"
#include "kvstore/block_key.h"

namespace spillway {

using BlockTokens = std::array<std::int32_t, kBlockTokens>;
using SpaceDigest = std::array<std::uint8_t, 32>;

// SHA-256 of what the bytes of blocks mean, their size and the version of this format.
SpaceDigest MakeSpaceDigest(absl::string_view space, std::size_t block_bytes);
std::string BlockFileName(const SpaceDigest& space);  // 64 hex digits and ".blocks"
bool IsBlockFileName(absl::string_view name);

inline constexpr std::size_t kRecordBytes = 256;
inline constexpr std::uint32_t kExtentSlots = 64;

struct BlockRecord {
  BlockKey key;
  BlockTokens tokens{};
  SpaceDigest space{};
  std::uint64_t length = 0;            // of the payload, without its padding
  std::uint64_t stamp = 0;             // grows with every write: the order of use after a restart
  std::uint64_t payload_checksum = 0;  // XXH3-64 over key, tokens, space and payload
};

void EncodeRecord(const BlockRecord& record, std::span<std::byte, kRecordBytes> into);
// nullopt: not a record of this version, or not sound.
std::optional<BlockRecord> DecodeRecord(std::span<const std::byte, kRecordBytes> bytes);

// Where things are in a file of blocks of one size. Any slot number: offsets do not overflow for 2^31 slots of 2^24
// bytes, and MaxSlots keeps them below the budget.
class BlockFileLayout {
 public:
  explicit BlockFileLayout(std::size_t block_bytes);

  std::size_t block_bytes() const { return block_bytes_; }
  std::int64_t extent_bytes() const { return payloads_offset_ + kExtentSlots * stride_; }
  std::int64_t ExtentOffset(std::uint32_t extent) const { return extent * extent_bytes(); }
  std::int64_t RecordOffset(std::uint32_t slot) const;
  std::int64_t PayloadOffset(std::uint32_t slot) const;
  // The file's size with slots [0, num_slots).
  std::int64_t SizeOf(std::uint32_t num_slots) const;

  // The most that a file with slots [0, num_slots) occupies, as du counts: its bytes and the file system's own records
  // of where they are.
  std::int64_t Charge(std::uint32_t num_slots) const;
  // The most slots whose charge fits.
  std::uint32_t MaxSlots(std::int64_t budget_bytes) const;

  static constexpr std::int64_t kTableBytes = kExtentSlots * kRecordBytes;

 private:
  std::size_t block_bytes_;
  std::int64_t stride_;           // payload and padding
  std::int64_t payloads_offset_;  // in an extent
};

}  // namespace spillway
