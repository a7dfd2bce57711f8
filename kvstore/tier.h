#pragma once

// Tier: a place below the host tier where the bytes of blocks leave the process (file; later remote). Advisory: it may
// decline and it may lose, but it never lies: key, tokens, length and checksum are checked on every read, and any doubt
// is a miss. Asynchronous: `done` runs once, on a thread of the tier, and must not block. No exception crosses.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

#include "absl/status/status.h"
#include "kvstore/block_key.h"

namespace spillway {

// Counters since start; residency now.
struct TierStats {
  std::int64_t hits = 0;      // blocks read and found sound
  std::int64_t misses = 0;    // blocks asked for and not there
  std::int64_t declined = 0;  // blocks that were offered and found no room
  std::int64_t skipped = 0;   // blocks that were offered and not seen often enough
  std::int64_t evictions = 0;
  std::int64_t checksum_failures = 0;
  std::int64_t failures = 0;       // I/O errors
  std::int64_t read_failures = 0;  // of these, in reads
  std::int64_t read_bytes = 0;
  std::int64_t written_bytes = 0;
  double read_seconds = 0;
  double write_seconds = 0;
  std::int64_t in_flight = 0;         // operations
  std::int64_t reads_in_flight = 0;   // of these
  std::int64_t fetches_declined = 0;  // blocks on their way up from the tier below that found no room here
  std::int64_t resident_blocks = 0;
  std::int64_t resident_bytes = 0;
  std::int64_t capacity_blocks = 0;
  std::int64_t capacity_bytes = 0;
  std::int64_t bookkeeping_bytes = 0;  // memory beside the blocks' own bytes
};

// Any thread. The destructor waits for what is in flight.
class Tier {
 public:
  virtual ~Tier() = default;

  virtual std::string_view name() const = 0;  // the metric label: "file"

  // Whether a Get is worth trying. Fast, in memory; the answer may be out of date.
  virtual bool Contains(const BlockKey& key, std::span<const std::int32_t> tokens) const = 0;

  // `bytes` stay alive and unchanged until done. OK also where the block is there already. RESOURCE_EXHAUSTED:
  // declined.
  virtual void Put(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<const std::byte> bytes,
                   std::function<void(absl::Status)> done) = 0;

  // Fills `into`, which stays alive until done; its content means nothing unless OK.
  //   NOT_FOUND  not there     DATA_LOSS  there, but not sound: it is gone now
  virtual void Get(const BlockKey& key, std::span<const std::int32_t> tokens, std::span<std::byte> into,
                   std::function<void(absl::Status)> done) = 0;

  // Forgets every block.
  virtual void Clear() = 0;

  virtual TierStats stats() const = 0;
};

}  // namespace spillway
