#include "server/grpc_health.h"

#include <chrono>
#include <optional>
#include <utility>

namespace spillway {
namespace {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

// How late a Watch may hear of a change: whether the engine is alive is a matter of time, so it has to be looked at.
constexpr auto kInterval = std::chrono::milliseconds(100);

}  // namespace

// One Watch. Every method but those of the reactor: with HealthCalls' mutex held.
class HealthWatcher final : public grpc::ServerWriteReactor<HealthCheckResponse> {
 public:
  HealthWatcher(HealthCalls& owner, std::string name) : owner_(owner), name_(std::move(name)) {}

  void Update() {
    wanted_ = owner_.StatusOf(name_);
    Advance();
  }
  void Close(const grpc::Status& status) {
    if (!end_) end_ = status;
    Advance();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(owner_.mutex_);
    is_writing_ = false;
    if (!ok && !end_) end_ = grpc::Status::CANCELLED;
    Advance();
  }
  void OnCancel() override {
    const std::lock_guard lock(owner_.mutex_);
    Close(grpc::Status::CANCELLED);
  }
  void OnDone() override {
    owner_.Remove(this);
    delete this;
  }

 private:
  void Advance() {
    if (is_writing_ || is_finished_) return;
    if (end_) {
      is_finished_ = true;
      Finish(*end_);
    } else if (wanted_ != sent_) {
      sent_ = wanted_;
      response_.set_status(*sent_);
      is_writing_ = true;
      StartWrite(&response_);
    }
  }

  HealthCalls& owner_;
  const std::string name_;
  std::optional<HealthCheckResponse::ServingStatus> wanted_;
  std::optional<HealthCheckResponse::ServingStatus> sent_;
  std::optional<grpc::Status> end_;
  HealthCheckResponse response_;
  bool is_writing_ = false;
  bool is_finished_ = false;
};

HealthCalls::HealthCalls(const spillway::Service& service) : service_(service), thread_([this] { Run(); }) {}

HealthCalls::~HealthCalls() {
  {
    const std::lock_guard lock(mutex_);
    is_stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

HealthCalls::ServingStatus HealthCalls::StatusOf(const std::string& name) const {
  if (name.empty()) return service_.is_alive() ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  if (name == "vllm.Inference") {
    return service_.is_ready() ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  }
  return HealthCheckResponse::SERVICE_UNKNOWN;
}

grpc::ServerUnaryReactor* HealthCalls::Check(grpc::CallbackServerContext* context, const HealthCheckRequest* request,
                                             HealthCheckResponse* response) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const ServingStatus status = StatusOf(request->service());
  if (status == HealthCheckResponse::SERVICE_UNKNOWN) {
    reactor->Finish({grpc::StatusCode::NOT_FOUND, "unknown service " + request->service()});
  } else {
    response->set_status(status);
    reactor->Finish(grpc::Status::OK);
  }
  return reactor;
}

grpc::ServerWriteReactor<HealthCheckResponse>* HealthCalls::Watch(grpc::CallbackServerContext* /*context*/,
                                                                  const HealthCheckRequest* request) {
  auto* const watcher = new HealthWatcher(*this, request->service());
  {
    const std::lock_guard lock(mutex_);
    watchers_.insert(watcher);
    if (is_closed_) {
      watcher->Close({grpc::StatusCode::UNAVAILABLE, "the server is stopping"});
    } else {
      watcher->Update();
    }
  }
  changed_.notify_all();
  return watcher;
}

void HealthCalls::Close() {
  const std::lock_guard lock(mutex_);
  is_closed_ = true;
  for (HealthWatcher* const watcher : watchers_) {
    watcher->Close({grpc::StatusCode::UNAVAILABLE, "the server is stopping"});
  }
}

void HealthCalls::Remove(HealthWatcher* watcher) {
  const std::lock_guard lock(mutex_);
  watchers_.erase(watcher);
}

void HealthCalls::Run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return is_stopping_ || !watchers_.empty(); });
    if (changed_.wait_for(lock, kInterval, [this] { return is_stopping_; })) return;
    for (HealthWatcher* const watcher : watchers_) watcher->Update();
  }
}

}  // namespace spillway
