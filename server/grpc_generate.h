#pragma once

// vllm.Inference over the Service.

#include <string>
#include <vector>

#include "proto/vllm_inference.grpc.pb.h"
#include "server/service.h"

namespace spillway {

// Any thread. `service` outlives it.
class InferenceCalls final : public vllm::Inference::CallbackService {
 public:
  InferenceCalls(spillway::Service& service, std::vector<std::string> api_keys);

  grpc::ServerUnaryReactor* Generate(grpc::CallbackServerContext* context, const vllm::GenerateRequest* request,
                                     vllm::GenerateResponse* response) override;
  grpc::ServerWriteReactor<vllm::GenerateResponse>* GenerateStream(grpc::CallbackServerContext* context,
                                                                   const vllm::GenerateRequest* request) override;

 private:
  absl::StatusOr<GenerationRequest> Prepare(const grpc::CallbackServerContext& context,
                                            const vllm::GenerateRequest& request) const;

  spillway::Service& service_;
  const std::vector<std::string> api_keys_;
};

}  // namespace spillway
