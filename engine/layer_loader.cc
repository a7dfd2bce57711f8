#include "engine/layer_loader.h"

#include <algorithm>
#include <chrono>

#include "engine/sequence.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

void LayerLoader::Begin(std::span<const PlannedSequence> planned, const KvView& kv) {
  layout_ = kv.layout;
  moves_.clear();
  for (const PlannedSequence& each : planned) {
    const Sequence& sequence = *each.sequence;
    const std::size_t first = sequence.first_arriving();
    for (std::size_t i = 0; i < sequence.arriving.size(); ++i) {
      const auto block = static_cast<std::size_t>(sequence.blocks[first + i].id());
      moves_.push_back({.from = sequence.arriving[i]->slot().bytes(), .to = kv.pool + block * layout_.block_bytes()});
    }
  }
  loaded_blocks_.fetch_add(static_cast<std::int64_t>(moves_.size()), std::memory_order_relaxed);
}

void LayerLoader::Load(Stream& stream, int layer) {
  const std::size_t offset = layout_.strip_offset(layer, 0);
  const std::size_t bytes = layout_.layer_bytes();
  stream.Notify([this] { began_at_ = Now(); });
  for (const Move& move : moves_) stream.Copy(move.to + offset, move.from + offset, bytes);
  stream.Notify([this, queued_at = Now(), count = moves_.size(), bytes] {
    const double copying = Now() - began_at_;
    const double carrying = link_.Await(queued_at, count, count * bytes);
    seconds_.store(seconds_.load(std::memory_order_relaxed) + std::max(copying, carrying), std::memory_order_relaxed);
    stalled_seconds_.store(stalled_seconds_.load(std::memory_order_relaxed) + Now() - began_at_,
                           std::memory_order_relaxed);
  });
}

}  // namespace spillway
