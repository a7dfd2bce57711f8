#include "server/log.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <spdlog/formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <nlohmann/json.hpp>

namespace spillway {
namespace {

// Parts message and fields inside one spdlog payload, and field from field; none of them holds it.
constexpr char kPart = '\x1f';

spdlog::level::level_enum ToSpdlog(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return spdlog::level::debug;
    case LogLevel::kInfo:
      return spdlog::level::info;
    case LogLevel::kWarning:
      return spdlog::level::warn;
    case LogLevel::kError:
      return spdlog::level::err;
  }
  return spdlog::level::info;
}

std::vector<std::string_view> SplitParts(std::string_view payload) {
  std::vector<std::string_view> parts;
  while (true) {
    const std::size_t end = payload.find(kPart);
    parts.push_back(payload.substr(0, end));
    if (end == std::string_view::npos) return parts;
    payload.remove_prefix(end + 1);
  }
}

class LineFormatter : public spdlog::formatter {
 public:
  explicit LineFormatter(LogFormat format) : format_(format) {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    const auto since_epoch = std::chrono::duration_cast<std::chrono::milliseconds>(message.time.time_since_epoch());
    const std::string time =
        fmt::format("{:%Y-%m-%dT%H:%M:%S}.{:03}Z", fmt::gmtime(since_epoch.count() / 1000), since_epoch.count() % 1000);
    const auto name = spdlog::level::to_string_view(message.level);
    const std::string_view level(name.data(), name.size());
    const auto parts = SplitParts({message.payload.data(), message.payload.size()});
    std::string line;
    if (format_ == LogFormat::kJson) {
      nlohmann::ordered_json object = {{"time", time}, {"level", level}, {"message", parts[0]}};
      for (std::size_t i = 1; i + 1 < parts.size(); i += 2) object[std::string(parts[i])] = parts[i + 1];
      line = object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
    } else {
      line = fmt::format("{} {:<7} {}", time, level, parts[0]);
      for (std::size_t i = 1; i + 1 < parts.size(); i += 2) line += fmt::format("  {}={}", parts[i], parts[i + 1]);
    }
    line += '\n';
    out.append(line.data(), line.data() + line.size());
  }

  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<LineFormatter>(format_); }

 private:
  const LogFormat format_;
};

}  // namespace

void SetUpLog(LogFormat format, LogLevel least) {
  auto logger = std::make_shared<spdlog::logger>("spillway", std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_formatter(std::make_unique<LineFormatter>(format));
  logger->set_level(ToSpdlog(least));
  logger->flush_on(spdlog::level::debug);
  spdlog::set_default_logger(std::move(logger));
}

void SetUpLog(std::string_view format, std::string_view level) {
  const bool is_text = format == "text" || (format == "auto" && ::isatty(STDERR_FILENO) != 0);
  LogLevel least = LogLevel::kInfo;
  if (level == "debug") least = LogLevel::kDebug;
  if (level == "warning") least = LogLevel::kWarning;
  if (level == "error") least = LogLevel::kError;
  SetUpLog(is_text ? LogFormat::kText : LogFormat::kJson, least);
}

void Log(LogLevel level, std::string_view message, const LogFields& fields) {
  std::string payload(message);
  for (const auto& [name, value] : fields) {
    payload += kPart;
    payload += name;
    payload += kPart;
    payload += value;
  }
  spdlog::default_logger_raw()->log(ToSpdlog(level), "{}", payload);
}

}  // namespace spillway
