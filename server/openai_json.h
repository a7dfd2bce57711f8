#pragma once

// JSON bodies of the OpenAI protocol: strict parsing, typed fields, error bodies.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/http_server.h"

namespace spillway {

using Json = nlohmann::json;

// INVALID_ARGUMENT: not JSON (names the byte), not UTF-8, an object with a key twice (the field), nested beyond
// `max_depth`.
absl::StatusOr<Json> ParseJson(std::string_view text, int max_depth);

// With quotes and escapes; bytes that are no UTF-8 become U+FFFD.
void AppendJsonString(std::string& out, std::string_view text);
std::string DumpJson(const Json& value);

// Reads the fields of an object. null counts as absent. The first field that is wrong is kept in status().
class FieldReader {
 public:
  explicit FieldReader(const Json& object, std::string prefix = "") : object_(object), prefix_(std::move(prefix)) {}

  const Json* Find(const char* name);
  std::optional<bool> Bool(const char* name);
  std::optional<std::int64_t> Int(const char* name);  // 3 and 3.0
  std::optional<double> Number(const char* name);
  std::optional<std::string> String(const char* name);
  std::vector<std::int64_t> Ints(const char* name);
  std::vector<std::string> StringOrStrings(const char* name);

  void Fail(const std::string& name, const std::string& message);
  const absl::Status& status() const { return status_; }
  std::vector<std::string> Unread() const;  // names of fields that nobody asked for, null ones left out

 private:
  void FailType(const char* name, const char* wanted, const Json& value);

  const Json& object_;
  const std::string prefix_;
  std::set<std::string> read_;
  absl::Status status_;
};

std::optional<std::int64_t> AsInt(const Json& value);

// {"error": {"message", "type", "param", "code"}}
std::string ErrorBody(int status, std::string_view message, const std::optional<std::string>& param);
HttpResponse ErrorResponse(int status, std::string_view message,
                           const std::optional<std::string>& param = std::nullopt);
HttpResponse ErrorResponse(const absl::Status& status);
int HttpStatusOf(const absl::Status& status);

}  // namespace spillway
