#pragma once

// Who may call: keys in the metadata.

#include <grpcpp/grpcpp.h>

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace spillway {

// Where it is among the keys. Compared in constant time: how long it takes tells lengths only.
inline std::optional<std::size_t> PositionOf(std::string_view offered, const std::vector<std::string>& keys) {
  std::optional<std::size_t> found;
  for (std::size_t k = 0; k < keys.size(); ++k) {
    const std::string& key = keys[k];
    auto difference = static_cast<unsigned char>(offered.size() == key.size() ? 0 : 1);
    for (std::size_t i = 0; i < offered.size(); ++i) {
      const char expected = key.empty() ? '\0' : key[i % key.size()];
      difference = static_cast<unsigned char>(difference | (offered[i] ^ expected));
    }
    if (difference == 0) found = k;
  }
  return found;
}

inline std::string Metadata(const grpc::CallbackServerContext& context, const std::string& name) {
  const auto found = context.client_metadata().find(name);
  if (found == context.client_metadata().end()) return "";
  return {found->second.data(), found->second.size()};
}

// Which of `keys` the call's `authorization: Bearer <key>` is.
inline std::optional<std::size_t> KeyOf(const grpc::CallbackServerContext& context,
                                        const std::vector<std::string>& keys) {
  constexpr std::string_view kScheme = "Bearer ";
  const std::string header = Metadata(context, "authorization");
  if (!header.starts_with(kScheme)) return std::nullopt;
  return PositionOf(std::string_view(header).substr(kScheme.size()), keys);
}

// UNAUTHENTICATED unless `keys` is empty or the call has one of them.
inline grpc::Status CheckKey(const grpc::CallbackServerContext& context, const std::vector<std::string>& keys) {
  if (keys.empty() || KeyOf(context, keys)) return grpc::Status::OK;
  return {grpc::StatusCode::UNAUTHENTICATED, "the metadata `authorization: Bearer <key>` is missing or wrong"};
}

// The codes have the same numbers.
inline grpc::Status ToGrpc(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return {static_cast<grpc::StatusCode>(status.code()), std::string(status.message())};
}

}  // namespace spillway
