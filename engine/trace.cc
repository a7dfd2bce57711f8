#include "engine/trace.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

constexpr std::int64_t kMaxLength = 16 << 20;
constexpr std::int64_t kMaxId = (std::int64_t{1} << 31) / kTraceIdTokens - 1;

absl::StatusOr<std::int32_t> IntegerOf(const json& line, const char* key, std::int64_t least, std::int64_t most) {
  const auto found = line.find(key);
  if (found == line.end() || !found->is_number_integer()) {
    return absl::InvalidArgumentError(absl::StrCat(key, " is missing or not a whole number"));
  }
  const auto value = found->get<std::int64_t>();
  if (value < least || value > most) {
    return absl::InvalidArgumentError(absl::StrCat(key, " is ", value, ", wanted ", least, " to ", most));
  }
  return static_cast<std::int32_t>(value);
}

absl::StatusOr<TraceRequest> ReadJsonLine(const std::string& text) {
  const json line = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!line.is_object()) return absl::InvalidArgumentError("not a JSON object");
  TraceRequest request;
  const auto timestamp = line.find("timestamp");
  if (timestamp == line.end() || !timestamp->is_number()) {
    return absl::InvalidArgumentError("timestamp is missing or not a number");
  }
  request.arrival_seconds = timestamp->get<double>() / 1000;
  ASSIGN_OR_RETURN(request.prompt_tokens, IntegerOf(line, "input_length", 1, kMaxLength));
  ASSIGN_OR_RETURN(request.output_tokens, IntegerOf(line, "output_length", 1, kMaxLength));
  const auto ids = line.find("hash_ids");
  const auto wanted = static_cast<std::size_t>((request.prompt_tokens + kTraceIdTokens - 1) / kTraceIdTokens);
  if (ids == line.end() || !ids->is_array() || ids->size() != wanted) {
    return absl::InvalidArgumentError(absl::StrCat("hash_ids is not a list of ", wanted, " ids, one for each ",
                                                   kTraceIdTokens, " tokens of input_length ", request.prompt_tokens));
  }
  for (const json& id : *ids) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() > kMaxId) {
      return absl::InvalidArgumentError(absl::StrCat("hash_ids holds ", id.dump(), ", wanted 0 to ", kMaxId));
    }
    request.ids.push_back(id.get<std::int32_t>());
  }
  return request;
}

// "2023-11-16 18:17:03.9799600,4808,10". Ids are given out from `next_id`.
absl::StatusOr<TraceRequest> ReadCsvLine(const std::string& text, std::int32_t& next_id) {
  const std::vector<std::string> fields = absl::StrSplit(text, ',');
  TraceRequest request;
  absl::Time time;
  std::string error;
  if (fields.size() != 3 || !absl::ParseTime("%E4Y-%m-%d %H:%M:%E*S", fields[0], absl::UTCTimeZone(), &time, &error)) {
    return absl::InvalidArgumentError("wanted TIMESTAMP,ContextTokens,GeneratedTokens");
  }
  request.arrival_seconds = absl::ToDoubleSeconds(time - absl::UnixEpoch());
  for (const auto& [field, value] : {std::pair(1, &request.prompt_tokens), std::pair(2, &request.output_tokens)}) {
    const std::string& digits = fields[static_cast<std::size_t>(field)];
    if (!absl::SimpleAtoi(digits, value) || *value < 1 || *value > kMaxLength) {
      return absl::InvalidArgumentError(absl::StrCat("'", digits, "' is not a number from 1 to ", kMaxLength));
    }
  }
  for (std::int32_t covered = 0; covered < request.prompt_tokens; covered += kTraceIdTokens) {
    if (next_id > kMaxId) return absl::InvalidArgumentError(absl::StrCat("more than ", kMaxId, " prompt parts"));
    request.ids.push_back(next_id++);
  }
  return request;
}

std::uint32_t Mix(std::uint64_t value) {  // splitmix64's finalizer
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9U;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebU;
  return static_cast<std::uint32_t>((value ^ (value >> 31)) >> 32);
}

}  // namespace

absl::StatusOr<Trace> ReadTrace(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open the trace '", path, "'"));
  Trace trace;
  trace.name = path.substr(path.rfind('/') + 1);
  std::string line;
  bool is_csv = false;
  std::int32_t next_id = 0;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string text(absl::StripAsciiWhitespace(line));
    if (text.empty()) continue;
    if (number == 1 && text.starts_with("TIMESTAMP,")) {
      is_csv = true;
      continue;
    }
    absl::StatusOr<TraceRequest> request = is_csv ? ReadCsvLine(text, next_id) : ReadJsonLine(text);
    if (!request.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ":", number, ": ", request.status().message()));
    }
    trace.requests.push_back(*std::move(request));
  }
  if (trace.requests.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": no requests"));
  std::ranges::stable_sort(trace.requests, {}, &TraceRequest::arrival_seconds);
  const double first = trace.requests.front().arrival_seconds;
  for (TraceRequest& request : trace.requests) request.arrival_seconds -= first;
  return trace;
}

std::vector<std::int32_t> PromptOf(const Trace& trace, const TraceRequest& request, std::int32_t vocab) {
  const auto id_tokens = static_cast<std::size_t>(trace.id_tokens);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(request.prompt_tokens));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::int32_t id = request.ids[i / id_tokens];
    const auto unique = id * kTraceIdTokens + static_cast<std::int32_t>(i % id_tokens);
    tokens[i] =
        vocab == 0
            ? unique
            : static_cast<std::int32_t>(Mix(static_cast<std::uint64_t>(unique)) % static_cast<std::uint32_t>(vocab));
  }
  return tokens;
}

}  // namespace spillway
