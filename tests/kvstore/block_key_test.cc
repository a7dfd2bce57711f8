#include "kvstore/block_key.h"

#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace spillway {
namespace {

std::string Hex(const BlockKey& key) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(key.bytes.data()), key.bytes.size()});
}

std::vector<std::int32_t> OneTo16() {
  std::vector<std::int32_t> tokens(16);
  std::iota(tokens.begin(), tokens.end(), 1);
  return tokens;
}

// Expected values: hashlib.sha256(cbor2.dumps((parent, tokens, extra), canonical=True)) in Python.
TEST(BlockKey, EqualsVllmSha256Cbor) {
  const KeyChain chain("0");
  EXPECT_EQ(Hex(chain.root()), "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e");
  const BlockKey first = chain.Next(chain.root(), OneTo16(), "");
  EXPECT_EQ(Hex(first), "202da172482d928bbc42ab25b0151e2b895f13f41002e27b2ceabcfae6d332ea");
  const std::vector<std::int32_t> widths = {0, 23, 24, 255, 256, 65535, 65536, 128255,
                                            0, 23, 24, 255, 256, 65535, 65536, 128255};
  EXPECT_EQ(Hex(chain.Next(first, widths, "")), "d966b1ce0382e544f5a442e6fc6e7dea608fba659138e2a6593d26e71380cbe7");
}

TEST(BlockKey, KeysOfEveryFullBlock) {
  const KeyChain chain("0");
  std::vector<std::int32_t> tokens(40);
  std::iota(tokens.begin(), tokens.end(), 1);
  const std::vector<BlockKey> keys = chain.Keys(tokens, "salt");
  ASSERT_EQ(keys.size(), 2U);
  EXPECT_EQ(keys[0], chain.Next(chain.root(), OneTo16(), "salt"));
  EXPECT_EQ(keys[1], chain.Next(keys[0], std::span<const std::int32_t>(tokens).subspan(16, 16), "salt"));
  EXPECT_TRUE(chain.Keys(std::vector<std::int32_t>(15), "").empty());
}

TEST(BlockKey, SaltCountsOnTheFirstBlockOnly) {
  const KeyChain chain("0");
  const BlockKey salted = chain.Next(chain.root(), OneTo16(), "salt");
  EXPECT_EQ(Hex(salted), "0222f5b704a8247ae4068ec648ea39b6a207f22cee65f086f86091a2d25fbd47");
  EXPECT_EQ(chain.Next(salted, OneTo16(), "salt"), chain.Next(salted, OneTo16(), ""));
}

TEST(BlockKey, SeedSeparatesChains) { EXPECT_NE(KeyChain("0").root(), KeyChain("1").root()); }

}  // namespace
}  // namespace spillway
