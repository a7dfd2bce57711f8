// Scenario tests: text files that drive Scheduler and KvStore with a runner that computes nothing and a link that moves
// blocks when it is told to.
//
//   pool B seqs S budget T chunk C [KEY VALUE]...    once, first
//        caching on|off   policy fcfs|priority|kappa   choice auto|load|recompute|split   host BLOCKS
//        ageing SECONDS   link, compute: tokens per second; without them speeds are unknown
//        overlap on: a step that can be is planned while the one before it runs
//   submit NAME PROMPT out N [same NAME2 SHARED] [priority P] [tenant T]
//        prompt tokens are unique to NAME; the first SHARED equal NAME2's
//   cancel NAME
//   stop NAME                                        the next token sampled for it ends it
//   reset                                            the device tier forgets cold blocks
//   stored                                           every published block reaches the host tier
//   lose N                                           of the restores to come, the Nth fails
//   loaded                                           every block on its way up arrives
//   time SECONDS                                     of the steps that follow
//   step: [ahead] LIST [; wait LIST] [; load LIST] [; preempted N] [; done LIST] [; hit N]
//        LIST of NAME:TOKENS in the plan's order, * where the last token is sampled; waiting in order; NAME:BLOCKS on
//        their way up. `nothing` where the plan is empty
//   steps N                                          that many steps, nothing expected
//   drain                                            steps until no work is left; fails after 10,000
//   expect held N [cold N]
//   expect loading N                                 sequences with blocks on their way up

#include "engine/scheduler.h"

#include <algorithm>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "gtest/gtest.h"
#include "kvstore/transfer_engine.h"

namespace spillway {
namespace {

constexpr KvLayout kTinyLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 2, .dtype = DType::kF32};

// Holds restores back, and loses some, through the transfer engine's hook.
class Link {
 public:
  absl::Status Pass(const Transfer& transfer) {
    if (transfer.kind == Transfer::Kind::kStore) return absl::OkStatus();
    std::unique_lock lock(mutex_);
    ++num_held_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return is_open_; });
    --num_held_;
    return ++num_passed_ == lost_ ? absl::DataLossError("lost") : absl::OkStatus();
  }
  void Open(bool is_open) {
    const std::lock_guard lock(mutex_);
    is_open_ = is_open;
    changed_.notify_all();
  }
  void Lose(int n) {
    const std::lock_guard lock(mutex_);
    lost_ = num_passed_ + n;
  }
  void Wake() {
    const std::lock_guard lock(mutex_);
    ++num_ended_;
    changed_.notify_all();
  }
  int num_ended() const {
    const std::lock_guard lock(mutex_);
    return num_ended_;
  }
  void AwaitMoreThan(int num_ended) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_ended_ > num_ended; });
  }
  // The first restore has begun, so that it is the one that can no longer be cancelled; or something has ended since.
  void AwaitHeld(int num_ended) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_held_ > 0 || num_ended_ > num_ended; });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  bool is_open_ = false;
  int num_held_ = 0;
  int num_passed_ = 0;
  int num_ended_ = 0;
  int lost_ = 0;
};

struct Setup {
  std::uint32_t pool = 0;
  std::uint32_t host = 0;  // blocks; 0: no host tier
  Scheduler::Options options;
  bool overlaps = false;
  double link = 0;  // tokens per second, as compute; 0: unknown
  double compute = 0;
};

// A token costs one FLOP and one block's sixteenth of bytes, whatever is before it.
std::optional<CostModel> CostsOf(const Setup& setup) {
  if (setup.link == 0) return std::nullopt;
  const double block_bytes = static_cast<double>(kTinyLayout.block_bytes());
  LinkSpeed link;
  link.Measure(block_bytes, block_bytes, kBlockTokens / setup.link, 1);
  return CostModel({.flops_per_token = 1, .kv_bytes_per_token = block_bytes / kBlockTokens},
                   {.linear_flops_per_second = setup.compute,
                    .attention_flops_per_second = 1e18,
                    .kv_bytes_per_second = 1e18,
                    .step_floor_seconds = 0},
                   link, block_bytes);
}

// Enough for what arrives inside steps; prompts of scenarios that have some are too short to exceed the device tier.
std::uint32_t MaxHomeBlocks(const Setup& setup) {
  return setup.options.layer_loads == LayerLoads::kNever ? 0 : setup.host;
}

class World {
 public:
  explicit World(const Setup& setup)
      : device_(*MakeCpuDevice({})),
        host_(setup.host == 0
                  ? MakeNullHostTier()
                  : MakeHostTier(*device_->Allocate(MemoryKind::kPinnedHost, setup.host * kTinyLayout.block_bytes()),
                                 {.block_bytes = kTinyLayout.block_bytes(), .num_blocks = setup.host})),
        store_(
            *KvStore::Make(*device_, *host_,
                           {.layout = kTinyLayout,
                            .num_blocks = setup.pool,
                            .max_home_blocks = MaxHomeBlocks(setup),
                            .caching = setup.options.enable_prefix_caching ? PrefixCaching::kOn : PrefixCaching::kOff,
                            .pacing = {},
                            .before_copy = [this](const Transfer& transfer) { return link_.Pass(transfer); }},
                           [this] { link_.Wake(); })),
        costs_(CostsOf(setup)),
        overlaps_(setup.overlaps),
        scheduler_(*store_, chain_, setup.options, nullptr, costs_ ? &*costs_ : nullptr) {}
  ~World() { link_.Open(true); }

  void Submit(const std::string& name, std::int32_t prompt, std::int32_t out, const std::string& same,
              std::int32_t shared, std::int32_t priority, const std::string& tenant) {
    auto sequence = std::make_unique<Sequence>();
    sequence->request.priority = priority;
    sequence->request.tenant = tenant;
    sequence->request.id = next_id_++;
    sequence->request.sampling.max_tokens = out;
    for (std::int32_t i = 0; i < prompt; ++i)
      sequence->tokens.push_back(static_cast<std::int32_t>(next_id_) * 10'000 + i);
    for (std::int32_t i = 0; i < shared; ++i) {
      sequence->tokens[static_cast<std::size_t>(i)] = prompts_.at(same)[static_cast<std::size_t>(i)];
    }
    prompts_[name] = sequence->tokens;
    sequence->num_prompt = prompt;
    names_[sequence->request.id] = name;
    ids_[name] = sequence->request.id;
    scheduler_.Add(std::move(sequence));
  }

  void Cancel(const std::string& name) { End(scheduler_.Find(ids_.at(name))); }
  void Stop(const std::string& name) { stopping_.insert(ids_.at(name)); }
  void Reset() { store_->EvictCold(); }
  void SetTime(double now) { now_ = now; }
  void Lose(int n) { link_.Lose(n); }
  void AwaitStored() {
    while (store_->has_transfers()) Collect();
  }
  // Write-through holds its block until it is done; restores under way stay so.
  void SettleStores() {
    while (store_->has_transfers() && store_->num_restoring() == 0) Collect();
  }
  void AwaitLoaded() {
    link_.Open(true);
    while (store_->num_restoring() > 0) Collect();
    link_.Open(false);
  }

  // One step, described in the form that scenarios expect.
  std::string Step() {
    const int num_ended = link_.num_ended();
    const StepPlan plan = running_.empty() ? scheduler_.Plan(now_) : std::exchange(running_, {});
    EXPECT_TRUE(!plan.empty() || store_->has_transfers()) << "there is work and no step to make of it";
    if (store_->num_restoring() > 0) link_.AwaitHeld(num_ended);
    std::vector<std::string> planned;
    if (plan.is_ahead()) planned.emplace_back("ahead");
    std::int32_t hit = 0;
    for (const PlannedSequence& each : plan.sequences) {
      if (each.sequence == nullptr) continue;
      planned.push_back(absl::StrCat(NameOf(*each.sequence), ":", each.sequence->num_planned, each.samples ? "*" : ""));
      if (!seen_[each.sequence->request.id]) hit += each.sequence->num_cached;
      seen_[each.sequence->request.id] = true;
    }
    std::vector<std::string> waiting;
    std::vector<std::string> loading;
    for (const Sequence* each : scheduler_.All()) {
      if (each->blocks.empty()) waiting.push_back(NameOf(*each));
      if (!each->restoring.empty()) loading.push_back(absl::StrCat(NameOf(*each), ":", each->restoring.size()));
    }
    scheduler_.CheckInvariants();
    if (overlaps_) running_ = scheduler_.PlanAhead(plan);
    scheduler_.Computed(plan, running_.empty() ? nullptr : &running_);
    std::vector<std::string> done;
    for (const PlannedSequence& each : plan.sequences) {
      if (each.sequence == nullptr || !each.samples) continue;
      Sequence& sequence = *each.sequence;
      sequence.tokens.push_back(7);
      const bool is_last = sequence.num_outputs() >= sequence.request.sampling.max_tokens;
      if (!is_last && !stopping_.contains(sequence.request.id)) continue;
      done.push_back(NameOf(sequence));
      End(&sequence);
    }
    scheduler_.CheckInvariants();
    std::string text = planned.empty() ? "nothing" : absl::StrJoin(planned, " ");
    if (!waiting.empty()) absl::StrAppend(&text, "; wait ", absl::StrJoin(waiting, " "));
    if (!loading.empty()) absl::StrAppend(&text, "; load ", absl::StrJoin(loading, " "));
    if (plan.num_preempted > 0) absl::StrAppend(&text, "; preempted ", plan.num_preempted);
    if (!done.empty()) absl::StrAppend(&text, "; done ", absl::StrJoin(done, " "));
    if (hit > 0) absl::StrAppend(&text, "; hit ", hit);
    if (plan.num_arriving > 0) absl::StrAppend(&text, "; arrive ", plan.num_arriving);
    return text;
  }

  bool IsLive(const std::string& name) const { return scheduler_.Find(ids_.at(name)) != nullptr; }
  bool has_work() const { return scheduler_.has_work() || !running_.empty(); }
  std::string Loading() const {
    const std::vector<Sequence*> all = scheduler_.All();
    return absl::StrCat("loading ",
                        std::ranges::count_if(all, [](const Sequence* each) { return !each->restoring.empty(); }));
  }
  std::string Usage() const { return absl::StrCat("held ", store_->num_held(), " cold ", store_->num_cold()); }

 private:
  void Collect() {
    const int num_ended = link_.num_ended();
    if (store_->Collect()) {
      scheduler_.Loaded();
    } else if (store_->has_transfers()) {
      link_.AwaitMoreThan(num_ended);
    }
  }
  void End(Sequence* sequence) {
    for (PlannedSequence& each : running_.sequences) {
      if (each.sequence == sequence) each.sequence = nullptr;
    }
    scheduler_.Remove(sequence);
  }
  const std::string& NameOf(const Sequence& sequence) const { return names_.at(sequence.request.id); }

  KeyChain chain_{"0"};
  Link link_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<HostTier> host_;
  std::unique_ptr<KvStore> store_;
  std::optional<CostModel> costs_;
  double now_ = 0;
  const bool overlaps_;
  StepPlan running_;  // planned ahead
  std::set<std::uint64_t> stopping_;
  Scheduler scheduler_;
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, std::string> names_;
  std::map<std::string, std::uint64_t> ids_;
  std::map<std::string, std::vector<std::int32_t>> prompts_;
  std::map<std::uint64_t, bool> seen_;
};

Setup ReadSetup(std::istream& words) {
  Setup setup;
  Scheduler::Options& options = setup.options;
  std::string skip;
  words >> setup.pool >> skip >> options.max_num_seqs >> skip >> options.max_num_batched_tokens >> skip >>
      options.long_prefill_token_threshold;
  std::string value;
  for (std::string key; words >> key;) {
    if (key == "host") {
      words >> setup.host;
    } else if (key == "link") {
      words >> setup.link;
    } else if (key == "compute") {
      words >> setup.compute;
    } else if (key == "ageing") {
      words >> options.ageing_seconds;
    } else if (key == "caching") {
      words >> value;
      options.enable_prefix_caching = value == "on";
    } else if (key == "overlap") {
      words >> value;
      setup.overlaps = value == "on";
    } else if (key == "policy") {
      words >> value;
      options.policy = SchedulingPolicyNamed(value).value();
    } else if (key == "layers") {
      words >> value;
      options.layer_loads = value == "hidden" ? LayerLoads::kHidden : LayerLoads::kAlways;
    } else if (key == "choice") {
      words >> value;
      options.load_choice = LoadChoiceNamed(value).value();
    } else {
      ADD_FAILURE() << "unknown key " << key;
    }
  }
  return setup;
}

void RunScenario(const std::string& path) {
  std::ifstream file(path);
  std::unique_ptr<World> world;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    SCOPED_TRACE(absl::StrCat(path, ":", number, ": ", line));
    line = std::string(absl::StripAsciiWhitespace(line.substr(0, line.find('#'))));
    if (line.empty()) continue;
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    std::string skip;
    if (verb == "pool") {
      world = std::make_unique<World>(ReadSetup(words));
    } else if (verb == "submit") {
      std::string name;
      std::int32_t prompt = 0;
      std::int32_t out = 0;
      words >> name >> prompt >> skip >> out;
      std::string same;
      std::int32_t shared = 0;
      std::int32_t priority = 0;
      std::string tenant;
      for (std::string key; words >> key;) {
        if (key == "same") words >> same >> shared;
        if (key == "priority") words >> priority;
        if (key == "tenant") words >> tenant;
      }
      world->Submit(name, prompt, out, same, shared, priority, tenant);
    } else if (verb == "cancel") {
      std::string name;
      words >> name;
      world->Cancel(name);
    } else if (verb == "stop") {
      std::string name;
      words >> name;
      world->Stop(name);
    } else if (verb == "reset") {
      world->Reset();
    } else if (verb == "stored") {
      world->AwaitStored();
    } else if (verb == "loaded") {
      world->AwaitLoaded();
    } else if (verb == "lose") {
      int n = 0;
      words >> n;
      world->Lose(n);
    } else if (verb == "time") {
      double now = 0;
      words >> now;
      world->SetTime(now);
    } else if (verb == "step:") {
      ASSERT_EQ(world->Step(), std::string(absl::StripAsciiWhitespace(line.substr(5))));
    } else if (verb == "steps") {
      int count = 0;
      words >> count;
      for (int i = 0; i < count; ++i) world->Step();
    } else if (verb == "drain") {
      for (int i = 0; world->has_work(); ++i) {
        ASSERT_LT(i, 10'000) << "no progress";
        world->Step();
        world->AwaitLoaded();
        world->AwaitStored();
      }
    } else if (verb == "expect") {
      const std::string expected(absl::StripAsciiWhitespace(line.substr(6)));
      if (expected.starts_with("held")) world->SettleStores();
      ASSERT_TRUE(absl::StartsWith(expected.starts_with("held") ? world->Usage() : world->Loading(), expected))
          << world->Usage() << ", " << world->Loading();
    } else {
      FAIL() << "unknown verb " << verb;
    }
  }
}

std::vector<std::string> Scenarios() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(SPILLWAY_SOURCE_DIR "/tests/engine/scenarios")) {
    names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class SchedulerScenario : public ::testing::TestWithParam<std::string> {};

TEST_P(SchedulerScenario, Holds) {
  RunScenario(absl::StrCat(SPILLWAY_SOURCE_DIR "/tests/engine/scenarios/", GetParam(), ".txt"));
}

INSTANTIATE_TEST_SUITE_P(Scheduler, SchedulerScenario, ::testing::ValuesIn(Scenarios()),
                         [](const auto& test) { return test.param; });

// Arrivals, cancellations, evictions, lost blocks and late links in any order: everything that is not cancelled
// finishes, and nothing stays held.
void RunAtRandom(SchedulingPolicy policy, LoadChoice choice, std::uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](std::uint32_t limit) { return static_cast<std::int32_t>(random() % limit); };
  Setup setup;
  setup.pool = static_cast<std::uint32_t>(8 + below(9));
  setup.host = below(2) == 0 ? 64 : 12;
  setup.options.max_num_seqs = 2 + below(8);
  setup.options.max_num_batched_tokens = 1 + below(80);
  setup.options.long_prefill_token_threshold = below(3) * 9;
  setup.options.policy = policy;
  setup.options.load_choice = choice;
  if (random() % 3 == 0) {
    setup.options.layer_loads = random() % 2 == 0 ? LayerLoads::kHidden : LayerLoads::kAlways;
    setup.pool += 16;
  }
  if (random() % 4 > 0) setup.link = setup.compute = 100;
  setup.compute *= 1 + below(4);
  setup.overlaps = random() % 2 == 0;
  World world(setup);
  std::vector<std::string> names;
  std::vector<std::int32_t> lengths;
  double now = 0;
  for (int i = 0; i < 80; ++i) {
    const std::int32_t action = below(10);
    if (action < 6) {
      const std::int32_t prompt = 1 + below(110);
      const std::size_t other = names.empty() ? 0 : random() % names.size();
      const bool shares = !names.empty() && random() % 3 > 0;
      names.push_back(absl::StrCat("s", i));
      world.Submit(names.back(), prompt, 1 + below(static_cast<std::uint32_t>(128 - prompt)),
                   shares ? names[other] : "", shares ? std::min(prompt, lengths[other]) : 0, below(3),
                   absl::StrCat("t", below(3)));
      lengths.push_back(prompt);
    } else if (action == 6 && !names.empty()) {
      const std::string& name = names[random() % names.size()];
      if (world.IsLive(name)) world.Cancel(name);
    } else if (action == 7) {
      world.Reset();
    } else if (action == 8) {
      world.Lose(1 + below(4));
    } else if (!names.empty()) {
      world.Stop(names[random() % names.size()]);
    }
    world.SetTime(now += 0.3);
    if (world.has_work()) world.Step();
    if (random() % 2 == 0) world.AwaitLoaded();
    if (random() % 3 == 0) {
      world.AwaitLoaded();
      world.AwaitStored();
    }
  }
  for (int i = 0; world.has_work(); ++i) {
    ASSERT_LT(i, 10'000) << "no progress";
    world.SetTime(now += 0.3);
    world.Step();
    world.AwaitLoaded();
    world.AwaitStored();
  }
  EXPECT_TRUE(absl::StartsWith(world.Usage(), "held 0 ")) << world.Usage();
}

TEST(SchedulerProgress, AnyOrderOfArrivalsFinishes) {
  for (const SchedulingPolicy policy :
       {SchedulingPolicy::kFcfs, SchedulingPolicy::kPriority, SchedulingPolicy::kKappa}) {
    for (const LoadChoice choice : {LoadChoice::kAuto, LoadChoice::kLoad, LoadChoice::kRecompute, LoadChoice::kSplit}) {
      for (std::uint32_t seed = 1; seed <= 12; ++seed) {
        SCOPED_TRACE(
            absl::StrCat("policy ", static_cast<int>(policy), " choice ", static_cast<int>(choice), " seed ", seed));
        RunAtRandom(policy, choice, seed);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

}  // namespace
}  // namespace spillway
