// Scenario tests: text files that drive Scheduler and KvStore with a runner that computes nothing.
//
//   pool B seqs S budget T chunk C [caching off] [policy P]     once, first
//   submit NAME PROMPT out N [same NAME2 SHARED] [priority P]   prompt tokens are unique to NAME; the first SHARED
//   equal
//                                                               NAME2's
//   cancel NAME
//   reset                                            forget cold blocks
//   step: LIST [; wait LIST] [; preempted N] [; done LIST] [; hit N]
//        LIST of NAME:TOKENS in the plan's order, * where the last token is sampled; waiting in order
//   steps N                                          that many steps, nothing expected
//   drain                                            steps until no work is left; fails after 10,000
//   expect held N cold N

#include "engine/scheduler.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "gtest/gtest.h"

namespace spillway {
namespace {

constexpr KvLayout kTinyLayout{.num_layers = 1, .num_kv_heads = 1, .head_dim = 2, .dtype = DType::kF32};

class World {
 public:
  World(std::uint32_t pool, std::int32_t seqs, std::int32_t budget, std::int32_t chunk, bool caching,
        SchedulingPolicy policy)
      : device_(*MakeCpuDevice({})),
        host_(MakeNullHostTier()),
        store_(*KvStore::Make(*device_, *host_,
                              {.layout = kTinyLayout,
                               .num_blocks = pool,
                               .caching = caching ? PrefixCaching::kOn : PrefixCaching::kOff,
                               .pacing = {},
                               .before_copy = nullptr},
                              [] {})),
        scheduler_(*store_, chain_,
                   {.max_num_seqs = seqs,
                    .max_num_batched_tokens = budget,
                    .long_prefill_token_threshold = chunk,
                    .enable_prefix_caching = caching,
                    .policy = policy},
                   nullptr) {}

  void Submit(const std::string& name, std::int32_t prompt, std::int32_t out, const std::string& same,
              std::int32_t shared, std::int32_t priority) {
    auto sequence = std::make_unique<Sequence>();
    sequence->request.priority = priority;
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

  void Cancel(const std::string& name) { scheduler_.Remove(scheduler_.Find(ids_.at(name))); }
  void Reset() { store_->EvictCold(); }

  // One step, described in the form that scenarios expect.
  std::string Step() {
    const StepPlan plan = scheduler_.Plan(0);
    EXPECT_FALSE(plan.empty());
    std::vector<std::string> planned;
    std::int32_t hit = 0;
    for (const PlannedSequence& each : plan.sequences) {
      planned.push_back(absl::StrCat(NameOf(*each.sequence), ":", each.sequence->num_planned, each.samples ? "*" : ""));
      if (!seen_[each.sequence->request.id]) hit += each.sequence->num_cached;
      seen_[each.sequence->request.id] = true;
    }
    std::vector<std::string> waiting;
    for (const Sequence* each : scheduler_.All()) {
      if (each->blocks.empty()) waiting.push_back(NameOf(*each));
    }
    scheduler_.CheckInvariants();
    scheduler_.Computed(plan);
    std::vector<std::string> done;
    for (const PlannedSequence& each : plan.sequences) {
      if (!each.samples) continue;
      each.sequence->tokens.push_back(7);
      if (each.sequence->num_outputs() < each.sequence->request.sampling.max_tokens) continue;
      done.push_back(NameOf(*each.sequence));
      scheduler_.Remove(each.sequence);
    }
    scheduler_.CheckInvariants();
    std::string text = absl::StrJoin(planned, " ");
    if (!waiting.empty()) absl::StrAppend(&text, "; wait ", absl::StrJoin(waiting, " "));
    if (plan.num_preempted > 0) absl::StrAppend(&text, "; preempted ", plan.num_preempted);
    if (!done.empty()) absl::StrAppend(&text, "; done ", absl::StrJoin(done, " "));
    if (hit > 0) absl::StrAppend(&text, "; hit ", hit);
    return text;
  }

  bool has_work() const { return scheduler_.has_work(); }
  std::string Usage() const { return absl::StrCat("held ", store_->num_held(), " cold ", store_->num_cold()); }

 private:
  const std::string& NameOf(const Sequence& sequence) const { return names_.at(sequence.request.id); }

  KeyChain chain_{"0"};
  std::unique_ptr<Device> device_;
  std::unique_ptr<HostTier> host_;
  std::unique_ptr<KvStore> store_;
  Scheduler scheduler_;
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, std::string> names_;
  std::map<std::string, std::uint64_t> ids_;
  std::map<std::string, std::vector<std::int32_t>> prompts_;
  std::map<std::uint64_t, bool> seen_;
};

void ReadPairs(std::istream& words, std::map<std::string, std::string>& pairs) {
  for (std::string key; words >> key;) words >> pairs.at(key);
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
      std::uint32_t pool = 0;
      std::int32_t seqs = 0;
      std::int32_t budget = 0;
      std::int32_t chunk = 0;
      words >> pool >> skip >> seqs >> skip >> budget >> skip >> chunk;
      std::map<std::string, std::string> others = {{"caching", "on"}, {"policy", "fcfs"}};
      ReadPairs(words, others);
      world = std::make_unique<World>(pool, seqs, budget, chunk, others["caching"] == "on",
                                      SchedulingPolicyNamed(others["policy"]).value());
    } else if (verb == "submit") {
      std::string name;
      std::int32_t prompt = 0;
      std::int32_t out = 0;
      words >> name >> prompt >> skip >> out;
      std::string same;
      std::int32_t shared = 0;
      std::int32_t priority = 0;
      for (std::string key; words >> key;) {
        if (key == "same") words >> same >> shared;
        if (key == "priority") words >> priority;
      }
      world->Submit(name, prompt, out, same, shared, priority);
    } else if (verb == "cancel") {
      std::string name;
      words >> name;
      world->Cancel(name);
    } else if (verb == "reset") {
      world->Reset();
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
      }
    } else if (verb == "expect") {
      ASSERT_EQ(world->Usage(), std::string(absl::StripAsciiWhitespace(line.substr(6))));
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

}  // namespace
}  // namespace spillway
