#include "engine/step_runner.h"

#include <algorithm>
#include <utility>

#include "engine/sequence.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

std::span<const std::int32_t> BannedFor(const PlannedSequence& planned) {
  if (planned.num_outputs() >= planned.sequence->request.sampling.min_tokens) return {};
  return planned.sequence->banned_until_min;
}

SampleRow SampleRowOf(const PlannedSequence& planned) {
  const Sequence& sequence = *planned.sequence;
  const SamplingParams& params = sequence.request.sampling;
  return {.temperature = params.temperature,
          .top_p = params.top_p,
          .min_p = params.min_p,
          .top_k = params.top_k,
          .seed = params.seed,
          .choice = sequence.request.choice,
          .output_index = static_cast<std::uint32_t>(planned.num_outputs()),
          .num_logprobs = params.num_logprobs};
}

}  // namespace

absl::StatusOr<std::unique_ptr<StepRunner>> StepRunner::Make(Device& device, Model& model, const Limits& limits,
                                                             std::unique_ptr<HomeReader> home_reader,
                                                             std::unique_ptr<LayerLoader> layer_loader,
                                                             std::unique_ptr<InputWriter> input_writer,
                                                             bool hash_logits) {
  std::unique_ptr<StepRunner> runner(new StepRunner(device, model, limits, std::move(home_reader),
                                                    std::move(layer_loader), std::move(input_writer), hash_logits));
  const std::int64_t max_sequences = device.PaddedRows(limits.max_sequences);
  const std::int64_t max_tokens = std::max<std::int64_t>(limits.max_tokens, max_sequences);
  const auto sequences = static_cast<std::size_t>(max_sequences);
  Arena count;
  LayOut(count, {.tokens = static_cast<std::size_t>(max_tokens),
                 .sequences = sequences,
                 .blocks = sequences * static_cast<std::size_t>(limits.max_blocks_per_sequence),
                 .sampled = sequences,
                 .banned = sequences * static_cast<std::size_t>(limits.max_banned_per_sequence),
                 .home = runner->home_reader_ ? runner->home_reader_->MaxCounts(sequences) : HomeReader::Counts{}});
  RETURN_IF_ERROR(model.Reserve(max_tokens, max_sequences));
  const std::size_t result_bytes = sequences * sizeof(SampleResult);
  for (HostSide& side : runner->host_sides_) {
    ASSIGN_OR_RETURN(side.metadata, device.Allocate(MemoryKind::kPinnedHost, count.used()));
    ASSIGN_OR_RETURN(side.results, device.Allocate(MemoryKind::kPinnedHost, result_bytes));
  }
  ASSIGN_OR_RETURN(runner->device_metadata_, device.Allocate(MemoryKind::kDevice, count.used()));
  ASSIGN_OR_RETURN(runner->device_results_, device.Allocate(MemoryKind::kDevice, result_bytes));
  ASSIGN_OR_RETURN(runner->stream_, device.NewStream());
  return runner;
}

StepRunner::Layout StepRunner::LayOut(Arena& arena, const Counts& counts) {
  Layout layout{};
  layout.tokens = arena.Take<std::int32_t>(counts.tokens);
  layout.positions = arena.Take<std::int32_t>(counts.tokens);
  layout.blocks = arena.Take<std::int32_t>(counts.tokens);
  layout.query_begin = arena.Take<std::int32_t>(counts.sequences + 1);
  layout.first_position = arena.Take<std::int32_t>(counts.sequences);
  layout.block_begin = arena.Take<std::int32_t>(counts.sequences + 1);
  layout.sampled_rows = arena.Take<std::int32_t>(counts.sampled);
  layout.banned_begin = arena.Take<std::int32_t>(counts.sampled + 1);
  layout.banned = arena.Take<std::int32_t>(counts.banned);
  layout.sample_rows = arena.Take<SampleRow>(counts.sampled);
  layout.home = HomeReader::LayOut(arena, counts.home);
  layout.block_table = arena.Take<std::int32_t>(counts.blocks);
  return layout;
}

StepRunner::Counts StepRunner::CountsOf(const StepPlan& plan) const {
  Counts counts;
  counts.tokens = static_cast<std::size_t>(plan.num_tokens);
  counts.sequences = plan.sequences.size();
  for (const PlannedSequence& planned : plan.sequences) {
    counts.blocks += planned.sequence->blocks.size();
    if (!planned.samples) continue;
    ++counts.sampled;
    counts.banned += BannedFor(planned).size();
  }
  if (plan.num_streamed > 0) counts.home = home_reader_->CountsOf(plan.streamed());
  return counts;
}

// The layout of a step of so many decoding sequences, of which the last ones may be padding.
StepRunner::Counts StepRunner::PaddedDecode(std::size_t num_sequences, std::size_t num_blocks) const {
  const auto rows = static_cast<std::size_t>(device_.PaddedRows(static_cast<std::int64_t>(num_sequences)));
  return {.tokens = rows,
          .sequences = rows,
          .blocks = num_blocks,
          .sampled = rows,
          .banned = rows * max_banned_per_sequence_,
          .home = {}};
}

void StepRunner::Fill(const StepPlan& plan, const Counts& counts, const Layout& host) {
  std::int32_t row = 0;
  std::int32_t block = 0;
  std::int32_t sampled = 0;
  std::int32_t banned = 0;
  std::int32_t index = 0;
  host.query_begin[0] = host.block_begin[0] = host.banned_begin[0] = 0;
  for (const PlannedSequence& planned : plan.sequences) {
    const Sequence& sequence = *planned.sequence;
    const std::int32_t begin = planned.begin();
    host.first_position[index] = begin;
    for (const BlockRef& held : sequence.blocks) host.block_table[block++] = static_cast<std::int32_t>(held.id());
    const std::int32_t* const table = host.block_table + host.block_begin[index];
    for (std::int32_t position = begin; position < begin + planned.count(); ++position, ++row) {
      host.tokens[row] =
          planned.is_ahead() ? SampledFrom(planned.sampled_row) : sequence.tokens[static_cast<std::size_t>(position)];
      host.positions[row] = position;
      host.blocks[row] = table[position / kBlockTokens - sequence.num_home];
    }
    if (planned.samples) {
      host.sampled_rows[sampled] = row - 1;
      host.sample_rows[sampled] = SampleRowOf(planned);
      for (const std::int32_t token : BannedFor(planned)) host.banned[banned++] = token;
      host.banned_begin[++sampled] = banned;
    }
    ++index;
    host.query_begin[index] = row;
    host.block_begin[index] = block;
  }
  if (counts.sequences > plan.sequences.size()) FillPadding(plan, counts, host);
}

// Sequences without tokens, and rows that belong to none: what they compute changes no KV and is not read.
void StepRunner::FillPadding(const StepPlan& plan, const Counts& counts, const Layout& host) {
  const std::size_t begin = plan.sequences.size();
  for (std::size_t i = begin; i < counts.sequences; ++i) {
    host.tokens[i] = host.positions[i] = host.first_position[i] = host.sampled_rows[i] = 0;
    host.blocks[i] = kNoBlock;
    host.query_begin[i + 1] = host.query_begin[begin];
    host.block_begin[i + 1] = host.block_begin[begin];
    host.banned_begin[i + 1] = host.banned_begin[begin];
    host.sample_rows[i] = {};
  }
}

StepRunner::Launched StepRunner::Launch(const StepPlan& plan, const KvView& kv, std::function<void()> done) {
  const HostSide& side = host_sides_[std::exchange(next_side_, 1 - next_side_)];
  Counts counts = CountsOf(plan);
  Launched launched;
  launched.results = {reinterpret_cast<const SampleResult*>(side.results.get()), counts.sampled};
  if (input_writer_) input_writer_->Fill(plan);
  // With blocks at home it also queues passes over these, with blocks that come up their copies, and with inputs to
  // keep theirs.
  const bool is_plain = plan.num_streamed == 0 && plan.num_arriving == 0 && (!input_writer_ || input_writer_->empty());
  const bool is_decode = is_plain && counts.tokens == counts.sequences && counts.sampled == counts.sequences;
  if (is_decode) counts = PaddedDecode(counts.sequences, counts.blocks);
  Arena host_arena(side.metadata.get(), side.metadata.size_bytes);
  Arena device_arena(device_metadata_.get(), device_metadata_.size_bytes);
  const Layout host = LayOut(host_arena, counts);
  const Layout device = LayOut(device_arena, counts);
  Fill(plan, counts, host);
  if (plan.num_streamed > 0) home_reader_->Fill(plan.streamed(), plan.num_projected, host.home);
  LayerLoader* const loader = plan.num_arriving > 0 ? layer_loader_.get() : nullptr;
  if (loader != nullptr) loader->Begin(plan.sequences, kv);
  stream_->Copy(device_metadata_.get(), side.metadata.get(), host_arena.used());
  launched.begin = stream_->RecordTime();
  // What a decoding step queues, and where its arrays are, depends on its number of rows alone.
  const auto queue = [&] { QueueStep(counts, device, kv, loader); };
  if (is_decode) {
    stream_->Repeat(counts.sequences, queue);
  } else {
    queue();
  }
  launched.end = stream_->RecordTime();
  if (!launched.results.empty()) {
    stream_->Copy(side.results.get(), device_results_.get(), launched.results.size_bytes());
  }
  stream_->Notify(std::move(done));
  return launched;
}

void StepRunner::QueueStep(const Counts& counts, const Layout& device, const KvView& kv, LayerLoader* layer_loader) {
  const StepArrays arrays{.num_tokens = static_cast<std::int64_t>(counts.tokens),
                          .num_sequences = static_cast<std::int64_t>(counts.sequences),
                          .num_sampled = static_cast<std::int64_t>(counts.sampled),
                          .tokens = device.tokens,
                          .sampled = reinterpret_cast<const SampleResult*>(device_results_.get()),
                          .positions = device.positions,
                          .blocks = device.blocks,
                          .query_begin = device.query_begin,
                          .first_position = device.first_position,
                          .block_begin = device.block_begin,
                          .block_table = device.block_table,
                          .sampled_rows = device.sampled_rows,
                          .num_streamed = static_cast<std::int64_t>(counts.home.sequences),
                          .home_reader = home_reader_.get(),
                          .home = device.home,
                          .layer_loader = layer_loader,
                          .input_writer = input_writer_.get()};
  const float* const logits = model_.Forward(*stream_, arrays, kv);
  if (input_writer_) input_writer_->Join(*stream_);
  if (counts.sampled == 0) return;
  device_.kernels().Sample(*stream_, {.logits = logits,
                                      .num_rows = static_cast<std::int64_t>(counts.sampled),
                                      .vocab = model_.config().vocab,
                                      .rows = device.sample_rows,
                                      .banned_begin = device.banned_begin,
                                      .banned = device.banned,
                                      .hash_logits = hash_logits_,
                                      .results = reinterpret_cast<SampleResult*>(device_results_.get())});
}

}  // namespace spillway
