#include "server/openai_json.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/service.h"

namespace spillway {
namespace {

constexpr std::int64_t kMaxContainers = 1 << 20;  // empty ones are two bytes of text, but a hundred of memory

// Builds the document as nlohmann does, but stops at what its own parser lets pass.
class StrictBuilder : public nlohmann::detail::json_sax_dom_parser<Json> {
 public:
  StrictBuilder(Json& document, int max_depth) : json_sax_dom_parser(document, false), max_depth_(max_depth) {}

  bool start_object(std::size_t size) {
    keys_.emplace_back();
    return Open() && json_sax_dom_parser::start_object(size);
  }
  bool end_object() {
    keys_.pop_back();
    --depth_;
    return json_sax_dom_parser::end_object();
  }
  bool start_array(std::size_t size) { return Open() && json_sax_dom_parser::start_array(size); }
  bool end_array() {
    --depth_;
    return json_sax_dom_parser::end_array();
  }
  bool key(std::string& name) {
    if (!keys_.back().insert(name).second) {
      status_ = InvalidField(name, absl::StrCat("the field ", name, " is given twice"));
      return false;
    }
    return json_sax_dom_parser::key(name);
  }
  template <typename Exception>
  bool parse_error(std::size_t position, const std::string& token, const Exception& error) {
    json_sax_dom_parser::parse_error(position, token, error);
    std::string reason = error.what();  // "[json.exception...] parse error at line 1, column 9: syntax error ..."
    if (const std::size_t at = reason.find(": "); at != std::string::npos) reason.erase(0, at + 2);
    status_ = absl::InvalidArgumentError(absl::StrCat("the body is not valid JSON: at byte ", position, ": ", reason));
    return false;
  }
  const absl::Status& status() const { return status_; }

 private:
  bool Open() {
    if (++num_opened_ > kMaxContainers) {
      status_ =
          absl::InvalidArgumentError(absl::StrCat("the body holds more than ", kMaxContainers, " lists and objects"));
      return false;
    }
    if (++depth_ <= max_depth_) return true;
    status_ = absl::InvalidArgumentError(absl::StrCat("the body is nested deeper than ", max_depth_, " levels"));
    return false;
  }

  const int max_depth_;
  int depth_ = 0;
  std::int64_t num_opened_ = 0;
  std::vector<std::set<std::string>> keys_;
  absl::Status status_;
};

const char* ErrorType(int status) {
  switch (status) {
    case 400:
    case 413:
    case 431:
      return "BadRequestError";
    case 401:
      return "AuthenticationError";
    case 404:
      return "NotFoundError";
    case 405:
      return "MethodNotAllowedError";
    case 501:
      return "NotImplementedError";
    case 503:
      return "ServiceUnavailableError";
    default:
      return "InternalServerError";
  }
}

}  // namespace

absl::StatusOr<Json> ParseJson(std::string_view text, int max_depth) {
  Json document;
  StrictBuilder builder(document, max_depth);
  if (Json::sax_parse(text.begin(), text.end(), &builder)) return document;
  if (!builder.status().ok()) return builder.status();
  return absl::InvalidArgumentError("the body is not valid JSON");
}

void AppendJsonString(std::string& out, std::string_view text) {
  const auto is_plain = [](char c) { return c >= 0x20 && c < 0x7f && c != '"' && c != '\\'; };
  if (std::ranges::all_of(text, is_plain)) {
    out.push_back('"');
    out += text;
    out.push_back('"');
  } else {
    out += DumpJson(Json(text));
  }
}

std::string DumpJson(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

std::optional<std::int64_t> AsInt(const Json& value) {
  constexpr auto kLargest = std::numeric_limits<std::int64_t>::max();
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (number > static_cast<std::uint64_t>(kLargest)) return std::nullopt;
    return static_cast<std::int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<std::int64_t>();
  if (value.is_number_float()) {
    const auto number = value.get<double>();
    constexpr double kExact = 9007199254740992.0;  // 2^53
    if (std::abs(number) <= kExact && std::trunc(number) == number) return static_cast<std::int64_t>(number);
  }
  return std::nullopt;
}

const Json* FieldReader::Find(const char* name) {
  read_.insert(name);
  const auto found = object_.find(name);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<bool> FieldReader::Bool(const char* name) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_boolean()) return value->get<bool>();
  FailType(name, "a boolean", *value);
  return std::nullopt;
}

std::optional<std::int64_t> FieldReader::Int(const char* name) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  const auto number = AsInt(*value);
  if (!number) FailType(name, "an integer (64 bits)", *value);
  return number;
}

std::optional<double> FieldReader::Number(const char* name) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_number()) return value->get<double>();
  FailType(name, "a number", *value);
  return std::nullopt;
}

std::optional<std::string> FieldReader::String(const char* name) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (value->is_string()) return value->get<std::string>();
  FailType(name, "a string", *value);
  return std::nullopt;
}

std::vector<std::int64_t> FieldReader::Ints(const char* name) {
  const Json* value = Find(name);
  std::vector<std::int64_t> numbers;
  if (value == nullptr) return numbers;
  if (!value->is_array()) {
    FailType(name, "a list of integers", *value);
    return numbers;
  }
  for (const Json& item : *value) {
    const auto number = AsInt(item);
    if (!number) {
      FailType(name, "a list of integers", item);
      break;
    }
    numbers.push_back(*number);
  }
  return numbers;
}

std::vector<std::string> FieldReader::StringOrStrings(const char* name) {
  const Json* value = Find(name);
  if (value == nullptr) return {};
  if (value->is_string()) return {value->get<std::string>()};
  std::vector<std::string> strings;
  if (!value->is_array()) {
    FailType(name, "a string or a list of strings", *value);
    return strings;
  }
  for (const Json& item : *value) {
    if (!item.is_string()) {
      FailType(name, "a string or a list of strings", item);
      break;
    }
    strings.push_back(item.get<std::string>());
  }
  return strings;
}

void FieldReader::Fail(const std::string& name, const std::string& message) {
  if (status_.ok()) status_ = InvalidField(prefix_ + name, message);
}

void FieldReader::FailType(const char* name, const char* wanted, const Json& value) {
  std::string got = DumpJson(value);
  constexpr std::size_t kShown = 40;
  if (got.size() > kShown) got = absl::StrCat("a ", value.type_name());
  Fail(name, absl::StrCat(prefix_, name, " must be ", wanted, ", got ", got));
}

std::vector<std::string> FieldReader::Unread() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : object_.items()) {
    if (!value.is_null() && !read_.contains(name)) names.push_back(name);
  }
  return names;
}

std::string ErrorBody(int status, std::string_view message, const std::optional<std::string>& param) {
  std::string body = R"({"error":{"message":)";
  AppendJsonString(body, message);
  absl::StrAppend(&body, R"(,"type":")", ErrorType(status), R"(","param":)");
  if (param) {
    AppendJsonString(body, *param);
  } else {
    body += "null";
  }
  absl::StrAppend(&body, R"(,"code":)", status, "}}");
  return body;
}

HttpResponse ErrorResponse(int status, std::string_view message, const std::optional<std::string>& param) {
  HttpResponse response{.status = status, .body = ErrorBody(status, message, param), .headers = {}};
  if (status == 503) response.headers.emplace_back("Retry-After", "1");
  if (status == 401) response.headers.emplace_back("WWW-Authenticate", "Bearer");
  return response;
}

HttpResponse ErrorResponse(const absl::Status& status) {
  auto param = FieldOf(status);
  if (!param && absl::IsAlreadyExists(status)) param = "request_id";
  if (!param && absl::IsNotFound(status)) param = "model";
  return ErrorResponse(HttpStatusOf(status), std::string(status.message()), param);
}

int HttpStatusOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return 200;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kAlreadyExists:
      return 400;
    case absl::StatusCode::kUnauthenticated:
      return 401;
    case absl::StatusCode::kNotFound:
      return 404;
    case absl::StatusCode::kUnimplemented:
      return 501;
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnavailable:
      return 503;
    default:
      return 500;
  }
}

}  // namespace spillway
