#pragma once

// The cuda device's stream: a CUDA stream that no other one waits for, a sticky status, and the workspace of its
// kernels.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/launch.h"
#include "kernels/device.h"

namespace spillway::cuda {

// What a stream, its events and CUDA's callbacks share. Any thread.
class StreamState : public std::enable_shared_from_this<StreamState> {
 public:
  // `fault` is a Fault that kernels write.
  explicit StreamState(Buffer fault);

  // The first error stays. What was queued before it goes on, and notifications come after that.
  void Fail(absl::Status status);
  absl::Status status();
  Fault* fault() const { return reinterpret_cast<Fault*>(fault_.get()); }

  // Runs `reached` by way of `notifier`, once `mark`, which is recorded here, is met on `stream`. After an error: here.
  void Notify(cudaStream_t stream, cudaEvent_t mark, cudaStream_t notifier, std::function<void()> reached);
  // Nothing runs any more, and CUDA runs no callback: whoever waits for a notification gets it now.
  void RunPending();

 private:
  struct Callback;  // what CUDA hands back
  static void CUDART_CB Reached(void* callback);
  void Run(std::uint64_t id);

  const Buffer fault_;
  std::mutex mutex_;
  absl::Status status_;                                     // guarded by mutex_
  std::map<std::uint64_t, std::function<void()>> pending_;  // in order of Notify; guarded by mutex_
  std::uint64_t next_id_ = 0;                               // guarded by mutex_
};

class CudaEvent final : public Event {
 public:
  CudaEvent(cudaEvent_t event, std::shared_ptr<StreamState> state) : event_(event), state_(std::move(state)) {}
  ~CudaEvent() override;

  bool Ready() const override;
  absl::Status Await() override;  // the stream's status
  double SecondsSince(const Event& earlier) const override;
  cudaEvent_t handle() const { return event_; }
  StreamState& state() const { return *state_; }

 private:
  const cudaEvent_t event_;  // null: recording failed
  const std::shared_ptr<StreamState> state_;
};

class CudaStream final : public Stream {
 public:
  // kReplayed: the second call of Repeat with a key records a CUDA graph, which it and later ones launch.
  enum class Repeats : std::uint8_t { kQueued, kReplayed };
  static absl::StatusOr<std::unique_ptr<Stream>> Make(int device, Repeats repeats);
  ~CudaStream() override;

  void Copy(std::byte* to, const std::byte* from, std::size_t size_bytes) override;  // by a copy engine
  void Hold() override { is_holding_ = true; }
  void Resume() override;
  void Gather(std::byte* to, std::span<const std::byte* const> from, std::size_t offset,
              std::size_t size_bytes) override;
  std::shared_ptr<Event> Record() override { return RecordWith(cudaEventDisableTiming); }
  std::shared_ptr<Event> RecordTime() override { return RecordWith(cudaEventDefault); }
  // If the awaited work is known to have failed, this stream takes over its error.
  void Wait(const std::shared_ptr<Event>& event) override;
  void Notify(std::function<void()> reached) override;
  void Repeat(std::uint64_t key, const std::function<void()>& queue) override;
  absl::Status status() const override;

  // Queues what `launch(cudaStream_t)` queues; skipped after an error.
  template <typename Launch>
  void Queue(std::string_view what, Launch launch) {
    QueueHeld();
    if (!IsUsable()) return;
    Check(launch(target_), what);
  }
  void Fail(absl::Status status) { state_->Fail(std::move(status)); }
  bool IsUsable() const;  // also makes the stream's device the calling thread's

  cudaStream_t handle() const { return handles_.stream; }  // for measurements
  Fault* fault() const { return state_->fault(); }
  // Device memory for the kernels of this stream, kept from call to call: one piece per purpose, allocated when first
  // asked for, its first kWorkspaceZeros bytes zeros then. Null after an error.
  static constexpr std::size_t kWorkspaceZeros = 16;
  enum class Purpose : std::uint8_t { kAttention, kGemm };
  std::byte* Workspace(Purpose purpose, std::size_t size_bytes);

 private:
  struct Handles {
    cudaStream_t stream = nullptr;
    // Only ever records: so `stream` may be asked for its state at any time, by any thread.
    cudaStream_t recorder = nullptr;
    // Runs notifications, each behind `mark`: on `stream`, what is queued next would wait until the host has run them.
    cudaStream_t notifier = nullptr;
    cudaEvent_t mark = nullptr;
  };
  // Copies that CUDA is told of in one call: one by one, each costs the host 3 us and the copy engine a start.
  struct Copies {
    std::vector<void*> to;
    std::vector<const void*> from;
    std::vector<std::size_t> sizes;

    void Add(std::byte* destination, const std::byte* source, std::size_t size_bytes);
    cudaError_t Queue(cudaStream_t stream) const;
  };
  static absl::Status Create(Handles& handles);
  static void Destroy(const Handles& handles);
  CudaStream(int device, Repeats repeats, const Handles& handles, Buffer fault);
  void Check(cudaError_t error, std::string_view what);
  void QueueHeld() {
    if (!held_.to.empty()) QueueCopies(held_);
  }
  void QueueCopies(Copies& copies);  // and forgets them
  std::shared_ptr<Event> RecordWith(unsigned flags);
  void NotifyIfDead() const;
  cudaGraphExec_t RecordGraph(const std::function<void()>& queue);

  const int device_;
  const Repeats repeats_;
  const Handles handles_;
  cudaStream_t target_;  // of what is queued: the stream, or the recorder while a graph is recorded
  bool is_holding_ = false;
  Copies held_;
  std::map<std::uint64_t, cudaGraphExec_t> graphs_;  // null: the key was met once
  const std::shared_ptr<StreamState> state_;
  std::byte* workspaces_[2] = {};
};

}  // namespace spillway::cuda
