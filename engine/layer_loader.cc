#include "engine/layer_loader.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/sequence.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

absl::StatusOr<std::unique_ptr<LayerLoader>> LayerLoader::Make(Device& device, PacedLink& link) {
  std::unique_ptr<LayerLoader> loader(new LayerLoader(link));
  ASSIGN_OR_RETURN(loader->copies_, device.NewStream());
  return loader;
}

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
  for (const Move& move : moves_) copies_->Copy(move.to + offset, move.from + offset, bytes);
  // The link has a layer from when it is queued, so one follows another without a gap.
  copies_->Notify([this, queued_at = Now(), count = moves_.size(), bytes] {
    link_.Await(queued_at, count, count * bytes);
    const double now = Now();
    const double seconds = now - std::max(last_ended_at_, queued_at);
    seconds_.store(seconds_.load(std::memory_order_relaxed) + seconds, std::memory_order_relaxed);
    last_ended_at_ = now;
  });
  stream.Wait(copies_->Record());
}

}  // namespace spillway
