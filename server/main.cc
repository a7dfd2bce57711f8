#include <fmt/format.h>
#include <unistd.h>

#include <cstdio>

#include "server/commands.h"
#include "server/log.h"
#include "server/options.h"

namespace spillway {
namespace {

Environment ReadEnvironment() {
  Environment environment;
  for (char** entry = ::environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    const std::size_t equals = text.find('=');
    if (equals != std::string::npos) environment.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return environment;
}

int Main(const std::vector<std::string>& arguments) {
  const Environment environment = ReadEnvironment();
  const absl::StatusOr<CommandLine> line = ParseCommandLine(arguments, environment);
  if (!line.ok()) {
    fmt::print(stderr, "spillway: {}\nTry `spillway --help`.\n", std::string(line.status().message()));
    return kExitUsage;
  }
  if (!line->text.empty()) {
    fmt::print("{}", line->text);
    return 0;
  }
  std::string level = line->options.life.log_level;
  if (level == "auto") level = line->command == Command::kServe ? "info" : "warning";
  SetUpLog(line->options.life.log_format, level);
  for (const std::string& warning : line->warnings) Log(LogLevel::kWarning, warning);
  switch (line->command) {
    case Command::kServe:
      return ServeCommand(line->options, environment);
    case Command::kRun:
      return RunCommand(line->options, environment);
    case Command::kBenchThroughput:
      return BenchThroughputCommand(line->options, environment);
    case Command::kBenchServe:
      return BenchServeCommand(line->options, environment);
    case Command::kCheck:
      return CheckCommand(line->options, environment);
    case Command::kPlan:
      return PlanCommand(line->options, environment);
    case Command::kReplay:
      return ReplayCommand(line->options, environment);
    case Command::kFromVllm:
      fmt::print("{}", FromVllmPage());
      return 0;
  }
  return kExitUsage;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::Main({argv + 1, argv + argc}); }
