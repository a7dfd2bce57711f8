#pragma once

// Log lines on stderr, through spdlog's default logger: text for people, or one JSON object a line.

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace spillway {

enum class LogFormat : unsigned char { kText, kJson };
enum class LogLevel : unsigned char { kDebug, kInfo, kWarning, kError };

using LogFields = std::vector<std::pair<std::string, std::string>>;

// Once, before other threads log. Lines of plain spdlog calls get the same form, without fields.
void SetUpLog(LogFormat format, LogLevel least);
// From the values of --log-format ("auto" is text on a terminal) and --log-level.
void SetUpLog(std::string_view format, std::string_view level);

// Any thread. JSON: {"time", "level", "message", fields...}; text: time, level, message, name=value ...
void Log(LogLevel level, std::string_view message, const LogFields& fields = {});

}  // namespace spillway
