#include "kernels/cuda/stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/cuda/errors.h"
#include "kernels/cuda/memory.h"
#include "kernels/status_macros.h"

namespace spillway::cuda {

struct StreamState::Callback {
  std::shared_ptr<StreamState> state;
  std::uint64_t id;
};

StreamState::StreamState(Buffer fault) : fault_(std::move(fault)) {}

void StreamState::Fail(absl::Status status) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (status_.ok()) status_ = std::move(status);
}

absl::Status StreamState::status() {
  const volatile Fault* const fault = this->fault();
  if (fault->code == kFaultToken) {
    Fail(absl::InternalError(
        absl::StrCat("embed: token ", fault->value, " at row ", fault->row, " is outside the table")));
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  return status_;
}

void StreamState::Run(std::uint64_t id) {
  std::function<void()> reached;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = pending_.find(id);
    if (found == pending_.end()) return;
    reached = std::move(found->second);
    pending_.erase(found);
  }
  reached();
}

void StreamState::RunPending() {
  while (true) {
    std::uint64_t id = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (pending_.empty()) return;
      id = pending_.begin()->first;
    }
    Run(id);
  }
}

void StreamState::Reached(void* callback) {
  const std::unique_ptr<Callback> mine(static_cast<Callback*>(callback));
  mine->state->Run(mine->id);
}

void StreamState::Notify(cudaStream_t stream, std::function<void()> reached) {
  auto callback = std::make_unique<Callback>();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    callback->id = next_id_++;
    pending_[callback->id] = std::move(reached);
  }
  callback->state = shared_from_this();
  const cudaError_t error = cudaLaunchHostFunc(stream, Reached, callback.get());
  if (error == cudaSuccess) {
    callback.release();  // NOLINT(bugprone-unused-return-value): Reached owns it
    return;
  }
  Fail(ToStatus(error, "queueing a notification"));
  static_cast<void>(cudaStreamSynchronize(stream));
  RunPending();
}

CudaEvent::~CudaEvent() {
  if (event_ != nullptr) cudaEventDestroy(event_);
}

bool CudaEvent::Ready() const { return event_ == nullptr || cudaEventQuery(event_) != cudaErrorNotReady; }

absl::Status CudaEvent::Await() {
  if (event_ != nullptr) {
    const cudaError_t error = cudaEventSynchronize(event_);
    if (error != cudaSuccess) {
      state_->Fail(ToStatus(error, "work before an event"));
      state_->RunPending();
    }
  }
  return state_->status();
}

absl::StatusOr<std::unique_ptr<Stream>> CudaStream::Make(int device, Repeats repeats) {
  RETURN_IF_ERROR(ToStatus(cudaSetDevice(device), "choosing the device"));
  ASSIGN_OR_RETURN(Buffer fault, AllocatePinned(sizeof(Fault)));
  cudaStream_t stream = nullptr;
  RETURN_IF_ERROR(ToStatus(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream"));
  cudaStream_t recorder = nullptr;
  const cudaError_t error = cudaStreamCreateWithFlags(&recorder, cudaStreamNonBlocking);
  if (error != cudaSuccess) {
    cudaStreamDestroy(stream);
    return ToStatus(error, "creating a stream");
  }
  return std::unique_ptr<Stream>(new CudaStream(device, repeats, stream, recorder, std::move(fault)));
}

CudaStream::CudaStream(int device, Repeats repeats, cudaStream_t stream, cudaStream_t recorder, Buffer fault)
    : device_(device),
      repeats_(repeats),
      stream_(stream),
      recorder_(recorder),
      target_(stream),
      state_(std::make_shared<StreamState>(std::move(fault))) {}

CudaStream::~CudaStream() {
  cudaSetDevice(device_);
  Check(cudaStreamSynchronize(stream_), "the last work of a stream");
  state_->RunPending();
  for (const auto& [key, graph] : graphs_) {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  for (std::byte* const workspace : workspaces_) cudaFree(workspace);
  cudaStreamDestroy(recorder_);
  cudaStreamDestroy(stream_);
}

void CudaStream::Check(cudaError_t error, std::string_view what) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // the same error, seen again by the next launch, would blame that one
  state_->Fail(ToStatus(error, what));
  if (target_ == stream_) NotifyIfDead();
}

// A call that was refused stops nothing that was queued before it; a fault of the device ends everything.
void CudaStream::NotifyIfDead() const {
  const cudaError_t error = cudaStreamQuery(stream_);
  if (error == cudaSuccess || error == cudaErrorNotReady) return;
  state_->Fail(ToStatus(error, "queued work"));
  state_->RunPending();
}

bool CudaStream::IsUsable() const {
  if (!state_->status().ok()) return false;
  const cudaError_t error = cudaSetDevice(device_);
  if (error == cudaSuccess) return true;
  state_->Fail(ToStatus(error, "choosing the device"));
  return false;
}

void CudaStream::Gather(std::byte* to, std::span<const std::byte* const> from, std::size_t offset,
                        std::size_t size_bytes) {
  for (std::size_t i = 0; i < from.size(); ++i) Copy(to + i * size_bytes, from[i] + offset, size_bytes);
}

void CudaStream::Copy(std::byte* to, const std::byte* from, std::size_t size_bytes) {
  if (size_bytes == 0) return;
  Queue("copy", [&](cudaStream_t stream) { return cudaMemcpyAsync(to, from, size_bytes, cudaMemcpyDefault, stream); });
}

std::shared_ptr<Event> CudaStream::Record() {
  cudaEvent_t event = nullptr;
  static_cast<void>(cudaSetDevice(device_));
  // Who waits for it sleeps.
  Check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventBlockingSync), "creating an event");
  if (event != nullptr) Check(cudaEventRecord(event, target_), "recording an event");
  return std::make_shared<CudaEvent>(event, state_);
}

void CudaStream::Wait(const std::shared_ptr<Event>& event) {
  const auto& awaited = static_cast<const CudaEvent&>(*event);
  if (absl::Status status = awaited.state().status(); !status.ok()) {
    Fail(std::move(status));
    return;
  }
  Queue("waiting for an event",
        [&](cudaStream_t stream) { return cudaStreamWaitEvent(stream, awaited.handle(), cudaEventWaitDefault); });
}

void CudaStream::Notify(std::function<void()> reached) {
  SPILLWAY_CHECK(target_ == stream_) << "a notification among repeated work would be sent with every repetition";
  static_cast<void>(cudaSetDevice(device_));
  state_->Notify(stream_, std::move(reached));
}

void CudaStream::Repeat(std::uint64_t key, const std::function<void()>& queue) {
  if (!IsUsable()) return;
  const auto [met, is_new] = graphs_.try_emplace(key, nullptr);
  // The first time loads kernels, takes workspaces and chooses algorithms, which cannot be recorded.
  if (repeats_ == Repeats::kQueued || is_new) {
    queue();
    return;
  }
  cudaGraphExec_t& graph = met->second;
  if (graph == nullptr) graph = RecordGraph(queue);
  if (graph != nullptr) {
    Queue("replaying repeated work", [&](cudaStream_t stream) { return cudaGraphLaunch(graph, stream); });
  }
}

// Null after an error.
cudaGraphExec_t CudaStream::RecordGraph(const std::function<void()>& queue) {
  constexpr std::string_view kWhat = "recording repeated work";
  const cudaError_t error = cudaStreamBeginCapture(recorder_, cudaStreamCaptureModeThreadLocal);
  Check(error, kWhat);
  if (error != cudaSuccess) return nullptr;
  target_ = recorder_;
  queue();
  target_ = stream_;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  Check(cudaStreamEndCapture(recorder_, &graph), kWhat);
  if (IsUsable()) Check(cudaGraphInstantiate(&executable, graph, 0), kWhat);
  if (graph != nullptr) cudaGraphDestroy(graph);
  return executable;
}

absl::Status CudaStream::status() const {
  NotifyIfDead();
  return state_->status();
}

std::byte* CudaStream::Workspace(Purpose purpose, std::size_t size_bytes) {
  std::byte*& workspace = workspaces_[static_cast<int>(purpose)];
  if (workspace == nullptr && IsUsable()) {
    void* memory = nullptr;
    Check(cudaMalloc(&memory, std::max<std::size_t>(size_bytes, 1)),
          absl::StrCat("a workspace of ", size_bytes, " bytes"));
    workspace = static_cast<std::byte*>(memory);
  }
  return workspace;
}

}  // namespace spillway::cuda
