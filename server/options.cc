#include "server/options.h"

#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <sstream>

#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "kernels/status_macros.h"
#include "server/option_table.h"
#include "server/option_values.h"

namespace spillway {
namespace {

using Given = std::map<const OptionRow*, std::vector<std::string>>;

// One (sub)command of the program and the values its flags were given.
struct Parser {
  Command command;
  CLI::App* app = nullptr;
  Given given;
};

template <typename... Values>
absl::Status Invalid(fmt::format_string<Values...> text, Values&&... values) {
  return absl::InvalidArgumentError(fmt::format(text, std::forward<Values>(values)...));
}

std::string Suggestion(const std::optional<std::string>& nearest) {
  return nearest ? fmt::format("; did you mean {}?", *nearest) : "";
}

std::string FlagNames(const OptionRow& row) {
  std::string names = fmt::format("--{}", row.name);
  if (!row.alias.empty()) names += fmt::format(",{}{}", row.alias.size() == 1 ? "-" : "--", row.alias);
  if (row.kind == ValueKind::kFlag) names += fmt::format(",!--no-{}", row.name);
  return names;
}

std::string DefaultText(const OptionRow& row) {
  if (!row.default_note.empty()) return std::string(row.default_note);
  return ShowOption(row, Options());
}

// "MODEL," where the option is also the command's argument, else nothing.
std::string ArgumentName(const OptionRow& row, Command command) {
  if (command == Command::kReplay) return row.name == "trace" ? "TRACE," : "";
  return row.name == "model" && command != Command::kBenchServe ? "MODEL," : "";
}

void AddFlags(Parser& parser) {
  for (const OptionRow& row : OptionTable()) {
    if (!Takes(row, parser.command)) continue;
    std::vector<std::string>& values = parser.given[&row];
    std::string help(row.help);
    const std::string argument = ArgumentName(row, parser.command);
    CLI::Option* option = nullptr;
    if (row.kind == ValueKind::kFlag) {
      option =
          parser.app->add_flag(FlagNames(row), values, help)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
    } else {
      option = parser.app->add_option(argument + FlagNames(row), values, help);
      if (row.kind == ValueKind::kTextList) {
        option->expected(1, 1 << 20);
      } else {
        option->expected(1)->allow_extra_args(false)->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
      }
      const std::string range = DescribeRange(row);
      const std::string preset = DefaultText(row);
      option->type_name((preset.empty() ? "" : fmt::format("[{}]", preset)) +
                        (range.empty() ? "" : fmt::format(" ({})", range)));
    }
    option->group(std::string(row.group));
  }
  parser.app->allow_extras();
}

std::vector<std::string> NamesOf(Command command) {
  std::vector<std::string> names;
  for (const OptionRow& row : OptionTable()) {
    if (!Takes(row, command)) continue;
    names.emplace_back(row.name);
    if (row.alias.size() > 1) names.emplace_back(row.alias);
    if (row.kind == ValueKind::kFlag) names.push_back(fmt::format("no-{}", row.name));
  }
  return names;
}

// Why `name` (without dashes) is not an option of `command`.
absl::Status UnknownName(std::string_view name, Command command, std::string_view source) {
  const std::string_view positive = name.starts_with("no-") ? name.substr(3) : name;
  for (const RefusedFlag& refused : RefusedFlags()) {
    if (command == Command::kServe && (refused.name == name || refused.name == positive)) {
      return Invalid("{}: vLLM's flag is not taken here: {}", source, refused.reason);
    }
  }
  for (const OptionRow& row : OptionTable()) {
    if (Takes(row, command) && row.vllm == fmt::format("--{}", name)) {
      return Invalid("{}: vLLM's flag is called --{} here", source, row.name);
    }
  }
  const std::optional<std::string> nearest = NearestName(name, NamesOf(command));
  return Invalid("{}: no such option{}", source, Suggestion(nearest));
}

absl::Status CheckExtras(const Parser& parser) {
  const std::vector<std::string> extras = parser.app->remaining();
  for (const std::string& extra : extras) {
    if (extra.size() < 2 || extra.front() != '-') continue;
    const std::string flag = extra.substr(0, extra.find('='));
    return UnknownName(flag.substr(std::min(flag.find_first_not_of('-'), flag.size())), parser.command, flag);
  }
  if (!extras.empty()) {
    return Invalid("'{}': one argument too many", extras.front());
  }
  return absl::OkStatus();
}

// vLLM takes --max_num_seqs for --max-num-seqs, and so do we.
std::string WithDashes(const std::string& argument) {
  if (!argument.starts_with("--")) return argument;
  const std::size_t end = std::min(argument.find('='), argument.size());
  return absl::StrReplaceAll(argument.substr(0, end), {{"_", "-"}}) + argument.substr(end);
}

absl::Status ApplyYaml(const std::string& path, Command command, Options& options) {
  YAML::Node root;
  try {
    root = YAML::LoadFile(path);
  } catch (const YAML::BadFile&) {
    return Invalid("--config: cannot read '{}'", path);
  } catch (const YAML::Exception& error) {
    return Invalid("--config: {}: {}", path, error.what());
  }
  if (!root.IsMap() && !root.IsNull()) {
    return Invalid("--config: {}: not a map of option names and values", path);
  }
  for (const auto& entry : root) {
    if (!entry.first.IsScalar()) {
      return Invalid("--config: {}: a key is not a name", path);
    }
    const std::string name = absl::StrReplaceAll(entry.first.Scalar(), {{"_", "-"}});
    const std::string source = fmt::format("{}: {}", path, entry.first.Scalar());
    const auto row = std::ranges::find_if(OptionTable(), [&](const OptionRow& candidate) {
      return Takes(candidate, command) && (candidate.name == name || (name.size() > 1 && candidate.alias == name));
    });
    if (row == OptionTable().end() || row->name == "config") return UnknownName(name, command, source);
    std::vector<std::string> values;
    if (entry.second.IsScalar()) values.push_back(entry.second.Scalar());
    if (entry.second.IsSequence()) {
      for (const YAML::Node& item : entry.second) {
        if (!item.IsScalar()) return Invalid("{}: not a list of plain values", source);
        values.push_back(item.Scalar());
      }
    }
    if (values.size() > 1 && row->kind != ValueKind::kTextList) {
      return Invalid("{}: takes one value, not {}", source, values.size());
    }
    RETURN_IF_ERROR(AssignOption(*row, values, source, options));
  }
  return absl::OkStatus();
}

// The variable of `row`, and its value, where it is set. Kubernetes sets SPILLWAY_PORT=tcp://... in every pod beside a
// Service that is called spillway: such values are not ours.
std::optional<std::pair<std::string, std::string>> FromEnvironment(const OptionRow& row,
                                                                   const Environment& environment) {
  for (const std::string& name : {VariableName(row), std::string(row.environment)}) {
    const auto found = environment.find(name);
    if (name.empty() || found == environment.end() || found->second.empty()) continue;
    if (found->second.find("://") != std::string::npos) continue;
    return *found;
  }
  return std::nullopt;
}

absl::Status ApplyEnvironment(Command command, const Environment& environment, Options& options) {
  for (const OptionRow& row : OptionTable()) {
    if (!Takes(row, command)) continue;
    const auto variable = FromEnvironment(row, environment);
    if (!variable) continue;
    const auto& [name, value] = *variable;
    std::vector<std::string> values = {value};
    if (row.kind == ValueKind::kTextList) values = absl::StrSplit(value, ',', absl::SkipWhitespace());
    RETURN_IF_ERROR(AssignOption(row, values, name, options));
  }
  return absl::OkStatus();
}

std::string ConfigPath(const Parser& parser, const Environment& environment) {
  for (const auto& [row, values] : parser.given) {
    if (row->name != "config") continue;
    if (!values.empty()) return values.back();
    if (const auto variable = FromEnvironment(*row, environment)) return variable->second;
  }
  return "";
}

std::vector<std::string> UnknownVariables(const Environment& environment) {
  std::vector<std::string> known;
  for (const OptionRow& row : OptionTable()) known.push_back(VariableName(row));
  std::vector<std::string> warnings;
  for (const auto& [name, value] : environment) {
    if (!name.starts_with("SPILLWAY_") || std::ranges::find(known, name) != known.end()) continue;
    // What Kubernetes sets for a Service that is called spillway.
    if (name.starts_with("SPILLWAY_SERVICE_") || name.starts_with("SPILLWAY_PORT_")) continue;
    warnings.push_back(fmt::format("the variable {} means nothing{}", name, Suggestion(NearestName(name, known))));
  }
  return warnings;
}

absl::Status CheckTogether(Command command, const Options& options) {
  const ListenChoice& listen = options.listen;
  if (command == Command::kServe && listen.port != 0 && listen.port == listen.grpc_port) {
    return Invalid("--grpc-port: {} is --port already", listen.grpc_port);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CommandLine> ParseCommandLine(const std::vector<std::string>& arguments,
                                             const Environment& environment) {
  CLI::App app("Spillway: an LLM server with vLLM's interfaces.", "spillway");
  app.set_version_flag("--version", "spillway " SPILLWAY_VERSION);
  app.require_subcommand(1);
  CLI::App* bench = app.add_subcommand("bench", "Measure: throughput in this process, or a server over HTTP");
  bench->require_subcommand(1);
  std::array<Parser, 8> parsers = {{
      {Command::kServe, app.add_subcommand("serve", "Serve a model over HTTP (OpenAI's API) and gRPC"), {}},
      {Command::kRun, app.add_subcommand("run", "Complete one prompt, or chat, in the terminal"), {}},
      {Command::kCheck, app.add_subcommand("check", "Test a model folder: files, tokenizer, generation, cache"), {}},
      {Command::kBenchThroughput,
       bench->add_subcommand("throughput", "Random prompts through the engine, no server"),
       {}},
      {Command::kBenchServe, bench->add_subcommand("serve", "Random prompts against a running server"), {}},
      {Command::kPlan,
       app.add_subcommand("plan", "What a model's KV costs on a machine, and what loading it saves"),
       {}},
      {Command::kReplay, app.add_subcommand("replay", "A recorded trace on a described machine, in modelled time"), {}},
      {Command::kFromVllm, app.add_subcommand("from-vllm", "Print what became of each flag of `vllm serve`"), {}},
  }};
  for (Parser& parser : parsers) AddFlags(parser);

  std::vector<std::string> reversed;  // CLI11 takes them from the back
  for (const std::string& argument : arguments) reversed.insert(reversed.begin(), WithDashes(argument));
  try {
    app.parse(reversed);
  } catch (const CLI::ParseError& error) {
    std::ostringstream out;
    std::ostringstream err;
    if (app.exit(error, out, err) == 0) {
      CommandLine shown;
      shown.text = out.str();
      return shown;
    }
    return Invalid("{}", error.what());
  }

  const auto parser = std::ranges::find_if(parsers, [](const Parser& each) { return each.app->parsed(); });
  if (parser == parsers.end()) return Invalid("no command");
  RETURN_IF_ERROR(CheckExtras(*parser));

  CommandLine line;
  line.command = parser->command;
  // The file first, then variables, then flags: the last one stays.
  const std::string config = ConfigPath(*parser, environment);
  if (!config.empty()) RETURN_IF_ERROR(ApplyYaml(config, line.command, line.options));
  RETURN_IF_ERROR(ApplyEnvironment(line.command, environment, line.options));
  for (const auto& [row, values] : parser->given) {
    if (values.empty()) continue;
    if (!ArgumentName(*row, line.command).empty() && values.size() > 1)
      return Invalid("'{}': one argument too many", values.back());
    RETURN_IF_ERROR(AssignOption(*row, values, fmt::format("--{}", row->name), line.options));
  }
  RETURN_IF_ERROR(CheckTogether(line.command, line.options));
  line.warnings = UnknownVariables(environment);
  return line;
}

std::vector<std::pair<std::string, std::string>> ResolvedConfiguration(Command command, const Options& options) {
  std::vector<std::pair<std::string, std::string>> shown;
  for (const OptionRow& row : OptionTable()) {
    if (!Takes(row, command)) continue;
    std::string value = ShowOption(row, options);
    if (row.is_secret) value = value.empty() ? "" : "(set)";
    shown.emplace_back(row.name, std::move(value));
  }
  return shown;
}

}  // namespace spillway
