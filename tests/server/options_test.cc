#include "server/options.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <fstream>
#include <set>
#include <sstream>

#include "server/option_table.h"
#include "server/option_values.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr std::array kCommands = {Command::kServe, Command::kRun,  Command::kBenchThroughput, Command::kBenchServe,
                                  Command::kCheck, Command::kPlan, Command::kReplay};

std::vector<std::string> WordsOf(Command command) {
  switch (command) {
    case Command::kServe:
      return {"serve"};
    case Command::kRun:
      return {"run"};
    case Command::kBenchThroughput:
      return {"bench", "throughput"};
    case Command::kBenchServe:
      return {"bench", "serve"};
    case Command::kCheck:
      return {"check"};
    case Command::kFromVllm:
      return {"from-vllm"};
    case Command::kPlan:
      return {"plan"};
    case Command::kReplay:
      return {"replay"};
  }
  return {};
}

absl::StatusOr<CommandLine> Parse(std::vector<std::string> arguments, const Environment& environment = {}) {
  return ParseCommandLine(arguments, environment);
}

std::string ErrorOf(const absl::StatusOr<CommandLine>& line) {
  return line.ok() ? "(no error)" : std::string(line.status().message());
}

// A value that is allowed and is not the default; nullopt where only the default is allowed.
std::optional<std::string> OtherValue(const OptionRow& row) {
  const std::string preset = ShowOption(row, Options());
  if (row.least == row.most) return std::nullopt;
  if (row.kind == ValueKind::kFlag) return preset == "true" ? "false" : "true";
  for (const std::string_view choice : row.choices) {
    if (choice != preset) return std::string(choice);
  }
  if (row.kind == ValueKind::kText || row.kind == ValueKind::kTextList) return "another";
  for (const double value : {row.least, row.most}) {
    std::string text = fmt::format("{}", value);
    if (row.kind == ValueKind::kCount || row.kind == ValueKind::kBytes) {
      text = fmt::format("{}", static_cast<std::int64_t>(value));
    }
    Options options;
    if (AssignOption(row, {text}, "test", options).ok() && ShowOption(row, options) != preset) return text;
  }
  return std::nullopt;
}

class TemporaryFile {
 public:
  explicit TemporaryFile(std::string_view text) { folder_.Write("config.yaml", text); }
  std::string path() const { return folder_.File("config.yaml"); }

 private:
  TempFolder folder_;
};

TEST(OptionTable, NamesAreUniqueInEachCommand) {
  for (const Command command : kCommands) {
    std::set<std::string_view> names;
    for (const OptionRow& row : OptionTable()) {
      if (!Takes(row, command)) continue;
      EXPECT_TRUE(names.insert(row.name).second) << row.name;
      if (!row.alias.empty()) {
        EXPECT_TRUE(names.insert(row.alias).second) << row.alias;
      }
      EXPECT_FALSE(row.help.empty()) << row.name;
      EXPECT_FALSE(row.group.empty()) << row.name;
    }
  }
}

TEST(OptionTable, DefaultsAreInRange) {
  for (const OptionRow& row : OptionTable()) {
    const std::string preset = ShowOption(row, Options());
    if (preset.empty() || preset == "unset" || row.kind == ValueKind::kBytes) continue;
    Options options;
    EXPECT_TRUE(AssignOption(row, {preset}, "test", options).ok()) << row.name << " = " << preset;
    EXPECT_EQ(ShowOption(row, options), preset) << row.name;
  }
}

TEST(OptionTable, EveryRowIsSetByItsFlagItsVariableAndTheFile) {
  for (const Command command : kCommands) {
    for (const OptionRow& row : OptionTable()) {
      const std::optional<std::string> value = OtherValue(row);
      if (!Takes(row, command) || !value || row.name == "config") continue;
      SCOPED_TRACE(fmt::format("--{} {}", row.name, *value));
      Options expected;
      ASSERT_TRUE(AssignOption(row, {*value}, "test", expected).ok());

      std::vector<std::string> by_flag = WordsOf(command);
      if (row.kind == ValueKind::kFlag) {
        by_flag.push_back(fmt::format("--{}{}", *value == "false" ? "no-" : "", row.name));
      } else {
        by_flag.insert(by_flag.end(), {fmt::format("--{}", row.name), *value});
      }
      const auto flag = Parse(by_flag);
      ASSERT_TRUE(flag.ok()) << ErrorOf(flag);
      EXPECT_EQ(flag->command, command);
      EXPECT_EQ(ShowOption(row, flag->options), ShowOption(row, expected));
      EXPECT_NE(ShowOption(row, flag->options), ShowOption(row, Options()));

      const auto variable = Parse(WordsOf(command), {{VariableName(row), *value}});
      ASSERT_TRUE(variable.ok()) << ErrorOf(variable);
      EXPECT_EQ(ShowOption(row, variable->options), ShowOption(row, expected));

      const TemporaryFile file(fmt::format("{}: {}\n", row.name, *value));
      std::vector<std::string> by_file = WordsOf(command);
      by_file.insert(by_file.end(), {"--config", file.path()});
      const auto yaml = Parse(by_file);
      ASSERT_TRUE(yaml.ok()) << ErrorOf(yaml);
      EXPECT_EQ(ShowOption(row, yaml->options), ShowOption(row, expected));
    }
  }
}

TEST(OptionTable, ValuesOutOfRangeNameFlagValueAndLimit) {
  for (const Command command : kCommands) {
    for (const OptionRow& row : OptionTable()) {
      const bool is_bounded = row.least > std::numeric_limits<double>::lowest() || !row.choices.empty();
      if (!Takes(row, command) || !is_bounded) continue;
      std::vector<std::string> arguments = WordsOf(command);
      std::string value = "nonsense";
      if (row.choices.empty()) value = row.least > 0 ? "0" : "-9007199254740992";
      if (row.name == "seed") value = "nonsense";
      arguments.insert(arguments.end(), {fmt::format("--{}", row.name), value});
      const std::string error = ErrorOf(Parse(arguments));
      EXPECT_THAT(error, AllOf(HasSubstr(fmt::format("--{}", row.name)), HasSubstr(fmt::format("'{}'", value))));
      const std::string range = DescribeRange(row);
      EXPECT_THAT(error, HasSubstr(range));
    }
  }
}

TEST(OptionTable, EveryRefusedFlagGivesItsReasonAndIsNotTaken) {
  std::set<std::string_view> taken;
  for (const OptionRow& row : OptionTable()) {
    if (Takes(row, Command::kServe)) taken.insert(row.name);
  }
  std::set<std::string_view> names;
  for (const RefusedFlag& refused : RefusedFlags()) {
    EXPECT_TRUE(names.insert(refused.name).second) << refused.name << " is listed twice";
    EXPECT_FALSE(taken.contains(refused.name)) << refused.name;
    EXPECT_THAT(ErrorOf(Parse({"serve", "m", fmt::format("--{}", refused.name), "1"})),
                AllOf(HasSubstr(refused.name), HasSubstr(refused.reason)));
  }
}

TEST(OptionTable, RenamedFlagsGiveTheNewName) {
  int num_renamed = 0;
  for (const OptionRow& row : OptionTable()) {
    const std::string flag = fmt::format("--{}", row.name);
    if (!Takes(row, Command::kServe) || !row.vllm.starts_with("--") || row.vllm == flag) continue;
    ++num_renamed;
    EXPECT_THAT(ErrorOf(Parse({"serve", "m", std::string(row.vllm), "1"})), HasSubstr(flag));
  }
  EXPECT_GT(num_renamed, 0);
}

TEST(OptionTable, FromVllmPageIsCurrent) {
  std::ifstream file(SPILLWAY_SOURCE_DIR "/docs/from-vllm.md");
  std::ostringstream text;
  text << file.rdbuf();
  EXPECT_EQ(text.str(), FromVllmPage()) << "run `spillway from-vllm > docs/from-vllm.md`";
}

TEST(Options, ModelIsAnArgumentAndAFlag) {
  for (const char* command : {"serve", "run", "check"}) {
    EXPECT_EQ(Parse({command, "org/name"})->options.model.model, "org/name");
    EXPECT_EQ(Parse({command, "--model", "org/name"})->options.model.model, "org/name");
    EXPECT_EQ(Parse({command, "--port=1", "org/name"}).ok(), std::string_view(command) == "serve");
  }
  EXPECT_EQ(Parse({"run", "m", "-p", "Once upon"})->options.prompt.prompt, "Once upon");
  EXPECT_EQ(Parse({"run", "m", "-p", "-dashes"})->options.prompt.prompt, "-dashes");
}

TEST(Options, ListsAreRepeatedOrInARow) {
  EXPECT_THAT(Parse({"serve", "m", "--api-key", "a", "--api-key", "b"})->options.listen.api_keys,
              ElementsAre("a", "b"));
  EXPECT_THAT(Parse({"serve", "m", "--api-key", "a", "b"})->options.listen.api_keys, ElementsAre("a", "b"));
  EXPECT_THAT(Parse({"serve"}, {{"SPILLWAY_API_KEY", "a,b"}})->options.listen.api_keys, ElementsAre("a", "b"));
  EXPECT_THAT(Parse({"serve"}, {{"VLLM_API_KEY", "v"}})->options.listen.api_keys, ElementsAre("v"));
  const TemporaryFile file("served-model-name: [x, y]\n");
  EXPECT_THAT(Parse({"serve", "--config", file.path()})->options.model.served_names, ElementsAre("x", "y"));
}

TEST(Options, UnderscoresAreDashesAndTheLastValueStays) {
  EXPECT_EQ(Parse({"serve", "--max_num_seqs", "3"})->options.scheduling.max_num_seqs, 3);
  EXPECT_EQ(Parse({"serve", "--max_num_seqs=4"})->options.scheduling.max_num_seqs, 4);
  EXPECT_EQ(Parse({"serve", "--port", "1", "--port", "2"})->options.listen.port, 2);
  EXPECT_EQ(Parse({"serve", "--served-model-name=a_b"})->options.model.served_names.front(), "a_b");
}

TEST(Options, FlagGoesBeforeVariableBeforeFile) {
  const TemporaryFile file("port: 1\nmax_num_seqs: 11\nblock-size: 16\n");
  const Environment environment = {{"SPILLWAY_PORT", "2"}, {"SPILLWAY_MAX_NUM_SEQS", "22"}, {"SPILLWAY_HOST", "::1"}};
  const auto line = Parse({"serve", "--config", file.path(), "--port", "3"}, environment);
  ASSERT_TRUE(line.ok()) << ErrorOf(line);
  EXPECT_EQ(line->options.listen.port, 3);
  EXPECT_EQ(line->options.scheduling.max_num_seqs, 22);
  EXPECT_EQ(line->options.listen.host, "::1");
  const auto by_variable = Parse({"serve"}, {{"SPILLWAY_CONFIG", file.path()}});
  ASSERT_TRUE(by_variable.ok()) << ErrorOf(by_variable);
  EXPECT_EQ(by_variable->options.scheduling.max_num_seqs, 11);
}

TEST(Options, PythonHashSeedIsTheHashSeed) {
  EXPECT_EQ(Parse({"serve"}, {{"PYTHONHASHSEED", "42"}})->options.cache.prefix_hash_seed, "42");
  EXPECT_EQ(
      Parse({"serve"}, {{"PYTHONHASHSEED", "42"}, {"SPILLWAY_PREFIX_HASH_SEED", "7"}})->options.cache.prefix_hash_seed,
      "7");
}

TEST(Options, VllmsVariableAsksForBatchInvariance) {
  EXPECT_TRUE(Parse({"serve"}, {{"VLLM_BATCH_INVARIANT", "1"}})->options.device.batch_invariant);
}

TEST(Options, UnknownNamesGetTheNearestOne) {
  EXPECT_THAT(ErrorOf(Parse({"serve", "m", "--max-num-seq", "3"})),
              AllOf(HasSubstr("--max-num-seq"), HasSubstr("max-num-seqs")));
  EXPECT_THAT(ErrorOf(Parse({"serve", "m", "--prot=3"})), HasSubstr("did you mean port?"));
  EXPECT_THAT(ErrorOf(Parse({"serve", "m", "--zzzzzzzz"})),
              AllOf(HasSubstr("--zzzzzzzz"), Not(HasSubstr("did you mean"))));
  EXPECT_THAT(ErrorOf(Parse({"serve", "m", "another"})), HasSubstr("'another'"));
  const TemporaryFile file("max-num-sequences: 3\n");
  EXPECT_THAT(ErrorOf(Parse({"serve", "--config", file.path()})),
              AllOf(HasSubstr(file.path()), HasSubstr("did you mean max-num-seqs?")));
  const auto line = Parse({"serve"}, {{"SPILLWAY_MAX_NUM_SEQ", "3"}});
  ASSERT_TRUE(line.ok());
  EXPECT_THAT(line->warnings, ElementsAre(HasSubstr("SPILLWAY_MAX_NUM_SEQS")));
}

TEST(Options, VariablesOfKubernetesServicesAreNotOurs) {
  const auto line = Parse({"serve"}, {{"SPILLWAY_PORT", "tcp://10.0.0.1:80"},
                                      {"SPILLWAY_SERVICE_HOST", "10.0.0.1"},
                                      {"SPILLWAY_PORT_80_TCP", "tcp://10.0.0.1:80"}});
  ASSERT_TRUE(line.ok()) << ErrorOf(line);
  EXPECT_EQ(line->options.listen.port, 8000);
  EXPECT_TRUE(line->warnings.empty());
}

TEST(Options, BadValuesNameTheirSource) {
  EXPECT_THAT(ErrorOf(Parse({"serve"}, {{"SPILLWAY_PORT", "http"}})), HasSubstr("SPILLWAY_PORT: 'http'"));
  const TemporaryFile file("port: [1, 2]\n");
  EXPECT_THAT(ErrorOf(Parse({"serve", "--config", file.path()})), HasSubstr("port: takes one value"));
  const TemporaryFile broken("port: [1\n");
  EXPECT_THAT(ErrorOf(Parse({"serve", "--config", broken.path()})), HasSubstr(broken.path()));
  EXPECT_THAT(ErrorOf(Parse({"serve", "--config", "/nonexistent.yaml"})), HasSubstr("cannot read"));
  EXPECT_THAT(ErrorOf(Parse({"serve", "--port", "8000", "--grpc-port", "8000"})), HasSubstr("--grpc-port: 8000"));
  EXPECT_THAT(ErrorOf(Parse({"serve", "--port"})), HasSubstr("--port"));
  EXPECT_FALSE(Parse({}).ok());
  EXPECT_FALSE(Parse({"bench"}).ok());
}

TEST(Options, HelpAndVersionAreTexts) {
  EXPECT_THAT(Parse({"--version"})->text, HasSubstr("spillway "));
  const std::string help = Parse({"serve", "--help"})->text;
  for (const OptionRow& row : OptionTable()) {
    if (!Takes(row, Command::kServe)) continue;
    EXPECT_THAT(help, HasSubstr(fmt::format("--{}", row.name)));
  }
}

TEST(Options, ResolvedConfigurationHidesKeys) {
  const auto line = Parse({"serve", "m", "--api-key", "secret", "--admin-api-key", "secret2", "--max-num-seqs", "9"});
  ASSERT_TRUE(line.ok());
  std::string shown;
  for (const auto& [name, value] : ResolvedConfiguration(Command::kServe, line->options)) {
    shown += fmt::format("{}={}\n", name, value);
  }
  EXPECT_THAT(shown, AllOf(HasSubstr("max-num-seqs=9"), HasSubstr("api-key=(set)"), Not(HasSubstr("secret"))));
}

TEST(OptionValues, Sizes) {
  EXPECT_EQ(ParseSize("512"), 512);
  EXPECT_EQ(ParseSize("512k"), 512'000);
  EXPECT_EQ(ParseSize("1K"), 1024);
  EXPECT_EQ(ParseSize("1MiB"), 1 << 20);
  EXPECT_EQ(ParseSize("0.5GiB"), 1 << 29);
  EXPECT_EQ(ParseSize("25.6k"), 25'600);
  EXPECT_EQ(ParseSize("2GB"), 2'000'000'000);
  EXPECT_EQ(ParseSize("-1"), -1);
  for (const char* bad : {"", "k", "1.5", "1 MiB", "1Kib", "0x10", "1e99G", "nan", "99999999999999999999"}) {
    EXPECT_EQ(ParseSize(bad), std::nullopt) << bad;
  }
  EXPECT_EQ(ShowSize(1536), "1.5 KiB");
  EXPECT_EQ(ShowSize(12), "12 B");
}

TEST(OptionValues, Booleans) {
  EXPECT_EQ(ParseBool("True"), true);
  EXPECT_EQ(ParseBool("0"), false);
  EXPECT_EQ(ParseBool("maybe"), std::nullopt);
}

}  // namespace
}  // namespace spillway
