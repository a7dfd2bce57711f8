#pragma once

// LayerLoader: brings blocks of a step's sequences up from the host tier inside the step, layer by layer, while the
// layers before are computed. What a step hides so costs a returning session no time of its own; whole blocks that are
// loaded before the step do.
//
// Copies run on a stream of their own, a layer's strips after those of the layer before, as fast as the link allows.
// Engine thread only, but for what is said otherwise; one step in flight at a time.

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/step_plan.h"
#include "kernels/kernels.h"
#include "kvstore/paced_link.h"

namespace spillway {

class LayerLoader {
 public:
  // `device` and `link` outlive the loader.
  static absl::StatusOr<std::unique_ptr<LayerLoader>> Make(Device& device, PacedLink& link);

  // Remembers what the plan's sequences load in this step (Sequence::arriving); their slots and blocks stay as they are
  // until it is done.
  void Begin(std::span<const PlannedSequence> planned, const KvView& kv);
  // Queues the copies of one layer; `stream` goes on when they are there. Layers in order.
  void Load(Stream& stream, int layer);

  // Any thread: by the steps that were begun so far, and the seconds in which it copied.
  std::int64_t loaded_blocks() const { return loaded_blocks_.load(std::memory_order_relaxed); }
  double seconds() const { return seconds_.load(std::memory_order_relaxed); }

 private:
  struct Move {
    const std::byte* from = nullptr;
    std::byte* to = nullptr;
  };

  explicit LayerLoader(PacedLink& link) : link_(link) {}

  PacedLink& link_;
  KvLayout layout_;
  std::vector<Move> moves_;
  std::atomic<std::int64_t> loaded_blocks_{0};
  std::atomic<double> seconds_{0};
  double last_ended_at_ = 0;        // thread of copies_
  std::unique_ptr<Stream> copies_;  // last: its destructor waits for copies into the blocks
};

}  // namespace spillway
