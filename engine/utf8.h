#pragma once

// UTF-8 in strings that are bytes.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace spillway {

// Offset of the first byte that is not part of a well-formed code point, or nothing.
std::optional<std::size_t> FindInvalidUtf8(std::string_view bytes);

void AppendUtf8(char32_t code_point, std::string& text);

// The code point at `offset` of a valid text, which moves behind it.
char32_t NextCodePoint(std::string_view text, std::size_t& offset);

// Bytes that come piece by piece -> valid UTF-8. Each maximal subpart of an ill-formed sequence becomes one U+FFFD
// (Unicode 3.9, the practice of the Encoding Standard), wherever the pieces are cut.
class Utf8Repair {
 public:
  // Appends to `text` all that is decided; at most three bytes are held back.
  void Push(std::string_view bytes, std::string& text);
  // An unfinished code point becomes U+FFFD. Afterwards as new.
  void Flush(std::string& text);

 private:
  std::string held_;  // a proper prefix of some well-formed code point
};

}  // namespace spillway
