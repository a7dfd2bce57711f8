#include "kvstore/file_tier_format.h"

#include <openssl/sha.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace spillway {
namespace {

static_assert(std::endian::native == std::endian::little, "records are written as they are in memory");

constexpr std::uint64_t kMagic = 0x314b4c4257504c53;  // "SLPWBLK1"
constexpr std::uint32_t kVersion = 1;
constexpr absl::string_view kSuffix = ".blocks";
constexpr std::int64_t kPageBytes = 4096;
constexpr std::uint32_t kMaxSlots = 1U << 31U;

struct RecordOnDisk {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t zero;
  BlockKey key;
  BlockTokens tokens;
  SpaceDigest space;
  std::uint64_t length;
  std::uint64_t stamp;
  std::uint64_t payload_checksum;
  std::array<std::uint8_t, 80> zeros;
  std::uint64_t checksum;  // XXH3-64 of all before it
};
static_assert(sizeof(RecordOnDisk) == kRecordBytes && offsetof(RecordOnDisk, checksum) == kRecordBytes - 8);

std::uint64_t ChecksumOf(const RecordOnDisk& record) { return XXH3_64bits(&record, offsetof(RecordOnDisk, checksum)); }

}  // namespace

SpaceDigest MakeSpaceDigest(absl::string_view space, std::size_t block_bytes) {
  const std::string named = absl::StrCat(kVersion, " ", block_bytes, " ", space);
  SpaceDigest digest{};
  SHA256(reinterpret_cast<const unsigned char*>(named.data()), named.size(), digest.data());
  return digest;
}

std::string BlockFileName(const SpaceDigest& space) {
  return absl::StrCat(absl::BytesToHexString({reinterpret_cast<const char*>(space.data()), space.size()}), kSuffix);
}

bool IsBlockFileName(absl::string_view name) {
  if (name.size() != 2 * sizeof(SpaceDigest) + kSuffix.size() || !absl::EndsWith(name, kSuffix)) return false;
  name.remove_suffix(kSuffix.size());
  return std::all_of(name.begin(), name.end(), [](char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); });
}

void EncodeRecord(const BlockRecord& record, std::span<std::byte, kRecordBytes> into) {
  RecordOnDisk raw{};
  raw.magic = kMagic;
  raw.version = kVersion;
  raw.key = record.key;
  raw.tokens = record.tokens;
  raw.space = record.space;
  raw.length = record.length;
  raw.stamp = record.stamp;
  raw.payload_checksum = record.payload_checksum;
  raw.checksum = ChecksumOf(raw);
  std::memcpy(into.data(), &raw, sizeof(raw));
}

std::optional<BlockRecord> DecodeRecord(std::span<const std::byte, kRecordBytes> bytes) {
  RecordOnDisk raw;
  std::memcpy(&raw, bytes.data(), sizeof(raw));
  if (raw.magic != kMagic || raw.version != kVersion || raw.checksum != ChecksumOf(raw)) return std::nullopt;
  return BlockRecord{.key = raw.key,
                     .tokens = raw.tokens,
                     .space = raw.space,
                     .length = raw.length,
                     .stamp = raw.stamp,
                     .payload_checksum = raw.payload_checksum};
}

BlockFileLayout::BlockFileLayout(std::size_t block_bytes)
    : block_bytes_(block_bytes),
      stride_((static_cast<std::int64_t>(block_bytes) + kPageBytes - 1) / kPageBytes * kPageBytes),
      payloads_offset_(std::max(kTableBytes, stride_)) {}

std::int64_t BlockFileLayout::RecordOffset(std::uint32_t slot) const {
  return ExtentOffset(slot / kExtentSlots) + static_cast<std::int64_t>(slot % kExtentSlots * kRecordBytes);
}

std::int64_t BlockFileLayout::PayloadOffset(std::uint32_t slot) const {
  return ExtentOffset(slot / kExtentSlots) + payloads_offset_ + slot % kExtentSlots * stride_;
}

std::int64_t BlockFileLayout::SizeOf(std::uint32_t num_slots) const {
  return num_slots == 0 ? 0 : PayloadOffset(num_slots - 1) + stride_;
}

// File systems note extents of a file in at most 12 bytes (ext4), or 16 (XFS), of whole pages each: below 1 / 256 of
// the data even where every single page is an extent of its own. The constant covers the roots of small files.
std::int64_t BlockFileLayout::Charge(std::uint32_t num_slots) const {
  const std::int64_t num_extents = (std::int64_t{num_slots} + kExtentSlots - 1) / kExtentSlots;
  const std::int64_t data_bytes = num_extents * kTableBytes + num_slots * stride_;
  return data_bytes + data_bytes / 256 + 4 * kPageBytes;
}

std::uint32_t BlockFileLayout::MaxSlots(std::int64_t budget_bytes) const {
  std::uint32_t fits = 0;
  std::uint32_t over = static_cast<std::uint32_t>(std::clamp<std::int64_t>(budget_bytes / stride_ + 1, 1, kMaxSlots));
  while (fits + 1 < over) {
    const std::uint32_t middle = fits + (over - fits) / 2;
    (Charge(middle) <= budget_bytes ? fits : over) = middle;
  }
  return fits;
}

}  // namespace spillway
