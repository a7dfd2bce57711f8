#include <fmt/format.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>

#include <mutex>
#include <random>
#include <utility>

#include "absl/time/clock.h"
#include "kernels/kv_layout.h"
#include "proto/vllm_control.grpc.pb.h"
#include "server/frontend.h"
#include "server/grpc_access.h"
#include "server/grpc_generate.h"
#include "server/grpc_health.h"

namespace spillway {
namespace {

constexpr int kKeepaliveTimeMs = 60'000;     // a ping on connections that are quiet for so long
constexpr int kKeepaliveTimeoutMs = 20'000;  // no answer to it: the connection, and what runs on it, is cancelled
constexpr int kLeastPingIntervalMs = 5'000;  // clients that ping more often are sent away

// vllm.Control: what is built of it, and only with the admin key.
class ControlCalls final : public vllm::Control::CallbackService {
 public:
  ControlCalls(spillway::Service& service, std::string admin_key, int data_parallel_size)
      : service_(service), admin_key_(std::move(admin_key)), data_parallel_size_(data_parallel_size) {
    std::random_device entropy;
    instance_id_ = fmt::format("{:08x}{:08x}", entropy(), entropy());
  }

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const vllm::GetServerInfoRequest* /*request*/,
                                          vllm::ServerInfo* response) override {
    return Answer(*context, [&] {
      const Engine& engine = service_.engine();
      response->set_engine_version(SPILLWAY_VERSION);
      response->set_api_version("vllm");
      response->set_instance_id(instance_id_);
      vllm::ParallelismInfo& parallelism = *response->mutable_parallelism();
      parallelism.set_tensor_parallel_size(1);
      parallelism.set_pipeline_parallel_size(1);
      parallelism.set_data_parallel_size(static_cast<std::uint32_t>(data_parallel_size_));
      parallelism.set_decode_context_parallel_size(1);
      parallelism.set_world_size(static_cast<std::uint32_t>(data_parallel_size_));
      parallelism.set_data_parallel_size_local(static_cast<std::uint32_t>(data_parallel_size_));
      response->set_max_model_len(static_cast<std::uint32_t>(engine.options().max_model_len));
      response->set_kv_block_size(kBlockTokens);
      response->set_total_kv_blocks(static_cast<std::uint64_t>(engine.status().kv_blocks_total));
      response->set_max_running_requests(static_cast<std::uint64_t>(engine.options().max_num_seqs));
      response->set_max_batched_tokens(static_cast<std::uint64_t>(engine.options().max_num_batched_tokens));
    });
  }

  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const vllm::GetModelInfoRequest* /*request*/,
                                         vllm::ModelInfo* response) override {
    return Answer(*context, [&] {
      const std::vector<std::string>& names = service_.options().model_names;
      response->set_model_id(names.front());
      response->set_served_model_name(names.front());
      response->mutable_served_model_aliases()->Add(names.begin() + 1, names.end());
      response->set_supports_text_input(true);
      response->set_supports_token_ids_input(true);
    });
  }

 private:
  template <typename Fill>
  grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext& context, Fill fill) {
    grpc::ServerUnaryReactor* const reactor = context.DefaultReactor();
    grpc::Status status;
    if (admin_key_.empty()) {
      status = {grpc::StatusCode::UNIMPLEMENTED, "the control surface needs --admin-api-key"};
    } else {
      status = CheckKey(context, {admin_key_});
    }
    if (status.ok()) fill();
    reactor->Finish(status);
    return reactor;
  }

  spillway::Service& service_;
  const std::string admin_key_;
  const int data_parallel_size_;
  std::string instance_id_;
};

class GrpcFrontend : public Frontend {
 public:
  GrpcFrontend(spillway::Service& service, const FrontendOptions& options)
      : inference_(service, options.api_keys),
        control_(service, options.admin_api_key, options.data_parallel_size),
        health_(service) {}
  ~GrpcFrontend() override { Stop(absl::Now()); }

  absl::Status Listen(const FrontendOptions& options) {
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    grpc::ServerBuilder builder;
    const bool is_ipv6 = options.host.find(':') != std::string::npos;
    const std::string address =
        fmt::format("{}{}{}:{}", is_ipv6 ? "[" : "", options.host, is_ipv6 ? "]" : "", options.port);
    int bound = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &bound);
    builder.RegisterService(&inference_);
    builder.RegisterService(&control_);
    builder.RegisterService(&health_);
    builder.SetMaxReceiveMessageSize(static_cast<int>(options.max_body_bytes));
    builder.SetMaxSendMessageSize(-1);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // two servers on one port is a mistake
    builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, static_cast<int>(options.max_header_bytes));
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveTimeMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kLeastPingIntervalMs);
    server_ = builder.BuildAndStart();
    if (!server_ || bound == 0) {
      return absl::UnavailableError(
          fmt::format("gRPC cannot listen on {}: --grpc-port in use, or --host wrong", address));
    }
    port_ = static_cast<std::uint16_t>(bound);
    return absl::OkStatus();
  }

  std::uint16_t port() const override { return port_; }

  void Stop(absl::Time deadline) override {
    std::call_once(stopped_, [&] {
      health_.Close();
      if (server_) server_->Shutdown(absl::ToChronoTime(deadline));
    });
  }

 private:
  InferenceCalls inference_;
  ControlCalls control_;
  HealthCalls health_;
  std::unique_ptr<grpc::Server> server_;
  std::uint16_t port_ = 0;
  std::once_flag stopped_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Frontend>> MakeGrpcFrontend(spillway::Service& service, const FrontendOptions& options) {
  auto frontend = std::make_unique<GrpcFrontend>(service, options);
  if (const absl::Status status = frontend->Listen(options); !status.ok()) return status;
  return frontend;
}

}  // namespace spillway
