#pragma once

// Model: config and packed weights of one dense decoder on one device, and its forward pass.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/home_reader.h"
#include "engine/input_writer.h"
#include "engine/kv_projector.h"
#include "engine/layer_loader.h"
#include "engine/model_config.h"
#include "engine/safetensors.h"
#include "kernels/kernels.h"

namespace spillway {

enum class DTypeChoice : std::uint8_t {
  kAuto,
  kFloat32,
  kBFloat16
};  // kAuto: the checkpoint's; float16 runs as float32 where the device does not compute with it

// kInt8: every matrix but the embedding is rounded to 8-bit integers as it is packed, one scale per output, and
// activations by token as they are multiplied (kernels/int8.h). Activations between matrices and KV keep the dtype.
enum class Quantization : std::uint8_t { kNone, kInt8 };

// Device arrays of one step, laid out by StepRunner. CSR forms as in AttentionArgs. Rows of no sequence are padding.
struct StepArrays {
  std::int64_t num_tokens = 0;
  std::int64_t num_sequences = 0;
  std::int64_t num_sampled = 0;
  const std::int32_t* tokens = nullptr;          // [num_tokens], as in EmbedArgs
  const SampleResult* sampled = nullptr;         // of the step before
  const std::int32_t* positions = nullptr;       // [num_tokens]
  const std::int32_t* blocks = nullptr;          // [num_tokens]
  const std::int32_t* query_begin = nullptr;     // [num_sequences + 1]
  const std::int32_t* first_position = nullptr;  // [num_sequences]
  const std::int32_t* block_begin = nullptr;     // [num_sequences + 1]
  const std::int32_t* block_table = nullptr;
  const std::int32_t* sampled_rows = nullptr;  // [num_sampled] token rows whose logits are wanted
  // The last num_streamed sequences have blocks at home; in block_table are those behind, which the device holds.
  std::int64_t num_streamed = 0;
  HomeReader* home_reader = nullptr;
  HomeReader::Layout home{};
  LayerLoader* layer_loader = nullptr;  // null: no blocks come up inside this step
  InputWriter* input_writer = nullptr;  // hears each layer's inputs; null where none are kept
};

class Model {
 public:
  // Packs every weight; `progress` (may be null) hears bytes done and in total. Thread: the caller's.
  //   INVALID_ARGUMENT / NOT_FOUND  a tensor is missing, has the wrong shape or type: named with both shapes
  static absl::StatusOr<std::unique_ptr<Model>> Load(
      const std::string& folder, DTypeChoice dtype, Quantization quantization, Device& device,
      const std::function<void(std::size_t done, std::size_t total)>& progress);
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const GenerationDefaults& generation_defaults() const = 0;
  virtual DType dtype() const = 0;  // of activations and KV, and of weights that are not quantized
  virtual KvLayout kv_layout() const = 0;
  virtual std::size_t weight_bytes() const = 0;

  // What projects keys and values from layer inputs again; a second copy of those weights. Once; the model outlives it.
  // UNIMPLEMENTED where that is not built.
  virtual absl::StatusOr<std::unique_ptr<KvProjector>> MakeKvProjector(std::int64_t /*max_positions*/) {
    return absl::UnimplementedError(config().architecture + ": keys and values cannot be projected from kept inputs");
  }
  // What Reserve will allocate; 0 where that is not known.
  virtual std::size_t WorkspaceBytes(std::int64_t /*max_tokens*/, std::int64_t /*max_sampled*/) const { return 0; }
  // Allocates what Forward needs for at most this many rows. Once, before Forward.
  virtual absl::Status Reserve(std::int64_t max_tokens, std::int64_t max_sampled) = 0;
  // Queues the whole forward pass. Returns device memory [num_sampled, vocab] that later work on `stream` may read.
  virtual const float* Forward(Stream& stream, const StepArrays& arrays, const KvView& kv) = 0;
};

}  // namespace spillway
