#include "engine/timed_copies.h"

#include <algorithm>
#include <chrono>

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

void TimedCopies::Begin() {
  if (times_) stream_->Notify([this] { begun_ = Now(); });
}

void TimedCopies::BeginOnceFree(const std::shared_ptr<Event>& free) {
  if (times_) {
    stream_->Notify([this, free, queued_at = Now()] { begun_ = !free || free->Ready() ? queued_at : 0; });
  }
  if (free) stream_->Wait(free);
  if (!times_) return;
  stream_->Notify([this] {
    if (begun_ == 0) begun_ = Now();
  });
}

void TimedCopies::End(std::size_t num_copies, std::size_t num_bytes, Sum& sum) {
  if (!times_) return;
  stream_->Notify([this, num_copies, num_bytes, &sum] {
    link_.Await(begun_, num_copies, num_bytes);
    sum.copies += static_cast<double>(num_copies);
    sum.bytes += static_cast<double>(num_bytes);
    const double now = Now();
    sum.seconds += now - std::max(begun_, ended_);  // it shared the link with the one before it
    ended_ = now;
  });
}

}  // namespace spillway
