#include "server/grpc_generate.h"

#include <deque>
#include <memory>
#include <mutex>
#include <utility>

#include "engine/model.h"
#include "kernels/status_macros.h"
#include "server/grpc_access.h"
#include "server/grpc_request.h"
#include "server/tenant.h"

namespace spillway {
namespace {

const grpc::Status kCancelled(grpc::StatusCode::CANCELLED, "cancelled by the client or its deadline");

// The running generation of one call. A cancel that comes before the handle is not lost.
class CancelHandle {
 public:
  void Set(std::shared_ptr<Generation> generation) {
    {
      const std::lock_guard lock(mutex_);
      if (!is_cancelled_) {
        generation_ = std::move(generation);
        return;
      }
    }
    generation->Cancel();
  }
  void Cancel() {
    std::shared_ptr<Generation> generation;
    {
      const std::lock_guard lock(mutex_);
      is_cancelled_ = true;
      generation = std::move(generation_);
    }
    if (generation) generation->Cancel();
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Generation> generation_;
  bool is_cancelled_ = false;
};

// Unary: gathers all chunks into the response. Shared by the generation and the reactor; the reactor's pointers are
// used only until the call is finished.
class Collector : public GenerationListener {
 public:
  Collector(grpc::ServerUnaryReactor& reactor, vllm::GenerateResponse& response, OutputSelection selection)
      : reactor_(reactor), response_(response), selection_(selection) {}

  void OnPrompt(const PromptInfo& prompt) override {
    const std::lock_guard lock(mutex_);
    if (!is_finished_) FillPromptInfo(prompt, selection_, *response_.mutable_prompt_info());
  }
  void OnChunk(OutputChunk chunk) override {
    const std::lock_guard lock(mutex_);
    if (!is_finished_) AppendOutput(chunk, selection_, *response_.mutable_outputs());
  }
  void OnDone(const absl::Status& status) override { Finish(ToGrpc(WithMessageField(status))); }

  void Finish(const grpc::Status& status) {
    const std::lock_guard lock(mutex_);
    if (std::exchange(is_finished_, true)) return;
    reactor_.Finish(status);
  }
  CancelHandle& handle() { return handle_; }

 private:
  grpc::ServerUnaryReactor& reactor_;
  vllm::GenerateResponse& response_;
  const OutputSelection selection_;
  CancelHandle handle_;
  std::mutex mutex_;
  bool is_finished_ = false;
};

class UnaryCall final : public grpc::ServerUnaryReactor {
 public:
  UnaryCall(vllm::GenerateResponse& response, OutputSelection selection)
      : collector_(std::make_shared<Collector>(*this, response, selection)) {}

  void Run(spillway::Service& service, absl::StatusOr<GenerationRequest> request) {
    const auto collector = collector_;  // this may be gone before Start returns
    if (!request.ok()) return collector->Finish(ToGrpc(request.status()));
    collector->handle().Set(service.Start(*std::move(request), collector));
  }
  void OnCancel() override {
    const auto collector = collector_;
    collector->handle().Cancel();
    collector->Finish(kCancelled);
  }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<Collector> collector_;
};

// Streaming: one write in flight, the rest waits here up to a bound. Shared by the generation and the reactor; the
// reactor's pointers are used only until the call is finished.
class ChunkQueue : public GenerationListener {
 public:
  ChunkQueue(grpc::ServerWriteReactor<vllm::GenerateResponse>& reactor, grpc::CallbackServerContext& context,
             OutputSelection selection, std::size_t max_bytes)
      : reactor_(reactor), context_(context), selection_(selection), max_bytes_(max_bytes) {}

  void OnPrompt(const PromptInfo& prompt) override {  // travels with the first chunk
    const std::lock_guard lock(mutex_);
    FillPromptInfo(prompt, selection_, *next_.mutable_prompt_info());
  }

  void OnChunk(OutputChunk chunk) override {
    {
      const std::lock_guard lock(mutex_);
      if (end_) return;
      AppendOutput(chunk, selection_, *next_.mutable_outputs());
      waiting_bytes_ += next_.ByteSizeLong();
      waiting_.push_back(std::exchange(next_, {}));
      Advance();
      if (waiting_bytes_ <= max_bytes_) return;
      // A write that the peer does not take never ends by itself.
      EndWith({grpc::StatusCode::RESOURCE_EXHAUSTED, "the client reads too slowly"});
      if (!is_finished_) context_.TryCancel();
    }
    handle_.Cancel();
  }

  void OnDone(const absl::Status& status) override {
    const std::lock_guard lock(mutex_);
    if (!end_) end_ = ToGrpc(WithMessageField(status));
    Advance();
  }

  void OnWritten(bool ok) {
    {
      const std::lock_guard lock(mutex_);
      is_writing_ = false;
      if (ok) return Advance();
      EndWith(kCancelled);
    }
    handle_.Cancel();
  }

  void OnCancelled() {
    {
      const std::lock_guard lock(mutex_);
      EndWith(kCancelled);
    }
    handle_.Cancel();
  }

  CancelHandle& handle() { return handle_; }

 private:
  // All below: with mutex_ held.
  void EndWith(const grpc::Status& status) {
    waiting_.clear();
    waiting_bytes_ = 0;
    if (!end_) end_ = status;
    Advance();
  }

  void Advance() {
    if (is_writing_ || is_finished_) return;
    if (!waiting_.empty()) {
      written_ = std::move(waiting_.front());
      waiting_.pop_front();
      waiting_bytes_ -= written_.ByteSizeLong();
      is_writing_ = true;
      reactor_.StartWrite(&written_);
    } else if (end_) {
      is_finished_ = true;
      reactor_.Finish(*end_);
    }
  }

  grpc::ServerWriteReactor<vllm::GenerateResponse>& reactor_;
  grpc::CallbackServerContext& context_;
  const OutputSelection selection_;
  const std::size_t max_bytes_;
  CancelHandle handle_;
  std::mutex mutex_;
  vllm::GenerateResponse next_;     // being filled
  vllm::GenerateResponse written_;  // in flight
  std::deque<vllm::GenerateResponse> waiting_;
  std::size_t waiting_bytes_ = 0;
  std::optional<grpc::Status> end_;  // once nothing waits
  bool is_writing_ = false;
  bool is_finished_ = false;
};

class StreamCall final : public grpc::ServerWriteReactor<vllm::GenerateResponse> {
 public:
  StreamCall(grpc::CallbackServerContext& context, OutputSelection selection, std::size_t max_bytes)
      : queue_(std::make_shared<ChunkQueue>(*this, context, selection, max_bytes)) {}

  void Run(spillway::Service& service, absl::StatusOr<GenerationRequest> request) {
    const auto queue = queue_;  // this may be gone before Start returns
    if (!request.ok()) return queue->OnDone(request.status());
    queue->handle().Set(service.Start(*std::move(request), queue));
  }
  void OnWriteDone(bool ok) override { std::shared_ptr(queue_)->OnWritten(ok); }
  void OnCancel() override { std::shared_ptr(queue_)->OnCancelled(); }
  void OnDone() override { delete this; }

 private:
  const std::shared_ptr<ChunkQueue> queue_;
};

}  // namespace

InferenceCalls::InferenceCalls(spillway::Service& service, std::vector<std::string> api_keys)
    : service_(service), api_keys_(std::move(api_keys)) {}

absl::StatusOr<GenerationRequest> InferenceCalls::Prepare(const grpc::CallbackServerContext& context,
                                                          const vllm::GenerateRequest& request) const {
  const grpc::Status key = CheckKey(context, api_keys_);
  if (!key.ok()) return absl::UnauthenticatedError(key.error_message());
  ASSIGN_OR_RETURN(GenerationRequest prepared, ToGenerationRequest(request, service_.generation_defaults()));
  if (prepared.request_id.empty()) prepared.request_id = Metadata(context, "x-request-id");
  std::string fairness_id = Metadata(context, kFairnessHeaders[0]);
  if (fairness_id.empty()) fairness_id = Metadata(context, kFairnessHeaders[1]);
  prepared.tenant = TenantOf(fairness_id, KeyOf(context, api_keys_));
  return prepared;
}

grpc::ServerUnaryReactor* InferenceCalls::Generate(grpc::CallbackServerContext* context,
                                                   const vllm::GenerateRequest* request,
                                                   vllm::GenerateResponse* response) {
  absl::StatusOr<GenerationRequest> prepared = Prepare(*context, *request);
  if (prepared.ok() && prepared->n > 1) {
    prepared = absl::InvalidArgumentError("sampling.num_sequences: more than 1 needs GenerateStream");
  }
  auto* const call = new UnaryCall(*response, SelectionOf(request->response()));
  call->Run(service_, std::move(prepared));
  return call;
}

grpc::ServerWriteReactor<vllm::GenerateResponse>* InferenceCalls::GenerateStream(grpc::CallbackServerContext* context,
                                                                                 const vllm::GenerateRequest* request) {
  absl::StatusOr<GenerationRequest> prepared = Prepare(*context, *request);
  auto* const call = new StreamCall(*context, SelectionOf(request->response()), service_.options().max_pending_bytes);
  call->Run(service_, std::move(prepared));
  return call;
}

}  // namespace spillway
