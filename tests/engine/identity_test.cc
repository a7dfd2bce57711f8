// The first promise, in its present scope: what a request's logits are does not depend on what runs beside it, on how
// its prompt is cut into chunks, on the token budget, on preemption, on prefix hits, on steps that overlap, or on the
// number of workers.
// Compared by a hash of every step's logits, bit for bit.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/step_runner.h"
#include "gtest/gtest.h"
#include "tests/support/checkpoint_writer.h"
#include "tests/support/engine_harness.h"
#include "tests/support/shared_data.h"

#ifndef SPILLWAY_IDENTITY_HEAD_DIM
#define SPILLWAY_IDENTITY_HEAD_DIM 24
#endif

namespace spillway {
namespace {

using ::spillway::testing::Collected;
using ::spillway::testing::MakeRequest;
using ::spillway::testing::Rig;

struct TestModel {
  std::string folder;
  DTypeChoice dtype = DTypeChoice::kAuto;
  Quantization quantization = Quantization::kNone;
  std::int32_t vocab = 0;
  std::int32_t longest = 0;  // prompt tokens
};

// A seeded random model, long enough for several attention segments.
TestModel RandomModel(DType dtype) {
  const std::string folder =
      ::testing::TempDir() + "spillway_identity_" + std::string(NameOf(dtype)) + "_" + std::to_string(::getpid());
  static std::once_flag written[2];
  std::call_once(written[dtype == DType::kF32 ? 0 : 1], [&] {
    std::filesystem::create_directories(folder);
    const absl::Status status = WriteRandomLlama(folder, {.seed = 11,
                                                          .layers = 2,
                                                          .hidden = 48,
                                                          .inner = 112,
                                                          .heads = 4,
                                                          .kv_heads = 2,
                                                          .head_dim = SPILLWAY_IDENTITY_HEAD_DIM,
                                                          .vocab = 288,
                                                          .max_positions = 1024,
                                                          .dtype = dtype,
                                                          .tied = false});
    SPILLWAY_CHECK(status.ok()) << status;
  });
  return {.folder = folder, .vocab = 288, .longest = 600};
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kRequests = 16;  // the sanitizers look for races and stray accesses, not for bits
#else
constexpr int kRequests = 64;
#endif

// Mixed lengths and parameters, some sharing heads of 20 and 100 tokens, one pair of equal prompts.
std::vector<SequenceRequest> Workload(const TestModel& model) {
  std::mt19937 random(5);
  const auto token = [&] { return static_cast<std::int32_t>(3 + random() % static_cast<unsigned>(model.vocab - 3)); };
  std::vector<std::int32_t> shared(100);
  for (auto& each : shared) each = token();
  std::vector<SequenceRequest> requests;
  for (int i = 0; i < kRequests; ++i) {
    std::vector<std::int32_t> prompt;
    if (i % 4 == 1) prompt.assign(shared.begin(), shared.begin() + 20);
    if (i % 4 == 2) prompt = shared;
    const int more = i == 7 ? model.longest - 40 : 1 + static_cast<int>(random() % (i % 8 == 0 ? 90 : 20));
    for (int k = 0; k < more; ++k) prompt.push_back(token());
    if (i == 9) prompt = requests[6].prompt;
    SequenceRequest request = MakeRequest(std::move(prompt), 2 + static_cast<std::int32_t>(random() % 14));
    if (i % 3 == 0) {
      request.sampling.temperature = 0.5F + 0.25F * static_cast<float>(i % 4);
      request.sampling.top_p = i % 2 == 0 ? 0.9F : 1.0F;
      request.sampling.top_k = i % 5 == 0 ? 40 : 0;
      request.sampling.min_p = i % 7 == 0 ? 0.02F : 0.0F;
      request.sampling.seed = 1000U + static_cast<unsigned>(i);
    }
    requests.push_back(std::move(request));
  }
  return requests;
}

EngineOptions Ample() {
  EngineOptions options;
  options.hash_logits = true;
  options.overlap_steps = true;
  options.kv_cache_bytes = 64LL << 20;
  return options;
}

// Each request alone, without prefix caching, steps one by one.
std::vector<Collected> Solo(const TestModel& model, const CpuDeviceOptions& device = {}) {
  EngineOptions options = Ample();
  options.enable_prefix_caching = false;
  options.overlap_steps = false;
  Rig rig = Rig::Make(model.folder, options, device, model.dtype, nullptr, nullptr, model.quantization);
  std::vector<Collected> solo;
  for (SequenceRequest& request : Workload(model)) solo.push_back(rig.RunOne(std::move(request)));
  return solo;
}

void ExpectSame(const std::vector<Collected>& solo, const std::vector<Collected>& batch, std::size_t stride = 1) {
  for (std::size_t i = 0; i < batch.size(); ++i) {
    ASSERT_TRUE(batch[i].error.ok()) << batch[i].error;
    ASSERT_EQ(batch[i].ids(), solo[i * stride].ids()) << "request " << i;
    ASSERT_EQ(batch[i].hashes(), solo[i * stride].hashes()) << "request " << i;
  }
}

class CountingObserver : public EngineObserver {
 public:
  void OnStep(const StepReport& report) override { preempted += report.num_preempted; }
  void OnPrefixQuery(std::int64_t, std::int64_t hit) override { hits += hit; }
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}
  std::int64_t preempted = 0;
  std::int64_t hits = 0;
};

struct IdentityCase {
  const char* model;   // "random_f32", "random_bf16", "stories260K"
  const char* target;  // cpu target
  Quantization quantization = Quantization::kNone;
};

class Identity : public ::testing::TestWithParam<IdentityCase> {
 protected:
  void SetUp() override {
    device_.target = GetParam().target;
    const absl::StatusOr<std::unique_ptr<Device>> device = MakeCpuDevice(device_);
    if (!device.ok()) GTEST_SKIP() << device.status();
    if (GetParam().quantization == Quantization::kInt8) {
      const std::vector<float> values(4, 1);
      const MatrixView view = {reinterpret_cast<const std::byte*>(values.data()), DType::kF32, 2, 2, 2};
      if (const absl::Status status = (*device)->kernels().PackInt8({&view, 1}).status(); absl::IsUnimplemented(status))
        GTEST_SKIP() << status.message();
    }
    const std::string name = GetParam().model;
    if (name == "stories260K") {
      SPILLWAY_SHARED_OR_SKIP(root, "models/stories260K");
      model_ = {.folder = root + "/hf", .vocab = 512, .longest = 450};
    } else {
      model_ = RandomModel(name == "random_f32" ? DType::kF32 : DType::kBF16);
    }
    model_.quantization = GetParam().quantization;
  }
  std::vector<Collected> RunWith(const EngineOptions& options, const CpuDeviceOptions& device,
                                 CountingObserver* observer = nullptr) {
    Rig rig = Rig::Make(model_.folder, options, device, model_.dtype, observer, nullptr, model_.quantization);
    return rig.Run(Workload(model_));
  }
  CpuDeviceOptions device_;
  TestModel model_;
};

TEST_P(Identity, BatchEqualsSoloUnderEveryRegime) {
  device_.num_workers = 2;
  const std::vector<Collected> solo = Solo(model_, device_);
  for (const std::int32_t chunk : {1, 16, 64, 512}) {
    SCOPED_TRACE(::testing::Message() << "chunk " << chunk);
    EngineOptions options = Ample();
    options.long_prefill_token_threshold = chunk;
    ExpectSame(solo, RunWith(options, device_));
  }
  for (const std::int32_t budget : {7, 100}) {
    SCOPED_TRACE(::testing::Message() << "budget " << budget);
    EngineOptions options = Ample();
    options.max_num_batched_tokens = budget;
    ExpectSame(solo, RunWith(options, device_));
  }
  {
    SCOPED_TRACE("prefix caching off");
    EngineOptions options = Ample();
    options.enable_prefix_caching = false;
    ExpectSame(solo, RunWith(options, device_));
  }
  {
    SCOPED_TRACE("steps one by one");
    EngineOptions options = Ample();
    options.overlap_steps = false;
    ExpectSame(solo, RunWith(options, device_));
  }
  {
    SCOPED_TRACE("one worker");
    CpuDeviceOptions one = device_;
    one.num_workers = 1;
    ExpectSame(solo, RunWith(Ample(), one));
  }
  {
    SCOPED_TRACE("prefix hits");
    CountingObserver observer;
    Rig rig = Rig::Make(model_.folder, Ample(), device_, model_.dtype, &observer, nullptr, model_.quantization);
    ExpectSame(solo, rig.Run(Workload(model_)));
    ExpectSame(solo, rig.Run(Workload(model_)));
    rig.engine.reset();
    EXPECT_GT(observer.hits, 15 * kRequests);
  }
}

TEST_P(Identity, PoolThatForcesPreemption) {
  const std::vector<Collected> solo = Solo(model_, device_);
  for (const std::int64_t blocks : {40, 60}) {
    for (const std::int32_t chunk : {16, 512}) {
      SCOPED_TRACE(::testing::Message() << blocks << " blocks, chunk " << chunk);
      EngineOptions options = Ample();
      options.kv_cache_bytes = blocks * Rig::BlockBytes(model_.folder, model_.dtype);
      options.max_model_len = 40 * kBlockTokens;
      if (options.max_model_len > 512 && std::string(GetParam().model) == "stories260K") options.max_model_len = 512;
      options.long_prefill_token_threshold = chunk;
      CountingObserver observer;
      ExpectSame(solo, RunWith(options, device_, &observer));
      EXPECT_TRUE(observer.preempted > 0 || kRequests < 64) << "the pool was not small enough to show anything";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Engine, Identity,
                         ::testing::Values(IdentityCase{"random_f32", "auto"}, IdentityCase{"random_bf16", "auto"},
                                           IdentityCase{"random_bf16", "avx2"}, IdentityCase{"stories260K", "auto"},
                                           IdentityCase{"stories260K", "avx2"},
                                           IdentityCase{"random_bf16", "auto", Quantization::kInt8},
                                           IdentityCase{"random_bf16", "avx2", Quantization::kInt8}),
                         [](const auto& test) {
                           return std::string(test.param.model) + "_" + test.param.target +
                                  (test.param.quantization == Quantization::kInt8 ? "_int8" : "");
                         });

// Drives StepRunner by hand, with the blocks in view.
class HandDriven {
 public:
  explicit HandDriven(const TestModel& model) {
    device_ = *MakeCpuDevice({});
    model_ = *Model::Load(model.folder, model.dtype, model.quantization, *device_, nullptr);
    const KvLayout layout = model_->kv_layout();
    store_ = *KvStore::Make(
        *device_, *host_,
        {.layout = layout, .num_blocks = kBlocks, .caching = PrefixCaching::kOff, .pacing = {}, .before_copy = nullptr},
        [] {});
    runner_ = *StepRunner::Make(
        *device_, *model_,
        {.max_tokens = 1024, .max_sequences = 1, .max_blocks_per_sequence = 64, .max_banned_per_sequence = 8},
        /*home_reader=*/nullptr, /*layer_loader=*/nullptr, /*input_writer=*/nullptr, /*hash_logits=*/true);
  }

  // Computes the next `count` known tokens of the sequence.
  SampleResult Step(Sequence& sequence, std::int32_t count) {
    while (static_cast<std::int32_t>(sequence.blocks.size()) * kBlockTokens < sequence.num_computed + count) {
      sequence.blocks.push_back(*store_->Take());
    }
    sequence.num_planned = count;
    StepPlan plan;
    plan.num_tokens = count;
    plan.sequences.push_back({.sequence = &sequence, .samples = true});
    std::promise<void> done;
    const StepRunner::Launched step = runner_->Launch(plan, store_->view(), [&] { done.set_value(); });
    done.get_future().wait();
    sequence.num_computed += count;
    return step.results[0];
  }

  // Row-wise KV bytes of the computed tokens, in position order: [layer][head][position].
  std::vector<std::byte> KvBytes(const Sequence& sequence) const {
    const KvLayout& layout = store_->layout();
    std::vector<std::byte> bytes;
    for (int layer = 0; layer < layout.num_layers; ++layer) {
      for (int head = 0; head < layout.num_kv_heads; ++head) {
        for (std::int32_t position = 0; position < sequence.num_computed; ++position) {
          const std::byte* row = BlockAt(sequence.blocks[static_cast<std::size_t>(position / kBlockTokens)].id()) +
                                 layout.strip_offset(layer, head) +
                                 static_cast<std::size_t>(position % kBlockTokens) * layout.row_bytes();
          bytes.insert(bytes.end(), row, row + layout.row_bytes());
        }
      }
    }
    return bytes;
  }
  std::byte* BlockAt(BlockId id) const {
    return store_->view().pool + static_cast<std::size_t>(id) * store_->layout().block_bytes();
  }
  std::size_t block_bytes() const { return store_->layout().block_bytes(); }

 private:
  static constexpr std::uint32_t kBlocks = 128;
  std::unique_ptr<Device> device_;
  std::unique_ptr<HostTier> host_ = MakeNullHostTier();
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvStore> store_;
  std::unique_ptr<StepRunner> runner_;
};

Sequence SequenceOf(std::int32_t length, std::int32_t vocab) {
  Sequence sequence;
  std::mt19937 random(3);
  for (std::int32_t i = 0; i < length; ++i)
    sequence.tokens.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(vocab)));
  sequence.num_prompt = length;
  sequence.request.sampling.temperature = 0;
  return sequence;
}

class KvBytes : public ::testing::TestWithParam<DType> {};

TEST_P(KvBytes, TokenByTokenEqualsOneChunk) {
  const TestModel model = RandomModel(GetParam());
  HandDriven whole_driver(model);
  HandDriven stepped_driver(model);
  Sequence whole = SequenceOf(300, model.vocab);
  Sequence stepped = SequenceOf(300, model.vocab);
  const SampleResult whole_result = whole_driver.Step(whole, 300);
  SampleResult stepped_result;
  for (int i = 0; i < 300; ++i) stepped_result = stepped_driver.Step(stepped, 1);
  EXPECT_EQ(whole_driver.KvBytes(whole), stepped_driver.KvBytes(stepped));
  EXPECT_EQ(whole_result.logits_hash, stepped_result.logits_hash);
  KvStore::Release(whole.blocks);
  KvStore::Release(stepped.blocks);
}

INSTANTIATE_TEST_SUITE_P(Engine, KvBytes, ::testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& test) { return std::string(NameOf(test.param)); });

// The suite can fail: planted faults change what is compared.
TEST(PlantedFault, BlocksSwappedBetweenSequencesAreCaught) {
  const TestModel model = RandomModel(DType::kF32);
  HandDriven driver(model);
  Sequence sound = SequenceOf(65, model.vocab);
  driver.Step(sound, 64);
  const std::uint64_t expected = driver.Step(sound, 1).logits_hash;
  Sequence faulty = SequenceOf(65, model.vocab);
  driver.Step(faulty, 64);
  Sequence other = SequenceOf(65, model.vocab);
  std::ranges::reverse(other.tokens);
  driver.Step(other, 64);
  std::byte* const first = driver.BlockAt(faulty.blocks[1].id());
  std::byte* const second = driver.BlockAt(other.blocks[1].id());
  std::swap_ranges(first, first + driver.block_bytes(), second);
  EXPECT_NE(driver.Step(faulty, 1).logits_hash, expected);
  KvStore::Release(sound.blocks);
  KvStore::Release(faulty.blocks);
  KvStore::Release(other.blocks);
}

TEST(PlantedFault, ZeroedRowIsCaught) {
  const TestModel model = RandomModel(DType::kF32);
  HandDriven driver(model);
  Sequence sound = SequenceOf(65, model.vocab);
  driver.Step(sound, 64);
  const std::uint64_t expected = driver.Step(sound, 1).logits_hash;
  Sequence faulty = SequenceOf(65, model.vocab);
  driver.Step(faulty, 64);
  const KvLayout layout{.num_layers = 2, .num_kv_heads = 2, .head_dim = 24, .dtype = DType::kF32};
  std::memset(driver.BlockAt(faulty.blocks[2].id()) + layout.strip_offset(1, 1) + 5 * layout.row_bytes(), 0,
              layout.row_bytes());
  EXPECT_NE(driver.Step(faulty, 1).logits_hash, expected);
  KvStore::Release(sound.blocks);
  KvStore::Release(faulty.blocks);
}

// The device holds its work back until the engine has already read the results: only a removed wait lets the engine get
// there.
TEST(PlantedFault, RemovedEventWaitIsCaught) {
#ifdef __SANITIZE_THREAD__
  GTEST_SKIP() << "races by design; the deliberate_race test covers the report";
#endif
  const TestModel model = RandomModel(DType::kF32);
  SequenceRequest request = MakeRequest({5, 6, 7, 8}, 1);
  EngineOptions options = Ample();
  const Collected sound = Rig::Make(model.folder, options).RunOne(request);
  std::promise<void> was_read;
  std::shared_future<void> read = was_read.get_future().share();
  std::atomic<bool> is_armed{false};
  CpuDeviceOptions device;
  device.ignored_order = IgnoredOrder::kWaitAndNotify;
  device.before_item = [&] {
    if (is_armed.load()) read.wait();
  };
  Rig rig = Rig::Make(model.folder, options, device);
  is_armed.store(true);
  auto sink = std::make_shared<::spillway::testing::CollectingSink>();
  sink->on_token = [&](const Collected&) { was_read.set_value(); };
  std::future<Collected> result = sink->Result();
  request.id = ::spillway::testing::NextId();
  request.sink = sink;
  std::vector<SequenceRequest> one;
  one.push_back(request);
  ASSERT_TRUE(rig.engine->Submit(std::move(one)).ok());
  EXPECT_NE(result.get().hashes(), sound.hashes());
}

}  // namespace
}  // namespace spillway
