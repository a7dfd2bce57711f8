#include "kvstore/block_key.h"

#include <openssl/evp.h>

#include <algorithm>
#include <memory>
#include <string>

#include "kernels/check.h"
#include "kernels/kv_layout.h"

namespace spillway {
namespace {

constexpr std::size_t kMostHeadBytes = 9;

// Canonical CBOR (RFC 8949, 4.2): shortest form of every head. Returns where the next byte goes.
char* WriteHead(char* out, std::uint8_t major, std::uint64_t value) {
  const auto lead = static_cast<std::uint8_t>(major << 5);
  if (value < 24) {
    *out = static_cast<char>(lead | value);
    return out + 1;
  }
  int log_width = 0;  // the argument takes 1 << log_width bytes behind the first
  if (value > 0xffffffff) {
    log_width = 3;
  } else if (value > 0xffff) {
    log_width = 2;
  } else if (value > 0xff) {
    log_width = 1;
  }
  *out++ = static_cast<char>(lead | (24 + log_width));
  for (int shift = 8 * ((1 << log_width) - 1); shift >= 0; shift -= 8) *out++ = static_cast<char>(value >> shift);
  return out;
}

constexpr std::uint8_t kUnsigned = 0;
constexpr std::uint8_t kBytes = 2;
constexpr std::uint8_t kText = 3;
constexpr std::uint8_t kArray = 4;
constexpr char kNull = static_cast<char>(0xf6);

void AppendText(std::string& out, std::string_view text) {
  std::array<char, kMostHeadBytes> head{};
  out.append(head.data(), WriteHead(head.data(), kText, text.size()));
  out.append(text);
}

// Set up once for each thread: OpenSSL's SHA256() looks the algorithm up at every call, which takes several times as
// long as the digest of a block's tokens.
class Digest {
 public:
  Digest()
      : algorithm_(EVP_MD_fetch(nullptr, "SHA256", nullptr), EVP_MD_free), state_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {
    SPILLWAY_CHECK(algorithm_ != nullptr && state_ != nullptr) << "OpenSSL has no SHA-256";
  }
  BlockKey Of(std::string_view data) {
    BlockKey key;
    const bool is_done = EVP_DigestInit_ex2(state_.get(), algorithm_.get(), nullptr) == 1 &&
                         EVP_DigestUpdate(state_.get(), data.data(), data.size()) == 1 &&
                         EVP_DigestFinal_ex(state_.get(), key.bytes.data(), nullptr) == 1;
    SPILLWAY_CHECK(is_done) << "SHA-256 of " << data.size() << " bytes failed";
    return key;
  }

 private:
  std::unique_ptr<EVP_MD, decltype(&EVP_MD_free)> algorithm_;
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> state_;
};

BlockKey Sha256(std::string_view data) {
  thread_local Digest digest;
  return digest.Of(data);
}

}  // namespace

KeyChain::KeyChain(std::string_view seed) {
  std::string cbor;
  AppendText(cbor, seed);
  root_ = Sha256(cbor);
}

BlockKey KeyChain::Next(const BlockKey& parent, std::span<const std::int32_t> tokens,
                        std::string_view cache_salt) const {
  SPILLWAY_DCHECK(tokens.size() == kBlockTokens);
  std::array<char, 3 * kMostHeadBytes + sizeof(BlockKey) + kBlockTokens * kMostHeadBytes + kMostHeadBytes> cbor{};
  char* end = WriteHead(cbor.data(), kArray, 3);
  end = WriteHead(end, kBytes, parent.bytes.size());
  end = std::ranges::copy(parent.bytes, end).out;
  end = WriteHead(end, kArray, tokens.size());
  for (const std::int32_t token : tokens) end = WriteHead(end, kUnsigned, static_cast<std::uint32_t>(token));
  if (cache_salt.empty() || parent != root_) {
    *end++ = kNull;
    return Sha256({cbor.data(), end});
  }
  end = WriteHead(end, kArray, 1);
  std::string salted(cbor.data(), end);
  AppendText(salted, cache_salt);
  return Sha256(salted);
}

std::vector<BlockKey> KeyChain::Keys(std::span<const std::int32_t> tokens, std::string_view cache_salt) const {
  std::vector<BlockKey> keys;
  keys.reserve(tokens.size() / kBlockTokens);
  for (; tokens.size() >= kBlockTokens; tokens = tokens.subspan(kBlockTokens)) {
    keys.push_back(Next(keys.empty() ? root_ : keys.back(), tokens.first(kBlockTokens), cache_salt));
  }
  return keys;
}

}  // namespace spillway
