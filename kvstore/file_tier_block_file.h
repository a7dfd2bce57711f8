#pragma once

// BlockFile: the slots of one open block file, written and read. It knows bytes and records; which slot holds what, and
// who may touch it, is FileTierIndex's and its owner's.
//
// Nothing is synced. After a kill or a power cut a record counts only if its checksum holds, and a payload only if the
// record's checksum of it does, so that the order in which pages reach the disk does not matter.

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kvstore/file_tier_directory.h"
#include "kvstore/file_tier_format.h"

namespace spillway {

class BlockFile {
 public:
  // `file`'s content may be anything.
  BlockFile(OwnedFile file, const BlockFileLayout& layout, const SpaceDigest& space)
      : file_(std::move(file)), layout_(layout), space_(space) {}

  struct Found {
    BlockRecord record;
    std::uint32_t slot = 0;
  };
  // Slots [0, max_slots) with a sound record of this space and a payload inside the file. Drops all behind the last of
  // them.
  absl::StatusOr<std::vector<Found>> Scan(std::uint32_t max_slots);

  // Fills in the record's space, length and payload checksum. The slot is nobody else's until done; where this fails,
  // it holds no sound record. One thread at a time.
  absl::Status Write(std::uint32_t slot, BlockRecord& record, std::span<const std::byte> payload);

  // DATA_LOSS: not the bytes that were written. Others: I/O errors.
  absl::Status Read(std::uint32_t slot, const BlockKey& key, const BlockTokens& tokens, std::uint64_t payload_checksum,
                    std::span<std::byte> into) const;

  // No record of the slot will be found again.
  absl::Status Erase(std::uint32_t slot) const;

 private:
  OwnedFile file_;
  BlockFileLayout layout_;
  SpaceDigest space_;
  std::int64_t size_bytes_ = 0;
};

}  // namespace spillway
