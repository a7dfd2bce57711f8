#pragma once

// The alphabet of byte-level BPE: every byte as a visible code point, so that a vocabulary of bytes is a vocabulary of
// text. Printable Latin-1 stands for itself, the other 68 bytes for U+0100 and following.

#include <array>
#include <cstdint>

namespace spillway {

constexpr std::array<char32_t, 256> MakeByteAlphabet() {
  std::array<char32_t, 256> alphabet = {};
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool stands_for_itself = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    alphabet[byte] = stands_for_itself ? byte : next++;
  }
  return alphabet;
}

inline constexpr std::array<char32_t, 256> kByteAlphabet = MakeByteAlphabet();
inline constexpr char32_t kByteAlphabetEnd = 0x144;

constexpr std::array<std::int16_t, kByteAlphabetEnd> MakeByteOfLetter() {
  std::array<std::int16_t, kByteAlphabetEnd> bytes = {};
  bytes.fill(-1);
  for (std::int16_t byte = 0; byte < 256; ++byte) bytes[kByteAlphabet[byte]] = byte;
  return bytes;
}

// -1 for a code point that stands for no byte.
inline constexpr std::array<std::int16_t, kByteAlphabetEnd> kByteOfLetter = MakeByteOfLetter();

}  // namespace spillway
