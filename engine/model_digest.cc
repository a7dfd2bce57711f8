#include "engine/model_digest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <sstream>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/safetensors.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

constexpr std::size_t kBytesOfTensor = 4096;

class Sha256 {
 public:
  Sha256() { EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr); }
  // Each part counts with its length, so that parts cannot run into each other.
  void Add(const void* data, std::size_t size_bytes) {
    const std::uint64_t size = size_bytes;
    EVP_DigestUpdate(context_.get(), &size, sizeof(size));
    EVP_DigestUpdate(context_.get(), data, size_bytes);
  }
  void Add(const std::string& text) { Add(text.data(), text.size()); }
  std::string Hex() {
    std::string bytes(32, '\0');
    EVP_DigestFinal_ex(context_.get(), reinterpret_cast<unsigned char*>(bytes.data()), nullptr);
    return absl::BytesToHexString(bytes);
  }

 private:
  struct Free {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD_CTX, Free> context_{EVP_MD_CTX_new()};
};

}  // namespace

absl::StatusOr<std::string> ModelDigest(const std::string& folder) {
  std::ifstream file(folder + "/config.json", std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(folder, "/config.json cannot be read"));
  std::ostringstream config;
  config << file.rdbuf();
  Sha256 digest;
  digest.Add(config.str());
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(folder));
  std::vector<std::string> names = checkpoint->Names();
  std::ranges::sort(names);
  for (const std::string& name : names) {
    const absl::StatusOr<TensorView> tensor = checkpoint->Find(name);
    if (!tensor.ok()) continue;  // of a type that no model of ours reads
    digest.Add(absl::StrCat(name, " ", static_cast<int>(tensor->dtype), " ", absl::StrJoin(tensor->shape, ",")));
    digest.Add(tensor->data, std::min(tensor->size_bytes, kBytesOfTensor));
  }
  return digest.Hex();
}

}  // namespace spillway
