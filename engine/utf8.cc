#include "engine/utf8.h"

namespace spillway {
namespace {

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

enum class Form : std::uint8_t { kComplete, kUnfinished, kIllFormed };
struct Unit {
  Form form;
  std::size_t size_bytes;  // of the code point, of the bytes there are, or of the maximal subpart (at least 1)
};

// Table 3-7 of the Unicode standard: only the second byte's range depends on the first.
Unit FirstUnit(std::string_view bytes) {
  const auto at = [&](std::size_t i) { return static_cast<unsigned char>(bytes[i]); };
  const unsigned char lead = at(0);
  if (lead < 0x80) return {Form::kComplete, 1};
  if (lead < 0xc2 || lead > 0xf4) return {Form::kIllFormed, 1};
  const std::size_t size = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
  const unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  for (std::size_t i = 1; i < size; ++i) {
    if (i == bytes.size()) return {Form::kUnfinished, i};
    const bool fits = i == 1 ? at(i) >= low && at(i) <= high : (at(i) & 0xc0) == 0x80;
    if (!fits) return {Form::kIllFormed, i};
  }
  return {Form::kComplete, size};
}

}  // namespace

std::optional<std::size_t> FindInvalidUtf8(std::string_view bytes) {
  std::size_t offset = 0;
  while (offset < bytes.size()) {
    const Unit unit = FirstUnit(bytes.substr(offset));
    if (unit.form != Form::kComplete) return offset;
    offset += unit.size_bytes;
  }
  return std::nullopt;
}

void AppendUtf8(char32_t code_point, std::string& text) {
  const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
  if (code_point < 0x80) return put(code_point);
  if (code_point < 0x800) {
    put(0xc0 | (code_point >> 6));
  } else {
    if (code_point < 0x10000) {
      put(0xe0 | (code_point >> 12));
    } else {
      put(0xf0 | (code_point >> 18));
      put(0x80 | ((code_point >> 12) & 0x3f));
    }
    put(0x80 | ((code_point >> 6) & 0x3f));
  }
  put(0x80 | (code_point & 0x3f));
}

char32_t NextCodePoint(std::string_view text, std::size_t& offset) {
  const auto next = [&] { return static_cast<char32_t>(static_cast<unsigned char>(text[offset++])); };
  const char32_t lead = next();
  if (lead < 0x80) return lead;
  const int more = lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
  char32_t code_point = lead & (0x3fU >> more);
  for (int i = 0; i < more; ++i) code_point = (code_point << 6) | (next() & 0x3f);
  return code_point;
}

void Utf8Repair::Push(std::string_view bytes, std::string& text) {
  std::string joined;
  if (!held_.empty()) {
    joined = held_;
    joined += bytes;
    bytes = joined;
  }
  std::size_t offset = 0;
  while (offset < bytes.size()) {
    const Unit unit = FirstUnit(bytes.substr(offset));
    if (unit.form == Form::kUnfinished) break;
    text += unit.form == Form::kComplete ? bytes.substr(offset, unit.size_bytes) : kReplacement;
    offset += unit.size_bytes;
  }
  held_ = std::string(bytes.substr(offset));
}

void Utf8Repair::Flush(std::string& text) {
  if (!held_.empty()) text += kReplacement;
  held_.clear();
}

}  // namespace spillway
