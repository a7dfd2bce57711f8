#pragma once

// LayerLoader: brings blocks of a step's sequences up from the host tier inside the step, layer by layer, while the
// layers before are computed. What a step hides so costs a returning session no time of its own; whole blocks that are
// loaded before the step do.
//
// For devices whose cores make the copies: they are part of the step's stream, since a thread of their own would take a
// core from computing, and wake-ups in turns cost more than they hide. What a layer waits for is the paced link, which
// carries the layers of a step one behind the other from when they are queued. Engine thread only, but for what is said
// otherwise; one step in flight at a time.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "engine/step_plan.h"
#include "kernels/kernels.h"
#include "kvstore/paced_link.h"

namespace spillway {

class LayerLoader {
 public:
  // `link` outlives the loader.
  explicit LayerLoader(PacedLink& link) : link_(link) {}

  // Remembers what the plan's sequences load in this step (Sequence::arriving); their slots and blocks stay as they are
  // until it is done.
  void Begin(std::span<const PlannedSequence> planned, const KvView& kv);
  // Queues the copies of one layer on the step's stream. Layers in order.
  void Load(Stream& stream, int layer);

  // Any thread: by the steps that were begun so far, and the seconds in which the link, or a copying core, was busy.
  std::int64_t loaded_blocks() const { return loaded_blocks_.load(std::memory_order_relaxed); }
  double seconds() const { return seconds_.load(std::memory_order_relaxed); }
  // In which the steps' stream copied or awaited the link, and computed nothing. Complete once a step is done.
  double stalled_seconds() const { return stalled_seconds_.load(std::memory_order_relaxed); }

 private:
  struct Move {
    const std::byte* from = nullptr;
    std::byte* to = nullptr;
  };

  PacedLink& link_;
  KvLayout layout_;
  std::vector<Move> moves_;
  std::atomic<std::int64_t> loaded_blocks_{0};
  std::atomic<double> seconds_{0};
  std::atomic<double> stalled_seconds_{0};
  double began_at_ = 0;  // thread of the step's stream
};

}  // namespace spillway
