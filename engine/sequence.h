#pragma once

// Sequence: one request's tokens, counters and blocks. Its state is its counters:
//
//   tokens  [0, num_prompt) given, [num_prompt, size) sampled and reported
//   KV      [0, num_published * 16) findable; [.., num_computed) written; [num_computed, num_blocks() * 16) reserved
//   blocks  [0, num_home) at home only, [num_home, num_blocks()) on the device; [0, home.size()) have a home copy, be
//   it
//           one that is being made
//
// A loading sequence waits for restores of blocks [num_published, num_blocks()). A running sequence computes
// [num_computed, size); the step that reaches size samples the next token. A split one, while it has restores, computes
// up to load_begin only; then what has come up soundly counts as computed. Preemption sets num_computed to 0 and keeps
// the tokens: what was sampled is computed again as prompt, never sampled again.
//
// Its rank among others is (rank, arrival), lower first. Engine thread only.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/request.h"
#include "kernels/kernels.h"
#include "kvstore/block_key.h"
#include "kvstore/block_pool.h"
#include "kvstore/kv_store.h"

namespace spillway {

// The queue of the Scheduler that holds it.
enum class Place : std::uint8_t { kWaiting, kFresh, kHeld, kAwaiting, kLoading, kReady, kRunning };

inline constexpr std::int32_t kSegmentBlocks = kSegmentTokens / kBlockTokens;

inline std::int32_t BlocksFor(std::int32_t num_tokens) { return (num_tokens + kBlockTokens - 1) / kBlockTokens; }

// Layer inputs of one block, in a host slot that it may share with its neighbours.
struct KeptInputs {
  std::shared_ptr<HomeBlock> slot;  // null: they are not kept
  std::byte* bytes = nullptr;
};

struct Sequence {
  SequenceRequest request;
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> banned_until_min;    // end and stop tokens; not sampled before min_tokens outputs
  std::vector<BlockRef> blocks;                  // on the device
  std::vector<std::shared_ptr<HomeBlock>> home;  // of long sequences, see HomeKeeper
  std::int32_t num_home = 0;                     // blocks; whole segments
  std::vector<KeptInputs> inputs;                // by block, see HomeKeeper; complete where all its rows are computed
  std::vector<BlockKey> keys;                    // of the full blocks of `tokens`, grown as they fill
  std::int32_t num_prompt = 0;
  std::int32_t num_computed = 0;
  std::int32_t num_published = 0;  // blocks
  std::int32_t num_planned = 0;    // tokens in the step being planned or run
  std::int32_t num_claimed = 0;    // keys [num_published, num_claimed) are announced as being computed
  std::int32_t load_begin = 0;     // while blocks are coming up: the first of them; those before are computed
  std::vector<std::shared_ptr<Restoring>> restoring;  // of blocks [load_begin, blocks), one each
  // Copies of the last computed blocks, unpublished, whose bytes the next step brings up while it computes.
  std::vector<std::shared_ptr<HomeBlock>> arriving;
  Place place = Place::kWaiting;
  std::int32_t rank = 0;           // the request's priority where the policy heeds it, else 0
  std::uint64_t arrival = 0;       // 1, 2, ... in order of arrival
  BlockKey awaited;                // while awaiting: the last block of its prefix that is being computed
  double refused_at = 0;           // while waiting: when it was first refused for lack of room; 0: it was not
  std::int64_t num_lacking = 0;    // while waiting, after it found no room: available blocks it takes to look again
  std::int64_t seen_resident = 0;  // while held: tokens that the device tier had of its prefix when it was looked at
  std::int64_t seen_below = 0;     // and tokens after these that lower tiers had
  bool was_scheduled = false;

  // Seconds on the engine's clock; 0 = not yet.
  double submitted_at = 0;
  double scheduled_at = 0;
  double first_token_at = 0;
  double last_token_at = 0;
  std::int32_t num_matched = 0;       // blocks found on the device when last admitted
  std::int32_t num_cached = 0;        // prompt tokens found in any tier when first scheduled
  std::int32_t num_cached_below = 0;  // of these, restored from below the device tier

  std::int32_t size() const { return static_cast<std::int32_t>(tokens.size()); }
  std::int32_t num_blocks() const { return num_home + static_cast<std::int32_t>(blocks.size()); }
  // Index into `blocks` of the first that is arriving.
  std::size_t first_arriving() const {
    return static_cast<std::size_t>(num_computed / kBlockTokens - num_home) - arriving.size();
  }
  bool HasInputs(std::int32_t block) const {
    const auto index = static_cast<std::size_t>(block);
    return index < inputs.size() && inputs[index].slot != nullptr;
  }
  std::int32_t num_outputs() const { return size() - num_prompt; }
  std::int32_t num_uncomputed() const { return size() - num_computed; }
};

struct FirstInRank {
  bool operator()(const Sequence* a, const Sequence* b) const {
    return a->rank != b->rank ? a->rank < b->rank : a->arrival < b->arrival;
  }
};

}  // namespace spillway
