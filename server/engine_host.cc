#include "server/engine_host.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "engine/engine_group.h"
#include "engine/home_keeper.h"
#include "engine/model.h"
#include "engine/model_digest.h"
#include "kernels/status_macros.h"
#include "kvstore/file_tier.h"
#include "kvstore/tier_check.h"
#include "server/log.h"
#include "server/machine_memory.h"
#include "server/model_path.h"
#include "server/numa_placement.h"
#include "server/option_values.h"
#include "server/progress.h"

namespace spillway {
namespace {

int CoresOfThisProcess() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  return sched_getaffinity(0, sizeof(cores), &cores) == 0 ? std::max(1, CPU_COUNT(&cores)) : 1;
}

// The device of one of `count` engines: GPUs by number, or a share of the cores.
absl::StatusOr<std::unique_ptr<Device>> MakeDevice(const DeviceChoice& choice, int engine, int count) {
  if (choice.device == "cuda") {
    CudaDeviceOptions options;
    options.index = engine;
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
  const int threads = choice.threads > 0 ? static_cast<int>(choice.threads) : CoresOfThisProcess();
  options.num_workers = std::max(1, threads / count + (engine < threads % count ? 1 : 0));
  options.target = choice.cpu_target;
  options.gemm = choice.cpu_gemm;
  return MakeCpuDevice(options);
}

absl::StatusOr<std::unique_ptr<Model>> LoadModel(const Options& options, const std::string& folder, Device& device) {
  DTypeChoice dtype = DTypeChoice::kAuto;
  if (options.model.dtype == "float32") dtype = DTypeChoice::kFloat32;
  if (options.model.dtype == "bfloat16") dtype = DTypeChoice::kBFloat16;
  const Quantization quantization = options.model.quantization == "int8" ? Quantization::kInt8 : Quantization::kNone;
  const absl::Time begin = absl::Now();
  std::unique_ptr<Model> model;
  {
    ProgressBar bar("loading weights", "bytes");
    ASSIGN_OR_RETURN(model, Model::Load(folder, dtype, quantization, device, [&](std::size_t done, std::size_t total) {
                       bar.Show(static_cast<std::int64_t>(done), static_cast<std::int64_t>(total));
                     }));
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  Log(LogLevel::kInfo, "weights loaded",
      {{"folder", folder},
       {"architecture", model->config().architecture},
       {"dtype", std::string(NameOf(model->dtype()))},
       {"quantization", options.model.quantization},
       {"size", ShowSize(static_cast<std::int64_t>(model->weight_bytes()))},
       {"seconds", fmt::format("{:.3f}", seconds)}});
  return model;
}

// Null where none is asked for. Its space names all that the bytes of a block depend on beside the tokens.
absl::StatusOr<std::unique_ptr<Tier>> MakeFile(const Options& options, const std::string& folder, const Device& device,
                                               const KvLayout& layout) {
  const CacheChoice& choice = options.cache;
  if (choice.kv_file_directory.empty()) return nullptr;
  if (choice.kv_offloading_size == 0) {
    return absl::InvalidArgumentError(
        "--kv-file-directory: blocks reach files through the host tier, and "
        "--kv-offloading-size is 0");
  }
  ASSIGN_OR_RETURN(const std::string digest, ModelDigest(folder));
  FileTierOptions file;
  file.directory = choice.kv_file_directory;
  file.budget_bytes = choice.kv_file_size;
  file.block_bytes = layout.block_bytes();
  file.space = KvSpace(digest, layout.dtype, options.model.quantization, device.description());
  return MakeFileTier(file);
}

void LogCostModel(const CostModel& model) {
  const ComputeSpeed& compute = model.compute();
  Log(LogLevel::kInfo, "calibrated",
      {{"kappa_crit", fmt::format("{:.3g}", model.kappa_crit())},
       {"critical_chunk_tokens", fmt::format("{:.3g}", model.critical_chunk_tokens())},
       {"flops", fmt::format("{:.3g}/s", compute.linear_flops_per_second)},
       {"attention_flops", fmt::format("{:.3g}/s", compute.attention_flops_per_second)},
       {"kv_read", fmt::format("{:.3g} B/s", compute.kv_bytes_per_second)},
       {"step_floor", fmt::format("{:.3g} ms", 1000 * compute.step_floor_seconds)},
       {"link", fmt::format("{:.3g} B/s", model.link_bytes_per_second())}});
}

std::int64_t HostTierBytes(const CacheChoice& choice, const MachineMemory& memory, std::int64_t weight_bytes) {
  return choice.kv_offloading_size < 0 ? DefaultHostTierBytes(memory, weight_bytes) : choice.kv_offloading_size;
}

// Pages that are pinned for a GPU are there already, where the driver has put them.
void PlaceSlab(const Device& device, const Buffer& slab) {
  if (device.host_kv() != HostKv::kInPlace) return;
  const absl::StatusOr<std::string> placed = PlaceOnLocalNodes(slab.get(), slab.size_bytes);
  if (placed.ok()) {
    Log(LogLevel::kInfo, "host tier placed", {{"memory_nodes", *placed}});
  } else {
    Log(LogLevel::kWarning, "the host tier's pages lie where they are touched first",
        {{"why", std::string(placed.status().message())}});
  }
}

// A tier of less than one block is none.
absl::StatusOr<std::unique_ptr<HostTier>> MakeHost(const CacheChoice& choice, const MachineMemory& memory,
                                                   const MemoryInUse& used, Device& device, const KvLayout& layout,
                                                   Tier* lower) {
  const std::int64_t bytes = HostTierBytes(choice, memory, used.weight_bytes);
  const auto num_blocks = static_cast<std::uint64_t>(bytes) / layout.block_bytes();
  if (num_blocks == 0) return MakeNullHostTier();
  RETURN_IF_ERROR(CheckRoom(bytes, memory, used));
  if (bytes <= used.kv_cache_bytes) {
    Log(LogLevel::kWarning, "the host tier is not larger than the device's KV cache, so it can only mirror it",
        {{"host_tier", ShowSize(bytes)}, {"kv_cache", ShowSize(used.kv_cache_bytes)}});
  }
  ASSIGN_OR_RETURN(Buffer slab, device.Allocate(MemoryKind::kPinnedHost, num_blocks * layout.block_bytes()));
  PlaceSlab(device, slab);
  return MakeHostTier(std::move(slab),
                      {.block_bytes = layout.block_bytes(),
                       .num_blocks = static_cast<std::uint32_t>(std::min<std::uint64_t>(num_blocks, 0x7fffffff)),
                       .store_threshold = static_cast<int>(choice.kv_store_threshold),
                       .verify = choice.kv_verify ? KvVerify::kOn : KvVerify::kOff,
                       .lower = lower});
}

}  // namespace

absl::Status CheckRoom(std::int64_t host_bytes, const MachineMemory& memory, const MemoryInUse& used) {
  // The weights are in memory already; the pages of the rest come with use.
  constexpr std::int64_t kProcessBytes = std::int64_t{128} << 20;  // code, heap, requests, what else is kept
  constexpr std::int64_t kBookkeepingShare = 64;                   // of the tier: its index, page tables
  const std::int64_t beside = used.kv_cache_bytes + used.workspace_bytes + kProcessBytes;
  std::int64_t room = memory.available_bytes - beside;
  std::string limit = fmt::format("{} of memory are available", ShowSize(memory.available_bytes));
  if (memory.cgroup_limit_bytes && *memory.cgroup_limit_bytes - used.weight_bytes - beside < room) {
    room = *memory.cgroup_limit_bytes - used.weight_bytes - beside;
    limit = fmt::format("the cgroup's limit is {}, the weights take {}", ShowSize(*memory.cgroup_limit_bytes),
                        ShowSize(used.weight_bytes));
  }
  room = std::max<std::int64_t>(room, 0) / (kBookkeepingShare + 1) * kBookkeepingShare;
  if (host_bytes <= room) return absl::OkStatus();
  return absl::InvalidArgumentError(fmt::format(
      "--kv-offloading-size: {} do not fit: {}, the KV cache takes {}, a step {}, everything else is given {}, the "
      "bookkeeping of the tier a {}th of its size, which leaves {}",
      ShowSize(host_bytes), limit, ShowSize(used.kv_cache_bytes), ShowSize(used.workspace_bytes),
      ShowSize(kProcessBytes), kBookkeepingShare, ShowSize(room)));
}

std::string KvSpace(std::string_view model_digest, DType dtype, std::string_view quantization,
                    std::string_view compute) {
  return fmt::format("policy exact; model {}; dtype {}; quantization {}; block {}; compute {}", model_digest,
                     NameOf(dtype), quantization, kBlockTokens, compute);
}

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
  const bool exceeds = tokens >= std::int64_t{HomeKeeper::kMinDeviceBlocks} * kBlockTokens;
  const std::int64_t home_tokens = exceeds ? request.home_tokens : 0;
  const std::int64_t limit = tokens + home_tokens;
  if (request.max_model_len > limit) {
    return absl::InvalidArgumentError(
        fmt::format("--max-model-len: {} tokens do not fit a KV cache of {}, which holds {} tokens, and the host tier, "
                    "which holds {} beyond them; give --kv-cache-memory-bytes {} or more",
                    request.max_model_len, ShowSize(capacity.kv_cache_bytes), tokens, home_tokens,
                    (request.max_model_len - home_tokens + kBlockTokens - 1) / kBlockTokens * request.block_bytes));
  }
  capacity.max_model_len = request.max_model_len > 0 ? request.max_model_len : std::min(request.max_positions, limit);
  return capacity;
}

namespace {

EngineOptions EngineOptionsOf(const Options& options, const Capacity& capacity) {
  EngineOptions engine;
  engine.kv_cache_bytes = capacity.kv_cache_bytes;
  engine.max_model_len = static_cast<std::int32_t>(capacity.max_model_len);
  engine.max_num_seqs = static_cast<std::int32_t>(options.scheduling.max_num_seqs);
  engine.max_num_batched_tokens = static_cast<std::int32_t>(options.scheduling.max_num_batched_tokens);
  engine.long_prefill_token_threshold = static_cast<std::int32_t>(options.scheduling.long_prefill_token_threshold);
  engine.max_queued_requests = static_cast<std::int32_t>(options.scheduling.max_num_queued_reqs);
  engine.scheduling_policy = SchedulingPolicyNamed(options.scheduling.policy).value();
  engine.overlap_steps = options.scheduling.async_scheduling.value_or(options.device.device == "cuda");
  engine.load_choice = LoadChoiceNamed(options.scheduling.load_choice).value();
  engine.activation_recompute = static_cast<std::int32_t>(options.cache.kv_activation_recompute);
  engine.enable_prefix_caching = options.cache.enable_prefix_caching;
  engine.prefix_hash_seed = options.cache.prefix_hash_seed;
  engine.stall_timeout = absl::Seconds(options.life.engine_stall_timeout);
  engine.link_bytes_per_second = static_cast<double>(options.cache.cpu_link_bandwidth);
  engine.link_latency_seconds = options.cache.cpu_link_latency;
  engine.max_transfer_bytes_per_second = static_cast<double>(options.cache.kv_offloading_bandwidth);
  return engine;
}

// Of an engine's slots of the host tier, those that may be the only place of a sequence's blocks.
absl::StatusOr<std::int64_t> HomeBlocks(const Options& options, const Model& model, std::int64_t num_slots) {
  if (options.cache.kv_activation_recompute != kRecomputeOff) {
    if (options.device.device == "cuda") {
      return absl::UnimplementedError(
          "--kv-activation-recompute: not on the cuda device, where a product's bits may depend on its rows");
    }
    RETURN_IF_ERROR(CheckRecomputes(model.config()));
    num_slots = HomeSlotsBesideInputs(num_slots, InputLayoutOf(model.config(), model.kv_layout()), model.kv_layout());
  }
  return num_slots;
}

// One block through the tiers, before anything depends on them.
absl::Status CheckTiersAtStart(Device& device, HostTier& host, const KvLayout& layout) {
  if (host.stats().capacity_blocks == 0) return absl::OkStatus();
  const auto check = CheckTiers(device, host, layout, 1);
  if (!check.ok()) {
    return absl::Status(check.status().code(), fmt::format("the tiers do not give back what was stored: {}",
                                                           std::string(check.status().message())));
  }
  Log(LogLevel::kInfo, "tiers checked",
      {{"host_blocks", fmt::format("{}", check->host_blocks)},
       {"file_blocks", fmt::format("{}", check->lower_blocks)},
       {"milliseconds", fmt::format("{:.2f}", 1e3 * check->seconds)}});
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<EngineHost> MakeEngineHost(const Options& options, const Environment& environment) {
  EngineHost host;
  if (options.device.device == "cuda" && (options.cache.cpu_link_bandwidth > 0 || options.cache.cpu_link_latency > 0)) {
    return absl::InvalidArgumentError(
        "--cpu-link-bandwidth, --cpu-link-latency: they stand in for a bus on the cpu device; a GPU has its own");
  }
  const auto num_engines = static_cast<int>(options.device.data_parallel_size);
  for (int i = 0; i < num_engines; ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<Device> device, MakeDevice(options.device, i, num_engines));
    host.devices.push_back(std::move(device));
    if (host.devices[static_cast<std::size_t>(i)]->description() != host.device().description()) {
      return absl::InvalidArgumentError(
          fmt::format("--data-parallel-size: engines share cached blocks, so their devices must compute alike; {} is "
                      "'{}', the first is '{}'",
                      i, host.devices.back()->description(), host.device().description()));
    }
  }
  ASSIGN_OR_RETURN(host.folder, ResolveModel(options.model.model, environment));
  ASSIGN_OR_RETURN(host.tokenizer, Tokenizer::Load(host.folder));
  host.chat_template = MakeChatTemplate(*host.tokenizer);
  std::vector<std::unique_ptr<Model>> models;  // every engine packs its own weights
  for (const auto& device : host.devices) {
    ASSIGN_OR_RETURN(std::unique_ptr<Model> loaded, LoadModel(options, host.folder, *device));
    models.push_back(std::move(loaded));
  }
  const Model* const model = models.front().get();
  const KvLayout layout = model->kv_layout();
  const std::int64_t weight_bytes = num_engines * static_cast<std::int64_t>(model->weight_bytes());
  const MachineMemory memory = ReadMachineMemory();
  // A GPU's own memory bounds the default there; a quarter of what the weights left is kept for activations.
  const std::int64_t default_bytes = options.device.device == "cuda"
                                         ? static_cast<std::int64_t>(host.device().free_bytes() / 4 * 3)
                                         : DefaultKvCacheBytes(memory, weight_bytes) / num_engines;
  const auto block_bytes = static_cast<std::int64_t>(layout.block_bytes());
  const std::int64_t host_bytes = HostTierBytes(options.cache, memory, weight_bytes);
  ASSIGN_OR_RETURN(const std::int64_t home_blocks, HomeBlocks(options, *model, host_bytes / block_bytes / num_engines));
  ASSIGN_OR_RETURN(const Capacity capacity,
                   PlanCapacity({.kv_cache_bytes = options.cache.kv_cache_memory_bytes,
                                 .max_model_len = options.model.max_model_len,
                                 .default_kv_cache_bytes = default_bytes,
                                 .block_bytes = block_bytes,
                                 .max_positions = model->config().max_positions,
                                 .home_tokens = home_blocks / kSegmentBlocks * kSegmentTokens}));
  if (options.model.max_model_len == 0 && capacity.max_model_len < model->config().max_positions) {
    Log(LogLevel::kWarning, "the KV cache and the host tier hold less than the model's context; sequences are limited",
        {{"max_model_len", fmt::format("{}", capacity.max_model_len)},
         {"positions", fmt::format("{}", model->config().max_positions)}});
  }

  ServiceOptions service;
  service.model_names = options.model.served_names;
  if (service.model_names.empty()) {
    service.model_names = {options.model.model.empty() ? kDemoModelName : options.model.model};
  }
  service.takes_generation_defaults = options.model.generation_config != "vllm";
  service.cache_salt_by_tenant = options.cache.cache_salt_by_tenant;
  host.metrics = Metrics::Make(service.model_names.front(), static_cast<int>(capacity.max_model_len), num_engines);

  EngineOptions engine = EngineOptionsOf(options, capacity);
  ASSIGN_OR_RETURN(host.file_tier, MakeFile(options, host.folder, host.device(), layout));
  MemoryInUse used{.weight_bytes = weight_bytes};
  if (options.device.device != "cuda") {  // a GPU has its own memory for these
    used.kv_cache_bytes = num_engines * capacity.kv_cache_bytes;
    used.workspace_bytes = num_engines * static_cast<std::int64_t>(
                                             model->WorkspaceBytes(engine.max_num_batched_tokens, engine.max_num_seqs));
  }
  ASSIGN_OR_RETURN(host.host_tier,
                   MakeHost(options.cache, memory, used, *host.devices.front(), layout, host.file_tier.get()));
  RETURN_IF_ERROR(CheckTiersAtStart(*host.devices.front(), *host.host_tier, layout));
  engine.host_tier = host.host_tier.get();
  engine.num_engines = num_engines;
  std::vector<std::unique_ptr<Engine>> engines;
  for (int i = 0; i < num_engines; ++i) {
    const auto index = static_cast<std::size_t>(i);
    ASSIGN_OR_RETURN(std::unique_ptr<Engine> made, Engine::Make(*host.devices[index], std::move(models[index]), engine,
                                                                &host.metrics->ObserverOf(i)));
    host.metrics->Attach(i, *made);
    engines.push_back(std::move(made));
  }
  LogCostModel(*engines.front()->status().cost_model);
  host.engine = MakeEngineGroup(std::move(engines));
  host.service = Service::Make(*host.engine, *host.tokenizer, service);
  return host;
}

}  // namespace spillway
