#include <fmt/format.h>
#include <stdlib.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <string_view>

#include "absl/cleanup/cleanup.h"
#include "engine/model.h"
#include "kernels/status_macros.h"
#include "kvstore/file_tier.h"
#include "kvstore/tier_check.h"
#include "server/await_generation.h"
#include "server/commands.h"
#include "server/engine_host.h"
#include "server/option_values.h"

// `spillway check`: what can be said of a model folder without knowing its right answers.

namespace spillway {
namespace {

constexpr std::int64_t kGenerated = 24;
constexpr int kCheckedBlocks = 16;

absl::Status CheckRoundTrip(const Tokenizer& tokenizer) {
  constexpr std::array<std::string_view, 5> kTexts = {
      "The quick brown fox jumps over the lazy dog.", "int main() { return 0; }\n\tindented, twice  spaced",
      "na\u00efve caf\u00e9, \u00bd price: 5 \u20ac", "\u4f60\u597d\uff0c\u4e16\u754c", "\U0001F600\U0001F680 emoji"};
  for (const std::string_view text : kTexts) {
    ASSIGN_OR_RETURN(const auto tokens, tokenizer.Encode(text, SpecialTokens::kNone));
    const std::string decoded = tokenizer.Decode(tokens, SkipSpecial::kNo);
    if (decoded != text) {
      return absl::InternalError(fmt::format("'{}' comes back as '{}' ({} tokens)", text, decoded, tokens.size()));
    }
  }
  return absl::OkStatus();
}

// `num_blocks` blocks' worth of a made-up text, so that prefixes of it can be found again; less where the context is
// short.
GenerationRequest GreedyRequest(const EngineHost& host, int num_blocks) {
  GenerationRequest request;
  const std::int64_t length =
      std::min<std::int64_t>(num_blocks * kBlockTokens + 1, host.engine->options().max_model_len / 2);
  const auto encoded = host.tokenizer->Encode("Once upon a time, there was", SpecialTokens::kAdd);
  std::vector<std::int32_t> tokens = encoded.ok() ? *encoded : std::vector<std::int32_t>{0};
  for (std::size_t i = 0; static_cast<std::int64_t>(tokens.size()) < length; ++i) tokens.push_back(tokens[i]);
  tokens.resize(static_cast<std::size_t>(std::max<std::int64_t>(length, 1)));
  request.max_tokens = std::min<std::int64_t>(kGenerated, host.engine->options().max_model_len - length);
  request.prompt = std::move(tokens);
  request.temperature = 0;
  request.ignore_eos = true;
  return request;
}

absl::StatusOr<GeneratedChoice> Generate(const EngineHost& host, int num_blocks, bool bypass) {
  GenerationRequest request = GreedyRequest(host, num_blocks);
  request.bypass_prefix_cache = bypass;
  ASSIGN_OR_RETURN(GenerationResult result, AwaitGeneration(*host.service, std::move(request)));
  return std::move(result.choices.front());
}

absl::Status CheckRepeats(const EngineHost& host) {
  ASSIGN_OR_RETURN(const GeneratedChoice first, Generate(host, 1, /*bypass=*/true));
  ASSIGN_OR_RETURN(const GeneratedChoice second, Generate(host, 1, /*bypass=*/true));
  if (first.tokens == second.tokens) return absl::OkStatus();
  return absl::InternalError(fmt::format("two greedy runs differ: '{}' and '{}'", first.text, second.text));
}

absl::Status CheckPrefixCache(const EngineHost& host) {
  ASSIGN_OR_RETURN(const GeneratedChoice without, Generate(host, 4, /*bypass=*/true));  // publishes its blocks
  ASSIGN_OR_RETURN(const GeneratedChoice with, Generate(host, 4, /*bypass=*/false));
  if (with.finish.num_cached_tokens == 0) {
    return absl::InternalError("a prompt that was just computed is not found in the prefix cache");
  }
  if (with.tokens == without.tokens) return absl::OkStatus();
  return absl::InternalError(fmt::format("output differs with {} cached tokens: '{}' and '{}' without",
                                         with.finish.num_cached_tokens, with.text, without.text));
}

// Blocks through the host tier that was asked for.
absl::StatusOr<std::string> CheckHostTier(const EngineHost& host) {
  const TierStats stats = host.host_tier->stats();
  if (stats.capacity_blocks == 0) return std::string("off");
  const KvLayout layout = host.engine->model().kv_layout();
  const int count = static_cast<int>(std::min<std::int64_t>(stats.capacity_blocks, kCheckedBlocks));
  ASSIGN_OR_RETURN(const TierCheck check, CheckTiers(*host.devices.front(), *host.host_tier, layout, count));
  return fmt::format("{} blocks of {} stored, evicted, loaded and equal, in {:.2f} ms", check.host_blocks,
                     ShowSize(static_cast<std::int64_t>(layout.block_bytes())), 1e3 * check.seconds);
}

// Blocks through a file tier in a folder of its own, which goes afterwards.
absl::StatusOr<std::string> CheckFileTier(const EngineHost& host) {
  const KvLayout layout = host.engine->model().kv_layout();
  const std::size_t block_bytes = layout.block_bytes();
  std::string folder = (std::filesystem::temp_directory_path() / "spillway-check-XXXXXX").string();
  if (::mkdtemp(folder.data()) == nullptr) {
    return absl::UnavailableError(fmt::format("cannot make a folder like {}", folder));
  }
  const absl::Cleanup remove = [&folder] {
    std::error_code ignored;
    std::filesystem::remove_all(folder, ignored);
  };
  FileTierOptions options;
  options.directory = folder;
  options.block_bytes = block_bytes;
  options.budget_bytes = static_cast<std::int64_t>(4 * kCheckedBlocks * block_bytes) + (std::int64_t{4} << 20);
  options.space = "check";
  ASSIGN_OR_RETURN(const std::unique_ptr<Tier> file, MakeFileTier(options));
  ASSIGN_OR_RETURN(Buffer slab, host.devices.front()->Allocate(MemoryKind::kPinnedHost, kCheckedBlocks * block_bytes));
  const std::unique_ptr<HostTier> above =
      MakeHostTier(std::move(slab), {.block_bytes = block_bytes, .num_blocks = kCheckedBlocks, .lower = file.get()});
  ASSIGN_OR_RETURN(const TierCheck check, CheckTiers(*host.devices.front(), *above, layout, kCheckedBlocks));
  return fmt::format("{} blocks written to {} and back, equal, in {:.2f} ms", check.lower_blocks,
                     std::filesystem::temp_directory_path().string(), 1e3 * check.seconds);
}

bool Show(std::string_view name, const absl::Status& status, std::string_view note) {
  if (status.ok()) {
    fmt::print("ok      {:<14} {}\n", name, note);
  } else {
    fmt::print("FAILED  {:<14} {}\n", name, std::string(status.message()));
  }
  std::fflush(stdout);
  return status.ok();
}

}  // namespace

int CheckCommand(const Options& options, const Environment& environment) {
  const auto host = MakeEngineHost(options, environment);
  if (!Show("files", host.status(), host.ok() ? host->folder : "")) return kExitFailed;
  const Model& model = host->engine->model();
  bool is_good = Show("weights", absl::OkStatus(),
                      fmt::format("{}, {}, {}", model.config().architecture, NameOf(model.dtype()),
                                  ShowSize(static_cast<std::int64_t>(model.weight_bytes()))));
  is_good &=
      Show("device", absl::OkStatus(),
           fmt::format("{}; KV cache of {} tokens", host->device().description(), host->engine->capacity_tokens()));
  is_good &= Show("tokenizer", CheckRoundTrip(*host->tokenizer), "texts come back as they were");
  is_good &= Show("generation", CheckRepeats(*host), "two greedy runs are equal");
  if (options.cache.enable_prefix_caching) {
    is_good &= Show("prefix cache", CheckPrefixCache(*host), "equal output with and without it");
  }
  for (const auto& [name, check] : {std::pair("host tier", &CheckHostTier), std::pair("file tier", &CheckFileTier)}) {
    const auto report = check(*host);
    is_good &= Show(name, report.status(), report.ok() ? *report : "");
  }
  return is_good ? 0 : kExitFailed;
}

}  // namespace spillway
