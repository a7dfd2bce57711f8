#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <thread>

#include "absl/time/clock.h"
#include "engine/model.h"
#include "server/commands.h"
#include "server/engine_host.h"
#include "server/event_pipe.h"
#include "server/frontend.h"
#include "server/log.h"
#include "server/option_values.h"
#include "server/watchdog.h"

namespace spillway {
namespace {

constexpr absl::Duration kCloseTimeout = absl::Seconds(5);  // for connections, once every request has ended
constexpr absl::Duration kFailureGrace = absl::Seconds(2);  // for errors and a failing /health to be read

FrontendOptions FrontendOptionsOf(const Options& options, std::int64_t port) {
  FrontendOptions frontend;
  frontend.host = options.listen.host;
  frontend.port = static_cast<std::uint16_t>(port);
  frontend.api_keys = options.listen.api_keys;
  frontend.admin_api_key = options.listen.admin_api_key;
  frontend.data_parallel_size = static_cast<int>(options.device.data_parallel_size);
  frontend.configuration = ResolvedConfiguration(Command::kServe, options);
  frontend.max_body_bytes = static_cast<std::size_t>(options.limit.max_body_bytes);
  frontend.max_header_bytes = static_cast<std::size_t>(options.limit.max_header_bytes);
  frontend.header_timeout = absl::Seconds(options.limit.header_timeout);
  frontend.idle_timeout = absl::Seconds(options.limit.idle_timeout);
  frontend.write_timeout = absl::Seconds(options.limit.write_timeout);
  frontend.max_connections = static_cast<std::int32_t>(options.limit.max_connections);
  frontend.max_json_depth = static_cast<std::int32_t>(options.limit.max_json_depth);
  return frontend;
}

struct Frontends {
  std::unique_ptr<Frontend> http;
  std::unique_ptr<Frontend> grpc;   // null: off
  std::unique_ptr<Frontend> admin;  // likewise

  void Stop(absl::Time deadline) const {
    std::thread other;
    if (grpc) other = std::thread([&] { grpc->Stop(deadline); });
    http->Stop(deadline);
    if (admin) admin->Stop(deadline);
    if (grpc) other.join();
  }
};

absl::StatusOr<Frontends> MakeFrontends(const Options& options, EngineHost& host) {
  Frontends frontends;
  auto http = MakeHttpFrontend(*host.service, *host.chat_template, *host.metrics,
                               FrontendOptionsOf(options, options.listen.port));
  if (!http.ok()) return http.status();
  frontends.http = *std::move(http);
  if (options.listen.grpc_port >= 0) {
    auto grpc = MakeGrpcFrontend(*host.service, FrontendOptionsOf(options, options.listen.grpc_port));
    if (!grpc.ok()) return grpc.status();
    frontends.grpc = *std::move(grpc);
  }
  if (options.listen.admin_port >= 0) {
    FrontendOptions admin_options = FrontendOptionsOf(options, options.listen.admin_port);
    admin_options.is_admin_port = true;
    auto admin = MakeHttpFrontend(*host.service, *host.chat_template, *host.metrics, admin_options);
    if (!admin.ok()) return admin.status();
    frontends.admin = *std::move(admin);
  }
  return frontends;
}

std::string Address(const std::string& host, std::uint16_t port) {
  const bool is_ipv6 = host.find(':') != std::string::npos;
  return is_ipv6 ? fmt::format("[{}]:{}", host, port) : fmt::format("{}:{}", host, port);
}

void LogReady(const Options& options, const EngineHost& host, const Frontends& frontends, absl::Time begin) {
  const Engine& engine = *host.engine;
  LogFields fields = {{"http", "http://" + Address(options.listen.host, frontends.http->port())}};
  if (frontends.grpc) fields.emplace_back("grpc", Address(options.listen.host, frontends.grpc->port()));
  if (frontends.admin) {
    fields.emplace_back("admin", "http://" + Address(options.listen.host, frontends.admin->port()));
  }
  fields.emplace_back("model", host.service->options().model_names.front());
  fields.emplace_back("device", host.device().description());
  fields.emplace_back("max_model_len", fmt::format("{}", engine.options().max_model_len));
  fields.emplace_back("kv_cache", ShowSize(engine.options().kv_cache_bytes));
  fields.emplace_back("capacity_tokens", fmt::format("{}", engine.capacity_tokens()));
  if (host.devices.size() > 1) fields.emplace_back("engines", fmt::format("{}", host.devices.size()));
  const TierStats tier = engine.options().host_tier->stats();
  const auto block_bytes = static_cast<std::int64_t>(engine.model().kv_layout().block_bytes());
  fields.emplace_back("host_tier", ShowSize(tier.capacity_bytes));
  fields.emplace_back("host_tier_tokens", fmt::format("{}", tier.capacity_bytes / block_bytes * kBlockTokens));
  if (host.file_tier) {
    const std::int64_t bytes = host.file_tier->stats().capacity_bytes;
    fields.emplace_back("file_tier", ShowSize(bytes));
    fields.emplace_back("file_tier_tokens", fmt::format("{}", bytes / block_bytes * kBlockTokens));
  }
  const EngineStatus status = engine.status();
  fields.emplace_back("longest_sequence_tokens",
                      fmt::format("{}", engine.capacity_tokens() + status.home_blocks_max * kBlockTokens));
  fields.emplace_back("streaming_buffers", ShowSize(status.home_buffer_bytes));
  fields.emplace_back("seconds", fmt::format("{:.3f}", absl::ToDoubleSeconds(absl::Now() - begin)));
  Log(LogLevel::kInfo, "ready", fields);
}

// The built-in demo model brings a request along: a long document with a question about it.
void LogExample(const EngineHost& host, const std::string& address) {
  const std::string file = host.folder + "/example.json";
  std::error_code error;
  if (!std::filesystem::is_regular_file(file, error)) return;
  Log(LogLevel::kInfo, "ask it something",
      {{"try",
        fmt::format("curl http://{}/v1/chat/completions -H 'Content-Type: application/json' -d @{}", address, file)}});
}

int Fail(const absl::Status& status) {
  Log(LogLevel::kError, std::string(status.message()), {{"code", absl::StatusCodeToString(status.code())}});
  return kExitFailed;
}

// The engine may be stuck for good, so nothing waits for it: clients are told, then the process ends.
[[noreturn]] void EndAfterEngineFailure(Service& service, const Frontends& frontends, const EventPipe& events) {
  const std::string failure = service.engine().status().failure;
  Log(LogLevel::kError, "the engine has failed; exiting", {{"failure", failure}});
  service.FailAll(absl::InternalError(fmt::format("the engine has failed: {}", failure)));
  for (const absl::Time deadline = absl::Now() + kFailureGrace;;) {
    const std::optional<ServerEvent> event = events.Await(deadline);
    if (!event || event == ServerEvent::kSignal) break;
  }
  frontends.Stop(absl::Now());
  std::_Exit(kExitEngineFailed);
}

}  // namespace

int ServeCommand(const Options& options, const Environment& environment) {
  const absl::Time begin = absl::Now();
  LogFields configuration;
  for (auto& [name, value] : ResolvedConfiguration(Command::kServe, options)) configuration.emplace_back(name, value);
  Log(LogLevel::kInfo, "configuration", configuration);

  EventPipe events;
  if (const absl::Status status = events.Open(); !status.ok()) return Fail(status);
  auto host = MakeEngineHost(options, environment);
  if (!host.ok()) return Fail(host.status());
  Service& service = *host->service;
  auto frontends = MakeFrontends(options, *host);
  if (!frontends.ok()) return Fail(frontends.status());
  if (const absl::Status status = events.CatchSignals(); !status.ok()) return Fail(status);
  const absl::Duration interval = absl::Seconds(std::min(1.0, options.life.engine_stall_timeout / 4));
  const Watchdog watchdog(*host->engine, interval,
                          [&events](const std::string&) { events.Post(ServerEvent::kEngineFailed); });
  LogReady(options, *host, *frontends, begin);
  if (options.model.model.empty()) LogExample(*host, Address(options.listen.host, frontends->http->port()));

  std::thread drain;
  while (true) {
    const std::optional<ServerEvent> event = events.Await(absl::InfiniteFuture());
    if (event == ServerEvent::kEngineFailed) EndAfterEngineFailure(service, *frontends, events);
    if (event == ServerEvent::kDrained) break;
    if (drain.joinable()) std::_Exit(kExitInterrupted);
    const absl::Duration timeout = absl::Seconds(options.life.shutdown_timeout);
    Log(LogLevel::kInfo, "draining; a second signal exits at once",
        {{"live", fmt::format("{}", service.num_live())}, {"timeout", absl::FormatDuration(timeout)}});
    drain = std::thread([&service, &events, timeout] {
      service.Drain(absl::Now() + timeout);
      events.Post(ServerEvent::kDrained);
    });
  }
  drain.join();
  frontends->Stop(absl::Now() + kCloseTimeout);
  Log(LogLevel::kInfo, "stopped");
  return 0;
}

}  // namespace spillway
