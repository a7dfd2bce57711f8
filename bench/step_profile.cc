// Where the microseconds of a decoding step go: on the engine's thread from its own report, on the device by a stamp
// behind every kernel.
//
//   step_profile FOLDER [--quantization none | int8] [--target auto] [--output 128]

#include <array>
#include <chrono>
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

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

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

// The cpu device's kernels, each followed by a stamp on the stream's thread: a part's seconds are those since the stamp
// before.
class StampedKernels : public Kernels {
 public:
  explicit StampedKernels(const Kernels& kernels) : kernels_(kernels) {}

  void set_config(const ModelConfig& config) { config_ = config; }
  // Engine thread, or while no step is in flight.
  void Reset() { seconds_ = {}; }
  double seconds(Part part) const { return seconds_[static_cast<std::size_t>(part)]; }

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
    Stamp(stream, PartOf(*args.weight, args.output));
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
    Stamp(stream, Part::kAttention);
  }
  void SiluMul(Stream& stream, const SiluMulArgs& args) const override {
    kernels_.SiluMul(stream, args);
    Stamp(stream, Part::kGateUp);
  }
  void GateUp(Stream& stream, const GateUpArgs& args) const override {
    kernels_.GateUp(stream, args);
    Stamp(stream, Part::kGateUp);
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
    stream.Notify([this, part] {
      const double now = Now();
      seconds_[static_cast<std::size_t>(part)] += now - last_;
      last_ = now;
    });
  }

  const Kernels& kernels_;
  ModelConfig config_;
  // Stream's thread while a step is in flight.
  mutable std::array<double, kPartNames.size()> seconds_{};
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

struct Profile {
  int num_steps = 0;
  double begin = 0;  // of the first full step
  double end = 0;
  StepReport sums;
  std::array<double, kPartNames.size()> parts{};

  double Microseconds(double seconds) const { return seconds / num_steps * 1e6; }
};

// Sums the steps in which all sequences decode.
class FullSteps : public EngineObserver {
 public:
  explicit FullSteps(StampedKernels& kernels) : kernels_(kernels) {}
  void Begin(int num_sequences) {
    num_sequences_ = num_sequences;
    profile_ = {};
  }
  const Profile& profile() const { return profile_; }

  void OnStep(const StepReport& report) override {
    const double now = Now();
    if (report.num_tokens == num_sequences_ && report.num_prefill_tokens == 0) {
      if (profile_.num_steps++ == 0) profile_.begin = now - report.seconds;
      profile_.end = now;
      profile_.sums.seconds += report.seconds;
      profile_.sums.plan_seconds += report.plan_seconds;
      profile_.sums.launch_seconds += report.launch_seconds;
      profile_.sums.digest_seconds += report.digest_seconds;
      for (std::size_t i = 0; i < kPartNames.size(); ++i) profile_.parts[i] += kernels_.seconds(static_cast<Part>(i));
    }
    kernels_.Reset();
  }
  void OnPrefixQuery(std::int64_t, std::int64_t) override {}
  void OnFirstToken(double) override {}
  void OnInterToken(double) override {}
  void OnSequenceDone(const SequenceReport&) override {}

 private:
  StampedKernels& kernels_;
  int num_sequences_ = 0;
  Profile profile_;
};

void Print(const char* name, const std::vector<Profile>& profiles, auto seconds) {
  std::printf("| %s |", name);
  for (const Profile& profile : profiles) {
    std::printf(" %.0f (%.1f %%) |", profile.Microseconds(seconds(profile)),
                100 * seconds(profile) / (profile.end - profile.begin));
  }
  std::printf("\n");
}

double Kernels(const Profile& profile) {
  double sum = 0;
  for (const double part : profile.parts) sum += part;
  return sum;
}

int Main(int argc, char** argv) {
  SPILLWAY_CHECK(argc % 2 == 0) << "step_profile FOLDER [--quantization none | int8] [--target auto] [--output 128]";
  CpuDeviceOptions options;
  Quantization quantization = Quantization::kNone;
  std::int32_t output = 128;
  for (int i = 2; i < argc; i += 2) {
    const std::string_view flag = argv[i];
    const std::string_view value = argv[i + 1];
    if (flag == "--quantization" && value == "int8") {
      quantization = Quantization::kInt8;
    } else if (flag == "--target") {
      options.target = value;
    } else if (flag == "--output") {
      output = std::stoi(std::string(value));
    } else {
      SPILLWAY_CHECK(flag == "--quantization" && value == "none") << argv[i] << " " << argv[i + 1];
    }
  }
  StampedDevice device(MakeCpuDevice(options).value());
  std::unique_ptr<Model> model = Model::Load(argv[1], DTypeChoice::kAuto, quantization, device, nullptr).value();
  device.stamped().set_config(model->config());
  FullSteps steps(device.stamped());
  EngineOptions engine_options;
  engine_options.kv_cache_bytes = std::int64_t{1} << 30;
  engine_options.max_model_len = 1024;
  engine_options.enable_prefix_caching = false;
  const std::unique_ptr<Engine> engine = Engine::Make(device, std::move(model), engine_options, &steps).value();

  std::vector<Profile> profiles;
  std::uint64_t last_id = 0;
  for (const int num_sequences : {1, 16, 32}) {
    GenerateTogether(*engine, num_sequences, 32, 8, last_id);
    steps.Begin(num_sequences);
    GenerateTogether(*engine, num_sequences, 32, output, last_id);
    SPILLWAY_CHECK(steps.profile().num_steps > 0) << num_sequences << " sequences never decoded together";
    profiles.push_back(steps.profile());
  }

  std::printf("%s; microseconds of a step (share), means over the steps in which all decode\n",
              device.description().c_str());
  std::printf("| | 1 | 16 | 32 |\n|---|---|---|---|\n");
  Print("plan", profiles, [](const Profile& p) { return p.sums.plan_seconds; });
  for (std::size_t i = 0; i < kPartNames.size(); ++i) {
    Print(kPartNames[i], profiles, [i](const Profile& p) { return p.parts[i]; });
  }
  Print("no kernel: metadata, wake-ups", profiles,
        [](const Profile& p) { return p.sums.seconds - p.sums.plan_seconds - p.sums.digest_seconds - Kernels(p); });
  Print("digest: counters, tokens to sinks", profiles, [](const Profile& p) { return p.sums.digest_seconds; });
  Print("between steps: mail, status", profiles, [](const Profile& p) { return p.end - p.begin - p.sums.seconds; });
  Print("whole step", profiles, [](const Profile& p) { return p.end - p.begin; });
  Print("beside the kernels: metadata, queueing", profiles, [](const Profile& p) { return p.sums.launch_seconds; });
  return 0;
}

}  // namespace
}  // namespace spillway

int main(int argc, char** argv) { return spillway::Main(argc, argv); }
