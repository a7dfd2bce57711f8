#include "server/grpc_request.h"

#include <fmt/format.h>

#include <array>
#include <limits>
#include <string_view>
#include <utility>

#include "kernels/status_macros.h"

namespace spillway {
namespace {

constexpr std::uint32_t kDefaultNewTokens = 20;

absl::Status Unsupported(std::string_view field) {
  return absl::UnimplementedError(fmt::format("{}: not supported", field));
}

// Everything that is set and not built, by its field name.
absl::Status RefuseUnsupported(const vllm::GenerateRequest& request) {
  const vllm::DecodingParameters& decoding = request.decoding();
  const vllm::KVCacheParameters& kv = request.kv();
  const vllm::ResponseOptions& response = request.response();
  using Structured = vllm::DecodingParameters::StructuredOutputCase;
  const std::array<std::pair<bool, std::string_view>, 19> refused = {{
      {request.has_session_id(), "session_id"},
      {!request.lora_name().empty(), "lora_name"},
      {decoding.presence_penalty() != 0, "decoding.presence_penalty"},
      {decoding.frequency_penalty() != 0, "decoding.frequency_penalty"},
      {decoding.repetition_penalty() != 0 && decoding.repetition_penalty() != 1, "decoding.repetition_penalty"},
      {decoding.logit_bias_size() > 0, "decoding.logit_bias"},
      {decoding.allowed_token_ids_size() > 0, "decoding.allowed_token_ids"},
      {decoding.structured_output_case() == Structured::kJson, "decoding.json"},
      {decoding.structured_output_case() == Structured::kRegex, "decoding.regex"},
      {decoding.structured_output_case() == Structured::kChoice, "decoding.choice"},
      {decoding.structured_output_case() == Structured::kGrammar, "decoding.grammar"},
      {decoding.structured_output_case() == Structured::kJsonObject, "decoding.json_object"},
      {decoding.structured_output_case() == Structured::kStructuralTag, "decoding.structural_tag"},
      {kv.has_kv_transfer_params(), "kv.kv_transfer_params"},
      {kv.has_ec_transfer_params(), "kv.ec_transfer_params"},
      {response.prompt_logprobs(), "response.prompt_logprobs"},
      {response.has_prompt_candidates(), "response.prompt_candidates"},
      {response.output_candidates().has_token_ids(), "response.output_candidates.token_ids"},
      {response.output_candidates().has_all(), "response.output_candidates.all"},
  }};
  if (request.media_size() > 0) return InvalidField("media", "media: the model takes text only");
  for (const auto& [is_set, field] : refused) {
    if (is_set) return Unsupported(field);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<std::int32_t>> TokensOf(const vllm::TokenIds& ids) {
  std::vector<std::int32_t> tokens;
  tokens.reserve(static_cast<std::size_t>(ids.ids_size()));
  for (const std::uint32_t id : ids.ids()) {
    if (id > std::numeric_limits<std::int32_t>::max()) {
      return absl::InvalidArgumentError(fmt::format("token_ids: {} is not a token id", id));
    }
    tokens.push_back(static_cast<std::int32_t>(id));
  }
  return tokens;
}

void ApplySampling(const vllm::RandomSampling& sampling, GenerationRequest& to) {
  if (sampling.num_sequences() > 0) to.n = sampling.num_sequences();
  if (sampling.top_k() > 0) to.top_k = sampling.top_k();
  if (sampling.top_p() != 0) to.top_p = sampling.top_p();
  if (sampling.min_p() != 0) to.min_p = sampling.min_p();
  if (sampling.has_seed()) to.seed = sampling.seed();
}

void ApplyStopping(const vllm::StoppingCriteria& stopping, GenerationRequest& to) {
  to.max_tokens = stopping.max_new_tokens() > 0 ? stopping.max_new_tokens() : kDefaultNewTokens;
  to.min_tokens = stopping.min_new_tokens();
  to.stop_token_ids.assign(stopping.stop_token_ids().begin(), stopping.stop_token_ids().end());
  to.stop.assign(stopping.stop_strings().begin(), stopping.stop_strings().end());
  to.include_stop_in_output = stopping.include_stop_strings();
  to.ignore_eos = stopping.ignore_eos();
}

}  // namespace

OutputSelection SelectionOf(const vllm::ResponseOptions& options) {
  OutputSelection selection;
  selection.text = !options.has_output_text() || options.output_text();
  selection.token_ids = options.output_token_ids();
  selection.logprobs = options.output_logprobs();
  selection.candidates = options.output_candidates().has_top_n();
  selection.prompt_token_ids = options.prompt_token_ids();
  return selection;
}

absl::StatusOr<GenerationRequest> ToGenerationRequest(const vllm::GenerateRequest& request,
                                                      const GenerationDefaults& defaults) {
  RETURN_IF_ERROR(RefuseUnsupported(request));
  GenerationRequest to;
  to.request_id = request.request_id();
  to.model = request.model();
  if (request.has_text()) {
    to.prompt = request.text();
  } else if (request.has_token_ids()) {
    ASSIGN_OR_RETURN(to.prompt, TokensOf(request.token_ids()));
  } else {
    return absl::InvalidArgumentError("prompt: one of text and token_ids is needed");
  }
  if (request.has_temperature()) {
    to.temperature = request.temperature();
  } else if (!defaults.temperature) {
    to.temperature = 0;
  }
  ApplySampling(request.sampling(), to);
  ApplyStopping(request.stopping(), to);
  const vllm::ResponseOptions& response = request.response();
  to.skip_special_tokens = !response.has_skip_special_tokens() || response.skip_special_tokens();
  const OutputSelection selection = SelectionOf(response);
  if (selection.logprobs || selection.candidates) to.logprobs = response.output_candidates().top_n();
  if (request.truncate_prompt_tokens() > 0) to.truncate_prompt_tokens = request.truncate_prompt_tokens();
  to.bypass_prefix_cache = request.kv().bypass_prefix_cache();
  to.cache_salt = request.kv().cache_salt();
  to.priority = request.priority();
  return to;
}

absl::Status WithMessageField(const absl::Status& status) {
  const std::optional<std::string> field = FieldOf(status);
  if (!field) return status;
  constexpr std::array<std::pair<std::string_view, std::string_view>, 12> kNames = {{
      {"max_tokens", "stopping.max_new_tokens"},
      {"min_tokens", "stopping.min_new_tokens"},
      {"stop", "stopping.stop_strings"},
      {"stop_token_ids", "stopping.stop_token_ids"},
      {"temperature", "temperature"},
      {"top_p", "sampling.top_p"},
      {"top_k", "sampling.top_k"},
      {"min_p", "sampling.min_p"},
      {"seed", "sampling.seed"},
      {"n", "sampling.num_sequences"},
      {"logprobs", "response.output_candidates.top_n"},
      {"cache_salt", "kv.cache_salt"},
  }};
  std::string_view name = *field;
  for (const auto& [ours, theirs] : kNames) {
    if (ours == *field) name = theirs;
  }
  return {status.code(), fmt::format("{}: {}", name, std::string(status.message()))};
}

void FillPromptInfo(const PromptInfo& prompt, const OutputSelection& selection, vllm::PromptInfo& info) {
  info.set_num_prompt_tokens(static_cast<std::uint32_t>(prompt.tokens.size()));
  if (selection.prompt_token_ids) info.mutable_token_ids()->Add(prompt.tokens.begin(), prompt.tokens.end());
}

void AppendOutput(const OutputChunk& chunk, const OutputSelection& selection, vllm::SequenceOutput& output) {
  output.set_index(static_cast<std::uint32_t>(chunk.index));
  if (selection.text) output.mutable_text()->append(chunk.text);
  output.set_num_tokens(output.num_tokens() + static_cast<std::uint32_t>(chunk.tokens.size()));
  for (const SampledToken& token : chunk.tokens) {
    if (selection.token_ids) output.add_token_ids(static_cast<std::uint32_t>(token.token));
    if (selection.logprobs) {
      output.add_logprobs(token.logprob);
      output.add_ranks(static_cast<std::uint32_t>(token.rank));
    }
    if (!selection.candidates) continue;
    vllm::CandidateTokenInfo& candidates = *output.add_candidate_tokens();
    for (const LogprobEntry& entry : token.top) {
      vllm::CandidateTokenInfo::TokenInfo& candidate = *candidates.add_tokens();
      candidate.set_id(static_cast<std::uint32_t>(entry.token));
      candidate.set_logprob(entry.logprob);
      candidate.set_rank(static_cast<std::uint32_t>(entry.rank));
    }
  }
  if (!chunk.finish) return;
  const OutputFinish& finish = *chunk.finish;
  vllm::FinishInfo& info = *output.mutable_finish_info();
  info.set_num_output_tokens(static_cast<std::uint32_t>(finish.num_output_tokens));
  switch (finish.reason) {
    case FinishReason::kStop:
      info.set_finish_reason(vllm::FinishInfo::STOP);
      break;
    case FinishReason::kLength:
      info.set_finish_reason(vllm::FinishInfo::LENGTH);
      break;
    case FinishReason::kAborted:
      info.set_finish_reason(vllm::FinishInfo::ABORTED);
      break;
  }
  if (const auto* token = std::get_if<std::int32_t>(&finish.stop)) {
    if (finish.is_eos) {
      info.set_eos_token_id(static_cast<std::uint32_t>(*token));
    } else {
      info.set_stop_token_id(static_cast<std::uint32_t>(*token));
    }
  } else if (const auto* text = std::get_if<std::string>(&finish.stop)) {
    info.set_stop_string(*text);
  }
}

}  // namespace spillway
