#include "engine/home_reader.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "engine/sequence.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

HomeReader::HomeReader(Device& device, const Options& options, std::unique_ptr<KvProjector> projector)
    : device_(device), options_(options), projector_(std::move(projector)) {}

absl::StatusOr<std::unique_ptr<HomeReader>> HomeReader::Make(Device& device, const Options& options,
                                                             std::unique_ptr<KvProjector> projector) {
  SPILLWAY_CHECK(options.staging_blocks > 0 && options.staging_blocks % kSegmentBlocks == 0);
  SPILLWAY_CHECK(projector == nullptr || options.path == Path::kStaged);
  std::unique_ptr<HomeReader> reader(new HomeReader(device, options, std::move(projector)));
  const KvLayout& layout = options.home.layout;
  const std::size_t state_bytes = static_cast<std::size_t>(layout.head_dim + 2) * sizeof(float);
  ASSIGN_OR_RETURN(reader->states_,
                   device.Allocate(MemoryKind::kDevice, static_cast<std::size_t>(options.max_tokens) *
                                                            static_cast<std::size_t>(options.num_heads) * state_bytes));
  reader->sources_.reserve(static_cast<std::size_t>(options.max_home_blocks));
  if (options.path == Path::kInPlace) return reader;
  const auto staging_blocks = static_cast<std::size_t>(options.staging_blocks);
  const bool projects = reader->projector_ != nullptr;
  for (std::size_t i = 0; i < kNumBuffers; ++i) {
    ASSIGN_OR_RETURN(reader->staging_[i], device.Allocate(MemoryKind::kDevice, staging_blocks * layout.layer_bytes()));
    if (!projects) continue;
    ASSIGN_OR_RETURN(reader->input_staging_[i],
                     device.Allocate(MemoryKind::kDevice, staging_blocks * options.inputs.strip_bytes()));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.NewStream());
  reader->copies_ = std::make_unique<TimedCopies>(std::move(stream), *options.link, projects);
  return reader;
}

std::size_t HomeReader::buffer_bytes() const {
  std::size_t bytes = states_.size_bytes + (projector_ ? projector_->buffer_bytes() : 0);
  for (std::size_t i = 0; i < kNumBuffers; ++i) bytes += staging_[i].size_bytes + input_staging_[i].size_bytes;
  return bytes;
}

HomeReader::Layout HomeReader::LayOut(Arena& arena, const Counts& counts) {
  Layout layout{};
  layout.key_begin = arena.Take<std::int32_t>((counts.passes + 1) * counts.sequences);
  layout.key_end = arena.Take<std::int32_t>((counts.passes + 1) * counts.sequences);
  layout.block_begin = arena.Take<std::int32_t>(counts.passes * (counts.sequences + 1));
  layout.block_table = arena.Take<std::int32_t>(counts.blocks);
  return layout;
}

// As few passes as the buffers allow, of whole segments and of about one size, so that copies and passes overlap all
// along. Every pass but the last has so many.
std::size_t HomeReader::BlocksPerPass(std::size_t num_blocks, bool in_place) const {
  if (in_place || num_blocks == 0) return std::max<std::size_t>(num_blocks, 1);
  const auto most = static_cast<std::size_t>(options_.staging_blocks);
  const std::size_t passes = (num_blocks + most - 1) / most;
  const std::size_t segments = (num_blocks + passes * kSegmentBlocks - 1) / (passes * kSegmentBlocks);
  return segments * kSegmentBlocks;
}

HomeReader::Counts HomeReader::CountsOf(std::span<const PlannedSequence> streamed) const {
  Counts counts{.sequences = streamed.size()};
  for (const PlannedSequence& planned : streamed) counts.blocks += static_cast<std::size_t>(planned.sequence->num_home);
  const std::size_t per_pass = BlocksPerPass(counts.blocks, ReadsInPlace(streamed));
  counts.passes = (counts.blocks + per_pass - 1) / per_pass;
  return counts;
}

bool HomeReader::ReadsInPlace(std::span<const PlannedSequence> streamed) const {
  if (options_.path != Path::kByRows) return options_.path == Path::kInPlace;
  return std::ranges::all_of(streamed,
                             [](const PlannedSequence& planned) { return planned.sequence->num_planned == 1; });
}

HomeReader::Counts HomeReader::MaxCounts(std::size_t max_sequences) const {
  const auto blocks = static_cast<std::size_t>(options_.max_home_blocks);
  const auto per_pass =
      static_cast<std::size_t>(options_.path == Path::kInPlace ? options_.max_home_blocks : options_.staging_blocks);
  return {.sequences = std::min(max_sequences, blocks / kSegmentBlocks),
          .passes = (blocks + per_pass - 1) / per_pass,
          .blocks = blocks};
}

void HomeReader::Fill(std::span<const PlannedSequence> streamed, std::int32_t num_projected, const Layout& host) {
  SPILLWAY_CHECK(num_projected == 0 || projector_ != nullptr);
  counts_ = CountsOf(streamed);
  in_place_ = ReadsInPlace(streamed);
  sources_.clear();
  spans_.clear();
  span_begin_.assign(1, 0);
  const auto per_pass = static_cast<std::int32_t>(BlocksPerPass(counts_.blocks, in_place_));
  const auto num_blocks = static_cast<std::int64_t>(counts_.blocks);
  std::vector<std::int32_t> num_read(streamed.size(), 0);
  std::int32_t* key_begin = host.key_begin;
  std::int32_t* key_end = host.key_end;
  std::int32_t* block_begin = host.block_begin;
  std::int32_t next = 0;
  std::int64_t projected = 0;
  for (std::size_t pass = 0; pass < counts_.passes; ++pass) {
    const std::int32_t first = next;
    const std::int64_t due = num_projected * std::min<std::int64_t>(first + per_pass, num_blocks) / num_blocks;
    *block_begin++ = next;
    for (std::size_t s = 0; s < streamed.size(); ++s) {
      const Sequence& sequence = *streamed[s].sequence;
      const std::int32_t end = std::min(sequence.num_home, num_read[s] + per_pass - (next - first));
      *key_begin++ = num_read[s] * kBlockTokens;
      for (std::int32_t& i = num_read[s]; i < end; ++i, ++next) {
        const bool is_projected = projected < due && sequence.HasInputs(i);
        projected += is_projected ? 1 : 0;
        host.block_table[next] =
            in_place_ ? static_cast<std::int32_t>(sequence.home[static_cast<std::size_t>(i)]->slot().id())
                      : next - first;
        AddBlock(sequence, i, next - first, is_projected);
      }
      *key_end++ = num_read[s] * kBlockTokens;
      *block_begin++ = next;
    }
    span_begin_.push_back(spans_.size());
  }
  for (const PlannedSequence& planned : streamed) {
    *key_begin++ = planned.sequence->num_home * kBlockTokens;
    *key_end++ = planned.sequence->num_computed + planned.sequence->num_planned;
  }
  projected_blocks_ += projected;
  layer_read_bytes_ = (num_blocks - projected) * static_cast<std::int64_t>(options_.home.layout.layer_bytes()) +
                      projected * static_cast<std::int64_t>(options_.inputs.strip_bytes());
}

// Block `block` of the sequence is the pass's `index`-th.
void HomeReader::AddBlock(const Sequence& sequence, std::int32_t block, std::int32_t index, bool is_projected) {
  const bool is_first = spans_.size() == span_begin_.back();
  const std::int32_t position = block * kBlockTokens;
  const auto continues = [&](const Span& span) {
    if (span.is_projected != is_projected) return false;
    return !is_projected || span.first_position + span.count * kBlockTokens == position;
  };
  if (is_first || !continues(spans_.back())) {
    spans_.push_back({.first = index,
                      .count = 0,
                      .first_position = position,
                      .source = sources_.size(),
                      .is_projected = is_projected});
  }
  ++spans_.back().count;
  const auto at = static_cast<std::size_t>(block);
  sources_.push_back(is_projected ? sequence.inputs[at].bytes : sequence.home[at]->slot().bytes());
}

std::span<const HomeReader::Span> HomeReader::SpansOf(std::size_t pass) const {
  return std::span(spans_).subspan(span_begin_[pass], span_begin_[pass + 1] - span_begin_[pass]);
}

// Copies the layer's inputs of those of the pass's blocks that are projected. Null: there are none.
std::shared_ptr<Event> HomeReader::CopyInputs(std::span<const Span> spans, int layer, std::size_t buffer) {
  const std::size_t strip_bytes = options_.inputs.strip_bytes();
  std::size_t count = 0;
  for (const Span& span : spans) {
    if (!span.is_projected) continue;
    copies_->stream().Gather(input_staging_[buffer].get() + count * strip_bytes,
                             std::span(sources_).subspan(span.source, static_cast<std::size_t>(span.count)),
                             static_cast<std::size_t>(layer) * strip_bytes, strip_bytes);
    count += static_cast<std::size_t>(span.count);
  }
  if (count == 0) return nullptr;
  copies_->End(count, count * strip_bytes, times_.inputs);
  return copies_->stream().Record();
}

// Copies the layer's strips of the pass's other blocks. Null: there are none.
std::shared_ptr<Event> HomeReader::CopyStrips(std::span<const Span> spans, int layer, std::size_t buffer) {
  const KvLayout& layout = options_.home.layout;
  const std::size_t layer_bytes = layout.layer_bytes();
  std::size_t count = 0;
  for (const Span& span : spans) {
    if (span.is_projected) continue;
    copies_->stream().Gather(staging_[buffer].get() + static_cast<std::size_t>(span.first) * layer_bytes,
                             std::span(sources_).subspan(span.source, static_cast<std::size_t>(span.count)),
                             layout.strip_offset(layer, 0), layer_bytes);
    count += static_cast<std::size_t>(span.count);
  }
  if (count == 0) return nullptr;
  copies_->End(count, count * layer_bytes, times_.strips);
  return copies_->stream().Record();
}

void HomeReader::AwaitCopies(Stream& stream, const std::shared_ptr<Event>& event) {
  if (event == nullptr) return;
  if (projector_ != nullptr) stream.Notify([this] { since_ = Now(); });
  stream.Wait(event);
  if (projector_ != nullptr) stream.Notify([this] { times_.waiting_seconds += Now() - since_; });
}

void HomeReader::Project(Stream& stream, std::span<const Span> spans, int layer, std::size_t buffer) {
  KvLayout layout = options_.home.layout;
  layout.num_layers = 1;
  const std::byte* inputs = input_staging_[buffer].get();
  double flops = 0;
  stream.Notify([this] { since_ = Now(); });
  for (const Span& span : spans) {
    if (!span.is_projected) continue;
    const std::int64_t num_rows = std::int64_t{span.count} * kBlockTokens;
    std::byte* const to = staging_[buffer].get() + static_cast<std::size_t>(span.first) * layout.layer_bytes();
    projector_->Project(stream, {.layer = layer,
                                 .inputs = inputs,
                                 .num_rows = num_rows,
                                 .first_position = span.first_position,
                                 .kv = {.pool = to, .layout = layout}});
    inputs += static_cast<std::size_t>(span.count) * options_.inputs.strip_bytes();
    flops += static_cast<double>(num_rows) * projector_->flops_per_row();
  }
  stream.Notify([this, flops] {
    times_.projected_flops += flops;
    times_.projecting_seconds += Now() - since_;
  });
}

// Brings the pass's keys and values into a buffer, once that is no longer read; `stream` goes on when they are there.
KvView HomeReader::Stage(Stream& stream, std::size_t pass, int layer, std::size_t buffer) {
  const std::span<const Span> spans = SpansOf(pass);
  copies_->BeginOnceFree(read_[buffer]);
  const std::shared_ptr<Event> inputs = CopyInputs(spans, layer, buffer);
  const std::shared_ptr<Event> strips = CopyStrips(spans, layer, buffer);
  if (inputs != nullptr) {
    AwaitCopies(stream, inputs);
    Project(stream, spans, layer, buffer);
  }
  AwaitCopies(stream, strips);
  KvLayout layout = options_.home.layout;
  layout.num_layers = 1;
  return {.pool = staging_[buffer].get(), .layout = layout};
}

void HomeReader::Attend(Stream& stream, const Layout& device, const AttentionArgs& args) {
  read_bytes_ += layer_read_bytes_;
  AttentionArgs part = args;
  part.states = reinterpret_cast<float*>(states_.get());
  part.pass = AttentionPass::kFirst;
  for (std::size_t pass = 0; pass < counts_.passes; ++pass) {
    part.key_begin = device.key_begin + pass * counts_.sequences;
    part.key_end = device.key_end + pass * counts_.sequences;
    part.block_begin = device.block_begin + pass * (counts_.sequences + 1);
    part.block_table = device.block_table;
    if (in_place_) {
      part.kv = options_.home;
      device_.kernels().Attention(stream, part);
    } else {
      const std::size_t buffer = std::exchange(next_buffer_, (next_buffer_ + 1) % kNumBuffers);
      part.kv = Stage(stream, pass, args.layer, buffer);
      part.layer = 0;
      device_.kernels().Attention(stream, part);
      read_[buffer] = stream.Record();
    }
    part.pass = AttentionPass::kMiddle;
  }
  part = args;
  part.states = reinterpret_cast<float*>(states_.get());
  part.pass = AttentionPass::kLast;
  part.key_begin = device.key_begin + counts_.passes * counts_.sequences;
  part.key_end = device.key_end + counts_.passes * counts_.sequences;
  device_.kernels().Attention(stream, part);
}

}  // namespace spillway
