// Where the model is found, and how much memory and context it gets.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "server/await_generation.h"
#include "server/engine_host.h"
#include "server/machine_memory.h"
#include "server/model_path.h"
#include "server/numa_placement.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/temp_folder.h"

namespace spillway {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(NumaPlacement, LocalNodesAreThoseOfTheCores) {
  const TempFolder folder;
  folder.Write("sys/devices/system/node/has_memory", "0-1,3\n");
  folder.Write("sys/devices/system/node/node0/cpulist", "0-3,8-11\n");
  folder.Write("sys/devices/system/node/node1/cpulist", "4-7\n");
  folder.Write("sys/devices/system/node/node2/cpulist", "12\n");  // cores without memory
  folder.Write("sys/devices/system/node/node3/cpulist", "\n");    // memory without cores
  EXPECT_EQ(LocalNodes({4}, folder.path()), std::vector<int>({1}));
  EXPECT_EQ(LocalNodes({9, 5}, folder.path()), std::vector<int>({0, 1}));
  EXPECT_EQ(LocalNodes({12}, folder.path()), std::vector<int>({0}));
  EXPECT_EQ(LocalNodes({0}, "/nonexistent"), std::vector<int>({0}));
}

TEST(NumaPlacement, OneNodeNeedsNothing) {
  const TempFolder folder;
  folder.Write("sys/devices/system/node/has_memory", "0\n");
  EXPECT_EQ(PlaceOnLocalNodes(nullptr, 1 << 20, folder.path()).value(), "one node");
  EXPECT_EQ(PlaceOnLocalNodes(nullptr, 1 << 20, "/nonexistent").value(), "one node");
}

// This machine's own node, among two that the folder claims: mbind is called and takes.
TEST(NumaPlacement, PagesAreAskedOfTheNode) {
  const TempFolder folder;
  folder.Write("sys/devices/system/node/has_memory", "0-1\n");
  folder.Write("sys/devices/system/node/node0/cpulist", "0-1023\n");
  folder.Write("sys/devices/system/node/node1/cpulist", "\n");
  const auto device = MakeCpuDevice({}).value();
  const Buffer slab = device->Allocate(MemoryKind::kPinnedHost, 4 << 20).value();
  const auto placed = PlaceOnLocalNodes(slab.get(), slab.size_bytes, folder.path());
  if (!placed.ok()) GTEST_SKIP() << placed.status();  // not every container lets it
  EXPECT_EQ(*placed, "node 0");
  EXPECT_FALSE(PlaceOnLocalNodes(slab.get() + 1, 4096, folder.path()).ok()) << "mbind was not called";
}

TEST(ResolveModel, TakesAFolderWithAConfig) {
  const TempFolder folder;
  folder.Write("m/config.json", "{}");
  fs::create_directories(folder.File("empty"));
  EXPECT_EQ(ResolveModel(folder.File("m"), {}).value(), folder.File("m"));
  EXPECT_THAT(std::string(ResolveModel(folder.File("empty"), {}).status().message()), HasSubstr("no config.json"));
}

TEST(ResolveModel, FindsHubIdsInTheCache) {
  const TempFolder folder;
  folder.Write("hub/models--org--name/refs/main", "abc");
  folder.Write("hub/models--org--name/snapshots/abc/config.json", "{}");
  folder.Write("hub/models--org--name/snapshots/old/config.json", "{}");
  folder.Write("hub/models--gpt2/snapshots/only/config.json", "{}");
  const std::string snapshot = folder.File("hub/models--org--name/snapshots/abc");
  EXPECT_EQ(ResolveModel("org/name", {{"HF_HOME", folder.path()}}).value(), snapshot);
  EXPECT_EQ(ResolveModel("org/name", {{"HF_HUB_CACHE", folder.File("hub")}, {"HF_HOME", "/nowhere"}}).value(),
            snapshot);
  EXPECT_EQ(ResolveModel("gpt2", {{"HF_HOME", folder.path()}}).value(), folder.File("hub/models--gpt2/snapshots/only"));
}

TEST(ResolveModel, SaysHowToFetchWhatIsAbsent) {
  const auto absent = ResolveModel("org/name", {{"HF_HOME", "/nonexistent"}});
  EXPECT_TRUE(absl::IsNotFound(absent.status()));
  EXPECT_THAT(std::string(absent.status().message()), HasSubstr("hf download org/name"));
  EXPECT_TRUE(absl::IsInvalidArgument(ResolveModel("/no/such/folder", {}).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(ResolveModel("not a Hub id", {}).status()));
}

TEST(FindDemoModel, IsBesideTheInstalledOrTheBuiltProgram) {
  const TempFolder folder;
  EXPECT_TRUE(absl::IsNotFound(FindDemoModel(folder.File("bin/spillway")).status()));
  folder.Write("bin/share/spillway/demo_model/config.json", "{}");
  EXPECT_EQ(FindDemoModel(folder.File("bin/spillway")).value(), folder.File("bin/share/spillway/demo_model"));
  folder.Write("share/spillway/demo_model/config.json", "{}");
  EXPECT_EQ(FindDemoModel(folder.File("bin/spillway")).value(), folder.File("share/spillway/demo_model"));
}

TEST(MachineMemory, ReadsTheTightestCgroupOfVersion2) {
  const TempFolder root;
  root.Write("proc/meminfo", "MemTotal: 100 kB\nMemAvailable:   8388608 kB\n");
  root.Write("proc/self/cgroup", "0::/pod/container\n");
  root.Write("sys/fs/cgroup/pod/memory.max", "6442450944\n");
  root.Write("sys/fs/cgroup/pod/container/memory.max", "max\n");
  const MachineMemory memory = ReadMachineMemory(root.path());
  EXPECT_EQ(memory.available_bytes, std::int64_t{8} << 30);
  EXPECT_EQ(memory.cgroup_limit_bytes, std::int64_t{6} << 30);
}

TEST(MachineMemory, ReadsVersion1AndNoLimit) {
  const TempFolder root;
  root.Write("proc/meminfo", "MemAvailable: 1024 kB\n");
  root.Write("proc/self/cgroup", "5:cpu:/a\n4:memory:/a\n");
  root.Write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(ReadMachineMemory(root.path()).cgroup_limit_bytes, std::nullopt);
  root.Write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1048576\n");
  EXPECT_EQ(ReadMachineMemory(root.path()).cgroup_limit_bytes, 1 << 20);
  EXPECT_GT(ReadMachineMemory().available_bytes, 0);
}

TEST(MachineMemory, DefaultKvCacheIsAnEighth) {
  constexpr std::int64_t kGiB = std::int64_t{1} << 30;
  EXPECT_EQ(DefaultKvCacheBytes({.available_bytes = 64 * kGiB}, kGiB), 2 * kGiB);
  EXPECT_EQ(DefaultKvCacheBytes({.available_bytes = 64 * kGiB, .cgroup_limit_bytes = 11 * kGiB}, kGiB), kGiB);
  const MachineMemory small{.available_bytes = 64 * kGiB, .cgroup_limit_bytes = 2 * kGiB};
  EXPECT_EQ(DefaultKvCacheBytes(small, kGiB), kGiB / 4 / 8) << "it starts in 2 GiB too";
  EXPECT_EQ(DefaultHostTierBytes(small, kGiB), kGiB / 4 - kGiB / 4 / 8);
  EXPECT_EQ(DefaultKvCacheBytes(small, 3 * kGiB), 0);
}

TEST(KvSpace, DiffersWithAllThatChangesTheBytes) {
  const std::string space = KvSpace("abc", DType::kBF16, "none", "cpu avx512 amx-gemm");
  EXPECT_EQ(space, KvSpace("abc", DType::kBF16, "none", "cpu avx512 amx-gemm"));
  EXPECT_NE(space, KvSpace("abd", DType::kBF16, "none", "cpu avx512 amx-gemm"));
  EXPECT_NE(space, KvSpace("abc", DType::kF32, "none", "cpu avx512 amx-gemm"));
  EXPECT_NE(space, KvSpace("abc", DType::kBF16, "int8", "cpu avx512 amx-gemm"));
  EXPECT_NE(space, KvSpace("abc", DType::kBF16, "none", "cpu avx512 fma-gemm"));
}

TEST(PlanCapacity, FitsTheContextToTheCache) {
  CapacityRequest request{.default_kv_cache_bytes = 1000, .block_bytes = 100, .max_positions = 512};
  EXPECT_EQ(PlanCapacity(request)->max_model_len, 160);
  EXPECT_EQ(PlanCapacity(request)->kv_cache_bytes, 1000);
  request.kv_cache_bytes = 100'000;
  EXPECT_EQ(PlanCapacity(request)->max_model_len, 512);
  request.max_model_len = 100;
  EXPECT_EQ(PlanCapacity(request)->max_model_len, 100);
}

TEST(PlanCapacity, CountsTheHostTierBeyondTheCache) {
  CapacityRequest request{
      .default_kv_cache_bytes = 3200, .block_bytes = 100, .max_positions = 4096, .home_tokens = 1024};
  EXPECT_EQ(PlanCapacity(request)->max_model_len, 512 + 1024);
  request.max_model_len = 512 + 1024;
  EXPECT_TRUE(PlanCapacity(request).ok());
  ++request.max_model_len;
  EXPECT_THAT(std::string(PlanCapacity(request).status().message()), HasSubstr("which holds 1024 beyond them"));
  request = {.default_kv_cache_bytes = 3100, .block_bytes = 100, .max_positions = 4096, .home_tokens = 1024};
  EXPECT_EQ(PlanCapacity(request)->max_model_len, 31 * kBlockTokens) << "a KV cache too small to stream";
}

TEST(PlanCapacity, RefusesWhatCannotBe) {
  const auto error = [](const CapacityRequest& request) {
    return std::string(PlanCapacity(request).status().message());
  };
  CapacityRequest request{.default_kv_cache_bytes = 99, .block_bytes = 100, .max_positions = 512};
  EXPECT_THAT(error(request), HasSubstr("--kv-cache-memory-bytes: 99 B is less than one block"));
  request.default_kv_cache_bytes = 1000;
  request.max_model_len = 513;
  EXPECT_THAT(error(request), HasSubstr("--max-model-len: 513 is more than the model's 512"));
  request.max_model_len = 161;
  EXPECT_THAT(error(request), HasSubstr("give --kv-cache-memory-bytes 1100 or more"));
}

TEST(MakeEngineHost, RefusesAShareOfGpuMemoryOnTheCpuDevice) {
  Options options;
  options.device.gpu_memory_utilization = 0.5;
  const absl::Status status = MakeEngineHost(options, {}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("--gpu-memory-utilization"));
}

TEST(MakeEngineHost, RefusesAPacedLinkOnTheCudaDevice) {
  Options options;
  options.device.device = "cuda";
  options.cache.cpu_link_bandwidth = 1'000'000'000;
  const absl::Status status = MakeEngineHost(options, {}).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("--cpu-link-bandwidth"));
}

TEST(MakeEngineHost, RefusesActivationRecomputeWhereItSavesNothing) {
  const TempFolder folder;
  fs::create_directories(folder.File("m"));
  ASSERT_TRUE(WriteRandomLlama(folder.File("m"), {.heads = 4, .kv_heads = 2}).ok());
  ASSERT_TRUE(WriteByteTokenizer(folder.File("m"), RandomLlamaOptions().vocab).ok());
  Options options;
  options.model.model = folder.File("m");
  options.cache.kv_activation_recompute = kRecomputeAuto;
  const absl::Status grouped = MakeEngineHost(options, {}).status();
  EXPECT_TRUE(absl::IsUnimplemented(grouped)) << grouped;
  EXPECT_THAT(std::string(grouped.message()), HasSubstr("4 heads to 2 KV heads"));
}

TEST(CheckRoom, SaysWhyAHostTierDoesNotFit) {
  constexpr std::int64_t kMiB = std::int64_t{1} << 20;
  constexpr std::int64_t kGiB = kMiB << 10;
  const MemoryInUse used{.weight_bytes = kGiB, .kv_cache_bytes = 2 * kGiB, .workspace_bytes = 256 * kMiB};
  EXPECT_TRUE(CheckRoom(5 * kGiB, {.available_bytes = 8 * kGiB}, used).ok());
  const auto error = [](const absl::Status& status) { return std::string(status.message()); };
  EXPECT_THAT(error(CheckRoom(6 * kGiB, {.available_bytes = 8 * kGiB}, used)),
              AllOf(HasSubstr("--kv-offloading-size: 6 GiB do not fit: 8 GiB of memory are available"),
                    HasSubstr("the KV cache takes 2 GiB, a step 256 MiB, everything else is given 128 MiB"),
                    HasSubstr("leaves 5.538 GiB")));
  EXPECT_THAT(error(CheckRoom(kGiB, {.available_bytes = 8 * kGiB, .cgroup_limit_bytes = 4 * kGiB}, used)),
              AllOf(HasSubstr("the cgroup's limit is 4 GiB, the weights take 1 GiB"), HasSubstr("leaves 630.2 MiB")));
  EXPECT_THAT(error(CheckRoom(kMiB, {.available_bytes = 2 * kGiB}, used)), HasSubstr("leaves 0"));
}

// One conversation after another, some of them repeated, through the whole program below the front ends.
std::vector<std::vector<std::int32_t>> AnswersWith(const std::string& model, const std::vector<std::string>& flags,
                                                   EngineStatus& status) {
  std::vector<std::string> arguments = {"serve", model, "--max-model-len", "96"};
  arguments.insert(arguments.end(), flags.begin(), flags.end());
  auto line = ParseCommandLine(arguments, {});
  EXPECT_TRUE(line.ok()) << line.status();
  auto host = MakeEngineHost(line->options, {});
  EXPECT_TRUE(host.ok()) << host.status();
  std::vector<std::vector<std::int32_t>> answers;
  for (int round = 0; round < 2; ++round) {
    for (int talk = 0; talk < 6; ++talk) {
      GenerationRequest request;
      std::vector<std::int32_t> prompt(60);
      for (std::size_t i = 0; i < prompt.size(); ++i) {
        prompt[i] = 3 + static_cast<std::int32_t>(
                            (i * i + static_cast<std::size_t>(talk / 2) * 31 + (i > 40 ? talk : 0)) % 250);
      }
      request.prompt = std::move(prompt);
      request.temperature = 0;
      request.max_tokens = 5;
      request.n = 2;
      request.ignore_eos = true;
      auto result = AwaitGeneration(*host->service, std::move(request));
      EXPECT_TRUE(result.ok()) << result.status();
      for (const GeneratedChoice& choice : result->choices) answers.push_back(choice.tokens);
    }
  }
  const bool has_tier = host->host_tier->stats().capacity_blocks > 0;
  do {  // write-through is asynchronous
    status = host->engine->status();
  } while (has_tier && status.stored_blocks == 0);
  return answers;
}

TEST(DataParallel, TwoEnginesOverOneHostTierAnswerAsOne) {
  const TempFolder folder;
  fs::create_directories(folder.File("m"));
  ASSERT_TRUE(WriteRandomLlama(folder.File("m"), {.layers = 2, .max_positions = 96}).ok());
  ASSERT_TRUE(WriteByteTokenizer(folder.File("m"), RandomLlamaOptions().vocab).ok());
  EngineStatus one, two;
  const auto expected = AnswersWith(folder.File("m"), {"--kv-offloading-size", "0"}, one);
  EXPECT_EQ(
      AnswersWith(folder.File("m"),
                  {"--data-parallel-size", "2", "--kv-offloading-size", "64MiB", "--kv-cache-memory-bytes", "200KiB"},
                  two),
      expected);
  EXPECT_GT(two.stored_blocks, 0);
}

}  // namespace
}  // namespace spillway
