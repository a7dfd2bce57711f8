// Where the microseconds of a decoding step and of a prompt go: on the engine's thread from its own report, on the
// device by a stamp behind every kernel.
//
//   step_profile FOLDER [--quantization none | int8] [--target auto] [--output 128] [--only decode | prefill]

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/engine_load.h"
#include "engine/engine.h"
#include "engine/model.h"
#include "kernels/check.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

namespace spillway {
namespace {

enum class Part : std::uint8_t {
  kEmbed,
  kNorm,
  kQkv,
  kRope,
  kAttention,
  kOutput,
  kGateUp,
  kDown,
  kHead,
  kSample,
};
constexpr std::array<const char*, 10> kPartNames = {"embedding, rotary angles",
                                                    "norms",
                                                    "GEMM qkv",
                                                    "rotary, KV written",
                                                    "attention",
                                                    "GEMM output",
                                                    "GEMM gate, up, SiLU",
                                                    "GEMM down",
                                                    "GEMM lm_head",
                                                    "sampling"};

struct PartCost {
  double seconds = 0;
  double flops = 0;  // of products
};
using PartCosts = std::array<PartCost, kPartNames.size()>;

double FlopsOf(const AttentionArgs& args) {
  double pairs = 0;
  for (std::int64_t s = 0; s < args.num_sequences; ++s) {
    const double num_new = args.query_begin[s + 1] - args.query_begin[s];
    pairs += num_new * args.first_position[s] + num_new * (num_new + 1) / 2;
  }
  return 4 * pairs * args.num_heads * args.kv.layout.head_dim;
}

// The cpu device's kernels, each followed by a stamp on the stream's thread: a part's seconds are those since the stamp
// before.
class StampedKernels : public Kernels {
 public:
  explicit StampedKernels(const Kernels& kernels) : kernels_(kernels) {}

  void set_config(const ModelConfig& config) { config_ = config; }
  // Engine thread, or while no step is in flight.
  void Reset() { costs_ = {}; }
  const PartCosts& costs() const { return costs_; }

  absl::StatusOr<std::unique_ptr<PackedMatrix>> Pack(std::span<const MatrixView> parts) const override {
    return kernels_.Pack(parts);
  }
  absl::StatusOr<std::unique_ptr<PackedMatrix>> PackInt8(std::span<const MatrixView> parts) const override {
    return kernels_.PackInt8(parts);
  }
  absl::StatusOr<EmbeddingTable> MakeEmbeddingTable(const MatrixView& table) const override {
    return kernels_.MakeEmbeddingTable(table);
  }
  void Embed(Stream& stream, const EmbedArgs& args) const override {
    stream.Notify([this] { last_ = Now(); });  // the first kernel of a step
    kernels_.Embed(stream, args);
    Stamp(stream, Part::kEmbed);
  }
  void RmsNorm(Stream& stream, const RmsNormArgs& args) const override {
    kernels_.RmsNorm(stream, args);
    Stamp(stream, Part::kNorm);
  }
  void Gemm(Stream& stream, const GemmArgs& args) const override {
    kernels_.Gemm(stream, args);
    StampProduct(stream, PartOf(*args.weight, args.output), args.num_rows, *args.weight);
  }
  void RopeAngles(Stream& stream, const RopeAnglesArgs& args) const override {
    kernels_.RopeAngles(stream, args);
    Stamp(stream, Part::kEmbed);
  }
  void RopeAppend(Stream& stream, const RopeAppendArgs& args) const override {
    kernels_.RopeAppend(stream, args);
    Stamp(stream, Part::kRope);
  }
  void Attention(Stream& stream, const AttentionArgs& args) const override {
    kernels_.Attention(stream, args);
    stream.Notify([this, args] { Add(Part::kAttention, FlopsOf(args)); });
  }
  void SiluMul(Stream& stream, const SiluMulArgs& args) const override {
    kernels_.SiluMul(stream, args);
    Stamp(stream, Part::kGateUp);
  }
  void GateUp(Stream& stream, const GateUpArgs& args) const override {
    kernels_.GateUp(stream, args);
    StampProduct(stream, Part::kGateUp, args.num_rows, *args.weight);
  }
  void Sample(Stream& stream, const SampleArgs& args) const override {
    kernels_.Sample(stream, args);
    Stamp(stream, Part::kSample);
  }

 private:
  Part PartOf(const PackedMatrix& weight, GemmOutput output) const {
    if (output == GemmOutput::kAdd) return weight.cols() == config_.inner ? Part::kDown : Part::kOutput;
    if (weight.rows() == config_.vocab) return Part::kHead;
    return weight.rows() == 2 * config_.inner ? Part::kGateUp : Part::kQkv;
  }
  void Stamp(Stream& stream, Part part) const {
    stream.Notify([this, part] { Add(part, 0); });
  }
  void StampProduct(Stream& stream, Part part, std::int64_t num_rows, const PackedMatrix& weight) const {
    const double flops = 2.0 * static_cast<double>(num_rows * weight.rows()) * static_cast<double>(weight.cols());
    stream.Notify([this, part, flops] { Add(part, flops); });
  }
  void Add(Part part, double flops) const {
    const double now = Now();
    PartCost& cost = costs_[static_cast<std::size_t>(part)];
    cost.seconds += now - last_;
    cost.flops += flops;
    last_ = now;
  }

  const Kernels& kernels_;
  ModelConfig config_;
  // Stream's thread while a step is in flight.
  mutable PartCosts costs_{};
  mutable double last_ = 0;
};

class StampedDevice : public Device {
 public:
  explicit StampedDevice(std::unique_ptr<Device> device) : device_(std::move(device)), kernels_(device_->kernels()) {}
  absl::StatusOr<Buffer> Allocate(MemoryKind kind, std::size_t size_bytes) override {
    return device_->Allocate(kind, size_bytes);
  }
  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override { return device_->NewStream(); }
  const Kernels& kernels() const override { return kernels_; }
  std::size_t free_bytes() const override { return device_->free_bytes(); }
  HostKv host_kv() const override { return device_->host_kv(); }
  std::string description() const override { return device_->description(); }
  StampedKernels& stamped() { return kernels_; }

 private:
  std::unique_ptr<Device> device_;
  StampedKernels kernels_;
};

// Sums over steps of one kind.
struct Profile {
  int num_runs = 0;  // what the sums are divided by: decoding steps, or prompts
  double seconds = 0;
  StepReport sums;
  PartCosts parts{};

  double Microseconds(double sum) const { return sum / num_runs * 1e6; }
};

enum class StepKind : std::uint8_t { kDecode, kPrefill };

// Sums the steps in which all sequences decode, or those that only prefill.
class ProfiledSteps : public EngineObserver {
 public:
  explicit ProfiledSteps(StampedKernels& kernels) : kernels_(kernels) {}
  void Begin(StepKind kind, int num_sequences) {
    kind_ = kind;
    num_sequences_ = num_sequences;
    last_end_ = 0;
    profile_ = {};
  }
  const Profile& profile() const { return profile_; }

  void OnStep(const StepReport& report) override {
    const double now = Now();
    const bool counts = kind_ == StepKind::kDecode
                            ? report.num_tokens == num_sequences_ && report.num_prefill_tokens == 0
                            : report.num_tokens > 0 && report.num_prefill_tokens == report.num_tokens;
    if (counts) {
      // From the end of the step before, where that counts too.
      profile_.seconds += kind_ == StepKind::kDecode && last_end_ > 0 ? now - last_end_ : report.seconds;
      if (kind_ == StepKind::kDecode) ++profile_.num_runs;
      profile_.sums.seconds += report.seconds;
      profile_.sums.plan_seconds += report.plan_seconds;
      profile_.sums.launch_seconds += report.launch_seconds;
      profile_.sums.digest_seconds += report.digest_seconds;
      for (std::size_t i = 0; i < kPartNames.size(); ++i) {
        profile_.parts[i].seconds += kernels_.costs()[i].seconds;
        profile_.parts[i].flops += kernels_.costs()[i].flops;
      }
    }
    last_end_ = counts ? now : 0;
    kernels_.Reset();
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

 private:
  StampedKernels& kernels_;
  StepKind kind_ = StepKind::kDecode;
  int num_sequences_ = 0;
  double last_end_ = 0;
  Profile profile_;
};

void Print(const char* name, const std::vector<Profile>& profiles, auto seconds) {
  std::printf("| %s |", name);
  for (const Profile& profile : profiles) {
    std::printf(" %.0f (%.1f %%) |", profile.Microseconds(seconds(profile)), 100 * seconds(profile) / profile.seconds);
  }
  std::printf("\n");
}

void PrintSpeed(const char* name, const std::vector<Profile>& profiles, std::size_t part) {
  std::printf("| %s, GFLOP/s |", name);
  for (const Profile& profile : profiles) {
    std::printf(" %.0f |", profile.parts[part].flops / profile.parts[part].seconds * 1e-9);
  }
  std::printf("\n");
}

double Kernels(const Profile& profile) {
  double sum = 0;
  for (const PartCost& part : profile.parts) sum += part.seconds;
  return sum;
}

void Print(const std::vector<Profile>& profiles) {
  Print("plan", profiles, [](const Profile& p) { return p.sums.plan_seconds; });
  for (std::size_t i = 0; i < kPartNames.size(); ++i) {
    Print(kPartNames[i], profiles, [i](const Profile& p) { return p.parts[i].seconds; });
  }
  Print("no kernel: metadata, wake-ups", profiles,
        [](const Profile& p) { return p.sums.seconds - p.sums.plan_seconds - p.sums.digest_seconds - Kernels(p); });
  Print("digest: counters, tokens to sinks", profiles, [](const Profile& p) { return p.sums.digest_seconds; });
  Print("between steps: mail, status", profiles, [](const Profile& p) { return p.seconds - p.sums.seconds; });
  Print("whole", profiles, [](const Profile& p) { return p.seconds; });
  Print("beside the kernels: metadata, queueing", profiles, [](const Profile& p) { return p.sums.launch_seconds; });
  for (std::size_t i = 0; i < kPartNames.size(); ++i) {
    if (profiles.front().parts[i].flops > 0) PrintSpeed(kPartNames[i], profiles, i);
  }
}

Profile ProfileDecode(Engine& engine, ProfiledSteps& steps, int num_sequences, std::int32_t output,
                      std::uint64_t& last_id) {
  GenerateTogether(engine, num_sequences, 32, 8, last_id);
  steps.Begin(StepKind::kDecode, num_sequences);
  GenerateTogether(engine, num_sequences, 32, output, last_id);
  SPILLWAY_CHECK(steps.profile().num_runs > 0) << num_sequences << " sequences never decoded together";
  return steps.profile();
}

Profile ProfilePrefill(Engine& engine, ProfiledSteps& steps, std::int32_t prompt, std::uint64_t& last_id) {
  const int num_prompts = std::max(4, 16384 / prompt);
  GenerateTogether(engine, 1, prompt, 1, last_id);
  steps.Begin(StepKind::kPrefill, 1);
  for (int run = 0; run < num_prompts; ++run) GenerateTogether(engine, 1, prompt, 1, last_id);
  Profile profile = steps.profile();
  profile.num_runs = num_prompts;
  return profile;
}

int Main(int argc, char** argv) {
  SPILLWAY_CHECK(argc % 2 == 0) << "step_profile FOLDER [flags]";
  CpuDeviceOptions options;
  Quantization quantization = Quantization::kNone;
  std::int32_t output = 128;
  std::string_view only;
  for (int i = 2; i < argc; i += 2) {
    const std::string_view flag = argv[i];
    const std::string_view value = argv[i + 1];
    if (flag == "--quantization" && value == "int8") {
      quantization = Quantization::kInt8;
    } else if (flag == "--target") {
      options.target = value;
    } else if (flag == "--output") {
      output = std::stoi(std::string(value));
    } else if (flag == "--only") {
      only = value;
    } else {
      SPILLWAY_CHECK(flag == "--quantization" && value == "none") << argv[i] << " " << argv[i + 1];
    }
  }
  StampedDevice device(MakeCpuDevice(options).value());
  std::unique_ptr<Model> model = Model::Load(argv[1], DTypeChoice::kAuto, quantization, device, nullptr).value();
  device.stamped().set_config(model->config());
  ProfiledSteps steps(device.stamped());
  EngineOptions engine_options;
  engine_options.kv_cache_bytes = std::int64_t{1} << 30;
  engine_options.max_model_len = 8192;
  engine_options.max_num_batched_tokens = 2048;
  engine_options.enable_prefix_caching = false;
  const std::unique_ptr<Engine> engine = Engine::Make(device, std::move(model), engine_options, &steps).value();

  std::uint64_t last_id = 0;
  if (only != "prefill") {
    std::vector<Profile> profiles;
    for (const int num_sequences : {1, 16, 32}) {
      profiles.push_back(ProfileDecode(*engine, steps, num_sequences, output, last_id));
    }
    std::printf("%s; microseconds of a step (share), means over the steps in which all decode\n",
                device.description().c_str());
    std::printf("| | 1 | 16 | 32 |\n|---|---|---|---|\n");
    Print(profiles);
  }
  if (only != "decode") {
    std::vector<Profile> profiles;
    for (const std::int32_t prompt : {512, 4096}) profiles.push_back(ProfilePrefill(*engine, steps, prompt, last_id));
    std::printf("%s; microseconds of a prompt (share)\n", device.description().c_str());
    std::printf("| | 512 | 4,096 |\n|---|---|---|\n");
    Print(profiles);
  }
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::Main(argc, argv); }
