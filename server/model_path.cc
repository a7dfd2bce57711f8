#include "server/model_path.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <vector>

#include "absl/strings/str_replace.h"

namespace spillway {
namespace {

namespace fs = std::filesystem;

std::string Variable(const Environment& environment, const std::string& name) {
  const auto found = environment.find(name);
  return found == environment.end() ? "" : found->second;
}

fs::path CacheFolder(const Environment& environment) {
  if (const std::string cache = Variable(environment, "HF_HUB_CACHE"); !cache.empty()) return cache;
  if (const std::string home = Variable(environment, "HF_HOME"); !home.empty()) return fs::path(home) / "hub";
  fs::path base = Variable(environment, "XDG_CACHE_HOME");
  if (base.empty()) base = fs::path(Variable(environment, "HOME")) / ".cache";
  return base / "huggingface" / "hub";
}

// Letters, digits, '-', '_', '.', with at most one '/' inside.
bool IsHubId(const std::string& text) {
  const auto is_allowed = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
           c == '.' || c == '/';
  };
  return !text.empty() && std::ranges::all_of(text, is_allowed) && std::ranges::count(text, '/') <= 1 &&
         text.front() != '/' && text.front() != '.' && text.back() != '/';
}

bool HasModel(const fs::path& folder) {
  std::error_code error;
  return fs::is_regular_file(folder / "config.json", error);
}

// The snapshot of a cached repository, or an empty path.
fs::path Snapshot(const fs::path& repository) {
  std::string revision;
  std::ifstream(repository / "refs" / "main") >> revision;
  if (!revision.empty() && HasModel(repository / "snapshots" / revision)) return repository / "snapshots" / revision;
  std::vector<fs::path> complete;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(repository / "snapshots", error)) {
    if (HasModel(entry.path())) complete.push_back(entry.path());
  }
  return complete.size() == 1 ? complete.front() : fs::path();
}

std::string RunningProgram() {
  std::error_code error;
  return fs::read_symlink("/proc/self/exe", error).string();
}

}  // namespace

absl::StatusOr<std::string> FindDemoModel(const std::string& program) {
  const fs::path beside = fs::path("share") / "spillway" / "demo_model";
  const fs::path folder = fs::path(program).parent_path();
  const fs::path installed = (folder / ".." / beside).lexically_normal();
  const fs::path built = folder / beside;
  for (const fs::path& candidate : {installed, built}) {
    if (HasModel(candidate)) return candidate.string();
  }
  return absl::NotFoundError(fmt::format("the built-in demo model is neither in {} nor in {}; pass MODEL",
                                         installed.string(), built.string()));
}

absl::StatusOr<std::string> ResolveModel(const std::string& model, const Environment& environment) {
  if (model.empty()) return FindDemoModel(RunningProgram());
  std::error_code error;
  if (fs::is_directory(model, error)) {
    if (HasModel(model)) return model;
    return absl::NotFoundError(fmt::format("MODEL '{}': the folder has no config.json", model));
  }
  if (!IsHubId(model)) {
    return absl::InvalidArgumentError(
        fmt::format("MODEL '{}': no such folder, and not the form of a Hub id (org/name)", model));
  }
  const fs::path cache = CacheFolder(environment);
  const fs::path repository = cache / ("models--" + absl::StrReplaceAll(model, {{"/", "--"}}));
  if (const fs::path snapshot = Snapshot(repository); !snapshot.empty()) return snapshot.string();
  return absl::NotFoundError(
      fmt::format("MODEL '{}': no such folder, and not in the local Hub cache ({}). To fetch it: hf download {}", model,
                  cache.string(), model));
}

}  // namespace spillway
