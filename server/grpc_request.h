#pragma once

// vllm.Inference messages <-> the Service's types.

#include <string>

#include "absl/status/statusor.h"
#include "engine/model_config.h"
#include "proto/vllm_inference.pb.h"
#include "server/service.h"

namespace spillway {

// What the client wants to see of the output.
struct OutputSelection {
  bool text = true;
  bool token_ids = false;
  bool logprobs = false;
  bool candidates = false;
  bool prompt_token_ids = false;
};

OutputSelection SelectionOf(const vllm::ResponseOptions& options);

// `defaults` are the model's: an unset temperature means theirs, else 0.
//   INVALID_ARGUMENT, UNIMPLEMENTED  names the message's field, "decoding.regex"
absl::StatusOr<GenerationRequest> ToGenerationRequest(const vllm::GenerateRequest& request,
                                                      const GenerationDefaults& defaults);

// Errors of the Service, in the message's field names.
absl::Status WithMessageField(const absl::Status& status);

void FillPromptInfo(const PromptInfo& prompt, const OutputSelection& selection, vllm::PromptInfo& info);
// Appends to what `output` has, so that a unary answer is the sum of its chunks.
void AppendOutput(const OutputChunk& chunk, const OutputSelection& selection, vllm::SequenceOutput& output);

}  // namespace spillway
