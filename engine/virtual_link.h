#pragma once

// VirtualLink: moves no bytes and says when they would have arrived, on a clock that its owner advances. The same order
// as TransferEngine: restores in order of arrival, stores behind them. One thread.

#include <array>
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include "kvstore/host_tier.h"
#include "kvstore/transfer_engine.h"

namespace spillway {

class VirtualLink : public BlockTransfers {
 public:
  enum class Lanes : std::uint8_t { kShared, kTwo };  // whether both directions share the bandwidth

  // `host` outlives the link. Every block takes `block_seconds`.
  VirtualLink(HostTier& host, double block_seconds, Lanes lanes)
      : host_(host), block_seconds_(block_seconds), lanes_(lanes) {}

  // The clock; never back. What ends until then is there to be collected.
  void AdvanceTo(double now);
  // From now on the link brings up what is no Transfer, for so long; what moves at the time arrives behind it.
  void Occupy(double seconds);
  std::optional<double> NextCompletion() const;  // nullopt: nothing is queued or under way
  // Seconds in which a lane moved blocks up (kRestore) or down (kStore).
  double busy_seconds(Transfer::Kind kind) const { return busy_[IndexOf(kind)]; }

  std::uint64_t Queue(Transfer&& transfer) override;
  bool Cancel(std::uint64_t id) override;
  std::vector<Transfer> Collect() override;
  TransferStats stats(Transfer::Kind kind) const override { return stats_[IndexOf(kind)]; }

 private:
  struct Queued {
    Transfer transfer;
    double since = 0;
  };
  struct Lane {
    std::optional<Transfer> moving;
    double free_at = 0;  // when `moving` arrives, or when the last one did
  };

  static std::size_t IndexOf(Transfer::Kind kind) { return kind == Transfer::Kind::kRestore ? 0 : 1; }
  std::deque<Queued>& queue(Transfer::Kind kind) { return queues_[IndexOf(kind)]; }
  Lane& lane(Transfer::Kind kind) { return lanes_at_[lanes_ == Lanes::kShared ? 0 : IndexOf(kind)]; }
  void AdvanceLane(Lane& lane, double now);
  // Starts the next block that this lane serves, unless none is there by `now`.
  bool StartNext(Lane& lane, double now);
  void Complete(Transfer transfer);

  HostTier& host_;
  const double block_seconds_;
  const Lanes lanes_;
  double now_ = 0;
  std::uint64_t next_id_ = 1;
  std::array<std::deque<Queued>, 2> queues_;  // by IndexOf, as the three below
  std::array<Lane, 2> lanes_at_;
  std::array<double, 2> busy_{};
  std::array<TransferStats, 2> stats_{};
  std::vector<Transfer> completed_;
};

}  // namespace spillway
