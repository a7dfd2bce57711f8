#include "engine/virtual_link.h"

#include <algorithm>
#include <utility>

namespace spillway {

std::uint64_t VirtualLink::Queue(Transfer&& transfer) {
  const std::uint64_t id = transfer.id = next_id_++;
  std::deque<Queued>& waiting = queue(transfer.kind);
  waiting.push_back({.transfer = std::move(transfer), .since = now_});
  return id;
}

bool VirtualLink::Cancel(std::uint64_t id) {
  for (std::deque<Queued>& waiting : queues_) {
    const auto found =
        std::ranges::lower_bound(waiting, id, {}, [](const Queued& queued) { return queued.transfer.id; });
    if (found == waiting.end() || found->transfer.id != id) continue;
    waiting.erase(found);
    return true;
  }
  return false;
}

std::vector<Transfer> VirtualLink::Collect() { return std::exchange(completed_, {}); }

void VirtualLink::AdvanceTo(double now) {
  for (Lane& each : lanes_at_) AdvanceLane(each, now);
  now_ = now;
}

void VirtualLink::Occupy(double seconds) {
  Lane& up = lane(Transfer::Kind::kRestore);
  up.free_at = std::max(up.free_at, now_) + seconds;
  busy_[IndexOf(Transfer::Kind::kRestore)] += seconds;
}

void VirtualLink::AdvanceLane(Lane& lane, double now) {
  while (true) {
    if (lane.moving) {
      if (lane.free_at > now) return;
      Complete(*std::exchange(lane.moving, std::nullopt));
    }
    if (!StartNext(lane, now)) return;
  }
}

bool VirtualLink::StartNext(Lane& lane, double now) {
  std::deque<Queued>* next = nullptr;
  double begin = now;
  for (const Transfer::Kind kind : {Transfer::Kind::kRestore, Transfer::Kind::kStore}) {
    std::deque<Queued>& waiting = queue(kind);
    if (&this->lane(kind) != &lane || waiting.empty()) continue;
    const double could_begin = std::max(lane.free_at, waiting.front().since);
    if (could_begin < begin || (next == nullptr && could_begin <= now)) {
      next = &waiting;
      begin = could_begin;
    }
  }
  if (next == nullptr) return false;
  Transfer transfer = std::move(next->front().transfer);
  next->pop_front();
  if (transfer.kind == Transfer::Kind::kRestore && !transfer.slot) {
    std::optional<HostSlot> slot = host_.Find(transfer.key, transfer.tokens);
    if (!slot) {
      transfer.status = absl::NotFoundError("the block is in no tier");
      Complete(std::move(transfer));
      return true;
    }
    transfer.slot = *std::move(slot);
  }
  busy_[IndexOf(transfer.kind)] += block_seconds_;
  lane.free_at = begin + block_seconds_;
  lane.moving = std::move(transfer);
  return true;
}

void VirtualLink::Complete(Transfer transfer) {
  TransferStats& stats = stats_[IndexOf(transfer.kind)];
  if (!transfer.status.ok()) {
    ++stats.failures;
  } else {
    ++stats.blocks;
    stats.seconds += block_seconds_;
    if (transfer.kind == Transfer::Kind::kStore) {
      transfer.slot = host_.Commit(std::move(transfer.slot), transfer.key, transfer.tokens);
    }
  }
  transfer.slot = HostSlot();
  completed_.push_back(std::move(transfer));
}

std::optional<double> VirtualLink::NextCompletion() const {
  std::optional<double> next;
  const auto consider = [&](double at) { next = next ? std::min(*next, at) : at; };
  for (const Lane& each : lanes_at_) {
    if (each.moving) consider(each.free_at);
  }
  if (next) return next;
  // Nothing moves: what is queued begins now.
  for (const std::deque<Queued>& waiting : queues_) {
    if (!waiting.empty()) consider(now_ + block_seconds_);
  }
  return next;
}

}  // namespace spillway
