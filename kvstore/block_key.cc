#include "kvstore/block_key.h"

#include <openssl/sha.h>

#include <string>

#include "kernels/check.h"
#include "kernels/kv_layout.h"

namespace spillway {
namespace {

// Canonical CBOR (RFC 8949, 4.2): shortest form of every head.
void AppendHead(std::string& out, std::uint8_t major, std::uint64_t value) {
  const auto lead = static_cast<std::uint8_t>(major << 5);
  int width = 0;
  if (value < 24) {
    out.push_back(static_cast<char>(lead | value));
    return;
  }
  if (value <= 0xff) {
    out.push_back(static_cast<char>(lead | 24));
    width = 1;
  } else if (value <= 0xffff) {
    out.push_back(static_cast<char>(lead | 25));
    width = 2;
  } else if (value <= 0xffffffff) {
    out.push_back(static_cast<char>(lead | 26));
    width = 4;
  } else {
    out.push_back(static_cast<char>(lead | 27));
    width = 8;
  }
  for (int shift = 8 * (width - 1); shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift));
}

constexpr std::uint8_t kUnsigned = 0;
constexpr std::uint8_t kBytes = 2;
constexpr std::uint8_t kText = 3;
constexpr std::uint8_t kArray = 4;
constexpr char kNull = static_cast<char>(0xf6);

BlockKey Sha256(std::string_view data) {
  BlockKey key;
  SHA256(reinterpret_cast<const unsigned char*>(data.data()), data.size(), key.bytes.data());
  return key;
}

}  // namespace

KeyChain::KeyChain(std::string_view seed) {
  std::string cbor;
  AppendHead(cbor, kText, seed.size());
  cbor.append(seed);
  root_ = Sha256(cbor);
}

BlockKey KeyChain::Next(const BlockKey& parent, std::span<const std::int32_t> tokens,
                        std::string_view cache_salt) const {
  SPILLWAY_DCHECK(tokens.size() == kBlockTokens);
  std::string cbor;
  cbor.reserve(128);
  AppendHead(cbor, kArray, 3);
  AppendHead(cbor, kBytes, parent.bytes.size());
  cbor.append(reinterpret_cast<const char*>(parent.bytes.data()), parent.bytes.size());
  AppendHead(cbor, kArray, tokens.size());
  for (const std::int32_t token : tokens) AppendHead(cbor, kUnsigned, static_cast<std::uint32_t>(token));
  if (cache_salt.empty() || parent != root_) {
    cbor.push_back(kNull);
  } else {
    AppendHead(cbor, kArray, 1);
    AppendHead(cbor, kText, cache_salt.size());
    cbor.append(cache_salt);
  }
  return Sha256(cbor);
}

}  // namespace spillway
