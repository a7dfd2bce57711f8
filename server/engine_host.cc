#include "server/engine_host.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "engine/model.h"
#include "engine/model_digest.h"
#include "kernels/status_macros.h"
#include "kvstore/file_tier.h"
#include "server/log.h"
#include "server/machine_memory.h"
#include "server/model_path.h"
#include "server/option_values.h"
#include "server/progress.h"

namespace spillway {
namespace {

// --generation-config vllm: the model without the sampling defaults of its generation_config.json.
class ModelWithoutDefaults : public Model {
 public:
  explicit ModelWithoutDefaults(std::unique_ptr<Model> model) : model_(std::move(model)) {
    defaults_.eos_tokens = model_->generation_defaults().eos_tokens;
  }
  const ModelConfig& config() const override { return model_->config(); }
  const GenerationDefaults& generation_defaults() const override { return defaults_; }
  DType dtype() const override { return model_->dtype(); }
  KvLayout kv_layout() const override { return model_->kv_layout(); }
  std::size_t weight_bytes() const override { return model_->weight_bytes(); }
  absl::Status Reserve(std::int64_t max_tokens, std::int64_t max_sampled) override {
    return model_->Reserve(max_tokens, max_sampled);
  }
  const float* Forward(Stream& stream, const StepArrays& arrays, const KvView& kv) override {
    return model_->Forward(stream, arrays, kv);
  }

 private:
  const std::unique_ptr<Model> model_;
  GenerationDefaults defaults_;
};

absl::StatusOr<std::unique_ptr<Device>> MakeDevice(const DeviceChoice& choice) {
  if (choice.device == "cuda") {
    CudaDeviceOptions options;
    if (choice.gpu_memory_utilization > 0) options.gpu_memory_utilization = choice.gpu_memory_utilization;
    options.batch_invariant = choice.batch_invariant;
    options.enforce_eager = choice.enforce_eager;
    absl::StatusOr<std::unique_ptr<Device>> device = MakeCudaDevice(options);
    if (device.ok()) return device;
    return absl::Status(device.status().code(), fmt::format("--device: {}", std::string(device.status().message())));
  }
  if (choice.gpu_memory_utilization > 0) {
    return absl::InvalidArgumentError(
        "--gpu-memory-utilization: the cpu device has no GPU memory; its KV cache is sized by --kv-cache-memory-bytes");
  }
  CpuDeviceOptions options;
  options.num_workers = static_cast<int>(choice.threads);
  options.target = choice.cpu_target;
  options.gemm = choice.cpu_gemm;
  return MakeCpuDevice(options);
}

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const Options& options, const std::string& folder, Device& device) {
  DTypeChoice dtype = DTypeChoice::kAuto;
  if (options.model.dtype == "float32") dtype = DTypeChoice::kFloat32;
  if (options.model.dtype == "bfloat16") dtype = DTypeChoice::kBFloat16;
  const absl::Time begin = absl::Now();
  std::unique_ptr<Model> model;
  {
    ProgressBar bar("loading weights", "bytes");
    ASSIGN_OR_RETURN(model, Model::Load(folder, dtype, device, [&](std::size_t done, std::size_t total) {
                       bar.Show(static_cast<std::int64_t>(done), static_cast<std::int64_t>(total));
                     }));
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  Log(LogLevel::kInfo, "weights loaded",
      {{"folder", folder},
       {"architecture", model->config().architecture},
       {"dtype", std::string(NameOf(model->dtype()))},
       {"size", ShowSize(static_cast<std::int64_t>(model->weight_bytes()))},
       {"seconds", fmt::format("{:.3f}", seconds)}});
  if (options.model.generation_config == "vllm") model = std::make_unique<ModelWithoutDefaults>(std::move(model));
  return model;
}

// Null where none is asked for. Its space names all that the bytes of a block depend on beside the tokens.
absl::StatusOr<std::unique_ptr<Tier>> MakeFile(const CacheChoice& choice, const std::string& folder,
                                               const Device& device, const KvLayout& layout) {
  if (choice.kv_file_directory.empty()) return nullptr;
  if (choice.kv_offloading_size == 0) {
    return absl::InvalidArgumentError(
        "--kv-file-directory: blocks reach files through the host tier, and "
        "--kv-offloading-size is 0");
  }
  ASSIGN_OR_RETURN(const std::string digest, ModelDigest(folder));
  FileTierOptions options;
  options.directory = choice.kv_file_directory;
  options.budget_bytes = choice.kv_file_size;
  options.block_bytes = layout.block_bytes();
  options.space = fmt::format("policy exact; model {}; dtype {}; block {}; compute {}", digest, NameOf(layout.dtype),
                              kBlockTokens, device.description());
  return MakeFileTier(options);
}

// A tier of less than one block is none.
absl::StatusOr<std::unique_ptr<HostTier>> MakeHost(const CacheChoice& choice, const MachineMemory& memory,
                                                   std::int64_t weight_bytes, std::int64_t device_bytes, Device& device,
                                                   const KvLayout& layout, Tier* lower) {
  const bool is_default = choice.kv_offloading_size < 0;
  const std::int64_t bytes = is_default ? DefaultHostTierBytes(memory, weight_bytes) : choice.kv_offloading_size;
  const auto num_blocks = static_cast<std::uint64_t>(bytes) / layout.block_bytes();
  if (num_blocks == 0) return MakeNullHostTier();
  std::int64_t room = memory.available_bytes;
  if (memory.cgroup_limit_bytes) room = std::min(room, *memory.cgroup_limit_bytes - weight_bytes);
  if (bytes > room) {
    return absl::InvalidArgumentError(
        fmt::format("--kv-offloading-size: {} do not fit the {} of memory that this process may still take",
                    ShowSize(bytes), ShowSize(std::max<std::int64_t>(room, 0))));
  }
  if (bytes <= device_bytes) {
    Log(LogLevel::kWarning, "the host tier is not larger than the device's KV cache, so it can only mirror it",
        {{"host_tier", ShowSize(bytes)}, {"kv_cache", ShowSize(device_bytes)}});
  }
  ASSIGN_OR_RETURN(Buffer slab, device.Allocate(MemoryKind::kPinnedHost, num_blocks * layout.block_bytes()));
  return MakeHostTier(std::move(slab),
                      {.block_bytes = layout.block_bytes(),
                       .num_blocks = static_cast<std::uint32_t>(std::min<std::uint64_t>(num_blocks, 0x7fffffff)),
                       .store_threshold = static_cast<int>(choice.kv_store_threshold),
                       .verify = choice.kv_verify ? KvVerify::kOn : KvVerify::kOff,
                       .lower = lower});
}

}  // namespace

absl::StatusOr<Capacity> PlanCapacity(const CapacityRequest& request) {
  Capacity capacity;
  capacity.kv_cache_bytes = request.kv_cache_bytes > 0 ? request.kv_cache_bytes : request.default_kv_cache_bytes;
  const std::int64_t tokens = capacity.kv_cache_bytes / request.block_bytes * kBlockTokens;
  if (tokens == 0) {
    return absl::InvalidArgumentError(
        fmt::format("--kv-cache-memory-bytes: {} is less than one block of {} tokens ({})",
                    ShowSize(capacity.kv_cache_bytes), kBlockTokens, ShowSize(request.block_bytes)));
  }
  if (request.max_model_len > request.max_positions) {
    return absl::InvalidArgumentError(fmt::format("--max-model-len: {} is more than the model's {} positions",
                                                  request.max_model_len, request.max_positions));
  }
  if (request.max_model_len > tokens) {
    return absl::InvalidArgumentError(
        fmt::format("--max-model-len: {} tokens do not fit a KV cache of {}, which holds {} tokens; give "
                    "--kv-cache-memory-bytes {} or more",
                    request.max_model_len, ShowSize(capacity.kv_cache_bytes), tokens,
                    (request.max_model_len + kBlockTokens - 1) / kBlockTokens * request.block_bytes));
  }
  capacity.max_model_len = request.max_model_len > 0 ? request.max_model_len : std::min(request.max_positions, tokens);
  return capacity;
}

absl::StatusOr<EngineHost> MakeEngineHost(const Options& options, const Environment& environment) {
  EngineHost host;
  ASSIGN_OR_RETURN(host.device, MakeDevice(options.device));
  ASSIGN_OR_RETURN(host.folder, ResolveModel(options.model.model, environment));
  ASSIGN_OR_RETURN(host.tokenizer, Tokenizer::Load(host.folder));
  host.chat_template = MakeChatTemplate(*host.tokenizer);
  ASSIGN_OR_RETURN(std::unique_ptr<Model> model, LoadModel(options, host.folder, *host.device));

  const auto weight_bytes = static_cast<std::int64_t>(model->weight_bytes());
  const MachineMemory memory = ReadMachineMemory();
  // A GPU's own memory bounds the default there; a quarter of what the weights left is kept for activations.
  const std::int64_t default_bytes = options.device.device == "cuda"
                                         ? static_cast<std::int64_t>(host.device->free_bytes() / 4 * 3)
                                         : DefaultKvCacheBytes(memory, weight_bytes);
  ASSIGN_OR_RETURN(const Capacity capacity,
                   PlanCapacity({.kv_cache_bytes = options.cache.kv_cache_memory_bytes,
                                 .max_model_len = options.model.max_model_len,
                                 .default_kv_cache_bytes = default_bytes,
                                 .block_bytes = static_cast<std::int64_t>(model->kv_layout().block_bytes()),
                                 .max_positions = model->config().max_positions}));
  if (options.model.max_model_len == 0 && capacity.max_model_len < model->config().max_positions) {
    Log(LogLevel::kWarning, "the KV cache is smaller than the model's context; sequences are limited to it",
        {{"max_model_len", fmt::format("{}", capacity.max_model_len)},
         {"positions", fmt::format("{}", model->config().max_positions)}});
  }

  ServiceOptions service;
  service.model_names = options.model.served_names;
  if (service.model_names.empty()) service.model_names = {options.model.model};
  host.metrics = Metrics::Make(service.model_names.front(), static_cast<int>(capacity.max_model_len));

  EngineOptions engine;
  engine.kv_cache_bytes = capacity.kv_cache_bytes;
  engine.max_model_len = static_cast<std::int32_t>(capacity.max_model_len);
  engine.max_num_seqs = static_cast<std::int32_t>(options.scheduling.max_num_seqs);
  engine.max_num_batched_tokens = static_cast<std::int32_t>(options.scheduling.max_num_batched_tokens);
  engine.long_prefill_token_threshold = static_cast<std::int32_t>(options.scheduling.long_prefill_token_threshold);
  engine.max_queued_requests = static_cast<std::int32_t>(options.scheduling.max_num_queued_reqs);
  engine.scheduling_policy = SchedulingPolicyNamed(options.scheduling.policy).value();
  engine.enable_prefix_caching = options.cache.enable_prefix_caching;
  engine.prefix_hash_seed = options.cache.prefix_hash_seed;
  engine.stall_timeout = absl::Seconds(options.life.engine_stall_timeout);
  ASSIGN_OR_RETURN(host.file_tier, MakeFile(options.cache, host.folder, *host.device, model->kv_layout()));
  ASSIGN_OR_RETURN(host.host_tier, MakeHost(options.cache, memory, weight_bytes, capacity.kv_cache_bytes, *host.device,
                                            model->kv_layout(), host.file_tier.get()));
  engine.host_tier = host.host_tier.get();
  engine.link_bytes_per_second = static_cast<double>(options.cache.cpu_link_bandwidth);
  engine.link_latency_seconds = options.cache.cpu_link_latency;
  engine.max_transfer_bytes_per_second = static_cast<double>(options.cache.kv_offloading_bandwidth);
  ASSIGN_OR_RETURN(host.engine, Engine::Make(*host.device, std::move(model), engine, host.metrics.get()));
  host.metrics->Attach(*host.engine);
  host.service = Service::Make(*host.engine, *host.tokenizer, service);
  return host;
}

}  // namespace spillway
