#pragma once

// Front ends: transports over one Service. Both are thin; neither knows the engine's insides.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/chat_template.h"
#include "server/metrics.h"
#include "server/service.h"

namespace spillway {

struct FrontendOptions {
  std::string host = "127.0.0.1";
  std::uint16_t port = 0;                  // 0: any free one
  std::vector<std::string> api_keys = {};  // empty: open. Compared in constant time, never logged.
  std::string admin_api_key = {};          // of the control surface; empty: it answers on an admin port only
  bool is_admin_port = false;              // the control surface answers without a key
  int data_parallel_size = 1;              // reported
  std::vector<std::pair<std::string, std::string>> configuration = {};  // reported, names and values
  std::size_t max_body_bytes = 32U << 20U;
  std::size_t max_header_bytes = 64U << 10U;
  absl::Duration header_timeout = absl::Seconds(30);  // a peer that does not finish its header or body is dropped
  absl::Duration idle_timeout = absl::Seconds(75);    // keep-alive
  absl::Duration write_timeout = absl::Seconds(30);   // a peer that stops reading is dropped and its requests cancelled
  std::int32_t max_connections = 16384;
  std::int32_t max_json_depth = 64;
};

class Frontend {
 public:
  virtual ~Frontend() = default;  // Stop
  virtual std::uint16_t port() const = 0;
  // Closes the listener, lets open streams end by `deadline`, then closes them. Any thread, once.
  virtual void Stop(absl::Time deadline) = 0;
};

// OpenAI-compatible HTTP. Everything passed by reference outlives the front end.
absl::StatusOr<std::unique_ptr<Frontend>> MakeHttpFrontend(Service& service, const ChatTemplate& chat_template,
                                                           Metrics& metrics, const FrontendOptions& options);
// vllm.Inference, vllm.Control (what exists), grpc.health.v1, reflection.
absl::StatusOr<std::unique_ptr<Frontend>> MakeGrpcFrontend(Service& service, const FrontendOptions& options);

}  // namespace spillway
