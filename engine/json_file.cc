#include "engine/json_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

using nlohmann::json;

// Deepest nesting of brackets outside strings. Counted on the bytes, so that no recursion of a parser or a destructor
// depends on the file.
std::size_t Depth(std::string_view text) {
  std::size_t depth = 0;
  std::size_t deepest = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if ((c == ']' || c == '}') && depth > 0) {
      --depth;
    }
  }
  return deepest;
}

absl::Status WrongMember(const std::string& where, const char* key, const json& value, const std::string& wanted) {
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", key, " is ", Shown(value), ", wanted ", wanted));
}

}  // namespace

std::string Excerpt(std::string_view text) {
  constexpr std::size_t kLimit = 160;
  std::string shown(text.substr(0, kLimit));
  for (char& c : shown) {
    if (c < 0x20 || c == 0x7f) c = '?';
  }
  if (text.size() > kLimit) shown += "...";
  return shown;
}

std::string Shown(const json& value) {
  if (value.is_structured()) return absl::StrCat("an ", value.type_name(), " of ", value.size());
  return Excerpt(value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace));
}

absl::StatusOr<json> ParseJson(std::string_view text, const std::string& where, DuplicateKeys duplicates) {
  if (const std::size_t depth = Depth(text); depth > kMaxJsonDepth) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": JSON nested ", depth, " levels deep, the limit is ", kMaxJsonDepth));
  }
  try {
    if (duplicates == DuplicateKeys::kLastWins) return json::parse(text);
    std::vector<std::set<std::string>> open_objects;
    std::string duplicate;
    bool has_duplicate = false;
    const auto watch_keys = [&](int, json::parse_event_t event, json& parsed) {
      if (event == json::parse_event_t::object_start) open_objects.emplace_back();
      if (event == json::parse_event_t::object_end) open_objects.pop_back();
      if (event == json::parse_event_t::key && !has_duplicate) {
        has_duplicate = !open_objects.back().insert(parsed.get_ref<const std::string&>()).second;
        if (has_duplicate) duplicate = parsed.get<std::string>();
      }
      return true;
    };
    json parsed = json::parse(text, watch_keys);
    if (has_duplicate) {
      return absl::InvalidArgumentError(absl::StrCat(where, ": the name '", Excerpt(duplicate), "' occurs twice"));
    }
    return parsed;
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": not valid JSON: ", Excerpt(error.what())));
  }
}

absl::StatusOr<std::string> ReadWholeFile(const std::string& path, std::size_t max_bytes) {
  // O_NONBLOCK: a pipe of that name must not hang the start.
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return absl::ErrnoToStatus(errno, absl::StrCat("cannot open ", path));
  std::string bytes;
  absl::Status status;
  struct stat facts = {};
  if (::fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) {
    status = absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  } else if (static_cast<std::uint64_t>(facts.st_size) > max_bytes) {
    status = absl::InvalidArgumentError(absl::StrCat(path, " has ", facts.st_size, " bytes, the limit is ", max_bytes));
  } else {
    bytes.resize(static_cast<std::size_t>(facts.st_size));
    std::size_t done = 0;
    while (done < bytes.size()) {
      const ssize_t count = ::read(file, bytes.data() + done, bytes.size() - done);
      if (count < 0 && errno == EINTR) continue;
      if (count <= 0) {
        status = count < 0 ? absl::ErrnoToStatus(errno, absl::StrCat("cannot read ", path))
                           : absl::DataLossError(absl::StrCat(path, " became shorter while it was read"));
        break;
      }
      done += static_cast<std::size_t>(count);
    }
  }
  ::close(file);
  if (!status.ok()) return status;
  return bytes;
}

absl::StatusOr<json> ReadJsonFile(const std::string& path, std::size_t max_bytes, DuplicateKeys duplicates) {
  ASSIGN_OR_RETURN(const std::string text, ReadWholeFile(path, max_bytes));
  ASSIGN_OR_RETURN(json parsed, ParseJson(text, path, duplicates));
  if (!parsed.is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON object"));
  return parsed;
}

const json* FindMember(const json& object, const char* key) {
  if (!object.is_object()) return nullptr;
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

std::optional<std::int64_t> IntegerWithin(const json& value, std::int64_t min, std::int64_t max) {
  if (!value.is_number_integer()) return std::nullopt;
  if (value.is_number_unsigned() && value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX))
    return std::nullopt;
  const auto integer = value.get<std::int64_t>();
  if (integer < min || integer > max) return std::nullopt;
  return integer;
}

absl::StatusOr<std::optional<std::string>> ReadString(const json& object, const char* key, const std::string& where) {
  const json* value = FindMember(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) return WrongMember(where, key, *value, "a string");
  return value->get<std::string>();
}

absl::StatusOr<std::optional<bool>> ReadBool(const json& object, const char* key, const std::string& where) {
  const json* value = FindMember(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) return WrongMember(where, key, *value, "true or false");
  return value->get<bool>();
}

absl::StatusOr<std::optional<std::int64_t>> ReadInteger(const json& object, const char* key, std::int64_t min,
                                                        std::int64_t max, const std::string& where) {
  const json* value = FindMember(object, key);
  if (value == nullptr) return std::nullopt;
  const std::optional<std::int64_t> integer = IntegerWithin(*value, min, max);
  if (!integer) return WrongMember(where, key, *value, absl::StrCat("an integer from ", min, " to ", max));
  return integer;
}

absl::StatusOr<std::optional<double>> ReadNumber(const json& object, const char* key, double min, double max,
                                                 const std::string& where) {
  const json* value = FindMember(object, key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number() || !(value->get<double>() >= min && value->get<double>() <= max)) {
    return WrongMember(where, key, *value, absl::StrCat("a number from ", min, " to ", max));
  }
  return value->get<double>();
}

}  // namespace spillway
