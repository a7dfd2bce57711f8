#pragma once

// grpc.health.v1: "" is whether the engine is alive, "vllm.Inference" whether it takes work.

#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_set>

#include "proto/health.grpc.pb.h"
#include "server/service.h"

namespace spillway {

class HealthWatcher;

// Any thread. `service` outlives it.
class HealthCalls final : public grpc::health::v1::Health::CallbackService {
 public:
  explicit HealthCalls(const spillway::Service& service);
  ~HealthCalls() override;

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const grpc::health::v1::HealthCheckRequest* request,
                                  grpc::health::v1::HealthCheckResponse* response) override;
  grpc::ServerWriteReactor<grpc::health::v1::HealthCheckResponse>* Watch(
      grpc::CallbackServerContext* context, const grpc::health::v1::HealthCheckRequest* request) override;

  // Ends every Watch, now and later.
  void Close();

 private:
  friend class HealthWatcher;
  using ServingStatus = grpc::health::v1::HealthCheckResponse::ServingStatus;

  ServingStatus StatusOf(const std::string& name) const;
  void Remove(HealthWatcher* watcher);
  void Run();

  const spillway::Service& service_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::unordered_set<HealthWatcher*> watchers_;
  bool is_closed_ = false;
  bool is_stopping_ = false;
  std::thread thread_;  // tells watchers of changes
};

}  // namespace spillway
