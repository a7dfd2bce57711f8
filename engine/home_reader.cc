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

absl::StatusOr<std::unique_ptr<HomeReader>> HomeReader::Make(Device& device, const Options& options) {
  SPILLWAY_CHECK(options.staging_blocks > 0 && options.staging_blocks % kSegmentBlocks == 0);
  std::unique_ptr<HomeReader> reader(new HomeReader(device, options));
  const KvLayout& layout = options.home.layout;
  const std::size_t state_bytes = static_cast<std::size_t>(layout.head_dim + 2) * sizeof(float);
  ASSIGN_OR_RETURN(reader->states_,
                   device.Allocate(MemoryKind::kDevice, static_cast<std::size_t>(options.max_tokens) *
                                                            static_cast<std::size_t>(options.num_heads) * state_bytes));
  reader->sources_.reserve(static_cast<std::size_t>(options.max_home_blocks));
  if (options.path == Path::kInPlace) return reader;
  for (Buffer& buffer : reader->staging_) {
    ASSIGN_OR_RETURN(buffer, device.Allocate(MemoryKind::kDevice,
                                             static_cast<std::size_t>(options.staging_blocks) * layout.layer_bytes()));
  }
  ASSIGN_OR_RETURN(reader->copies_, device.NewStream());
  return reader;
}

HomeReader::Layout HomeReader::LayOut(Arena& arena, const Counts& counts) {
  Layout layout{};
  layout.key_begin = arena.Take<std::int32_t>((counts.passes + 1) * counts.sequences);
  layout.key_end = arena.Take<std::int32_t>((counts.passes + 1) * counts.sequences);
  layout.block_begin = arena.Take<std::int32_t>(counts.passes * (counts.sequences + 1));
  layout.block_table = arena.Take<std::int32_t>(counts.blocks);
  return layout;
}

// Every pass but the last is full, since buffers and home prefixes are whole segments.
std::size_t HomeReader::PassesOver(std::size_t num_blocks, bool in_place) const {
  if (in_place) return num_blocks > 0 ? 1 : 0;
  const auto per_pass = static_cast<std::size_t>(options_.staging_blocks);
  return (num_blocks + per_pass - 1) / per_pass;
}

HomeReader::Counts HomeReader::CountsOf(std::span<const PlannedSequence> streamed) const {
  Counts counts{.sequences = streamed.size()};
  for (const PlannedSequence& planned : streamed) counts.blocks += static_cast<std::size_t>(planned.sequence->num_home);
  counts.passes = PassesOver(counts.blocks, ReadsInPlace(streamed));
  return counts;
}

bool HomeReader::ReadsInPlace(std::span<const PlannedSequence> streamed) const {
  if (options_.path != Path::kByRows) return options_.path == Path::kInPlace;
  return std::ranges::all_of(streamed,
                             [](const PlannedSequence& planned) { return planned.sequence->num_planned == 1; });
}

HomeReader::Counts HomeReader::MaxCounts(std::size_t max_sequences) const {
  const auto blocks = static_cast<std::size_t>(options_.max_home_blocks);
  return {.sequences = std::min(max_sequences, blocks / kSegmentBlocks),
          .passes = PassesOver(blocks, options_.path == Path::kInPlace),
          .blocks = blocks};
}

void HomeReader::Fill(std::span<const PlannedSequence> streamed, const Layout& host) {
  counts_ = CountsOf(streamed);
  in_place_ = ReadsInPlace(streamed);
  sources_.clear();
  std::vector<std::int32_t> num_read(streamed.size(), 0);
  std::int32_t* key_begin = host.key_begin;
  std::int32_t* key_end = host.key_end;
  std::int32_t* block_begin = host.block_begin;
  std::int32_t next = 0;
  for (std::size_t pass = 0; pass < counts_.passes; ++pass) {
    const std::int32_t first = next;
    *block_begin++ = next;
    for (std::size_t s = 0; s < streamed.size(); ++s) {
      const Sequence& sequence = *streamed[s].sequence;
      std::int32_t count = sequence.num_home - num_read[s];
      if (!in_place_) {
        count = std::min(count, static_cast<std::int32_t>(options_.staging_blocks) - (next - first));
      }
      *key_begin++ = num_read[s] * kBlockTokens;
      for (std::int32_t i = 0; i < count; ++i, ++next, ++num_read[s]) {
        const HostSlot& slot = sequence.home[static_cast<std::size_t>(num_read[s])]->slot();
        host.block_table[next] = in_place_ ? static_cast<std::int32_t>(slot.id()) : next - first;
        sources_.push_back(slot.bytes());
      }
      *key_end++ = num_read[s] * kBlockTokens;
      *block_begin++ = next;
    }
  }
  for (const PlannedSequence& planned : streamed) {
    *key_begin++ = planned.sequence->num_home * kBlockTokens;
    *key_end++ = planned.sequence->num_computed + planned.sequence->num_planned;
  }
}

// Copies the layer's strips of the pass's blocks, once the buffer is no longer read; `stream` goes on when they are
// there.
KvView HomeReader::Stage(Stream& stream, std::size_t pass, int layer, std::size_t buffer) {
  KvLayout layout = options_.home.layout;
  const std::size_t layer_bytes = layout.layer_bytes();
  const auto per_pass = static_cast<std::size_t>(options_.staging_blocks);
  const std::size_t begin = pass * per_pass;
  const auto from = std::span(sources_).subspan(begin, std::min(per_pass, counts_.blocks - begin));
  const std::shared_ptr<Event> read = read_[buffer];
  const bool is_paced = options_.link->is_paced();
  // A copy whose buffer is free follows the one before without a gap, as on a bus, however late this thread wakes.
  if (is_paced) {
    copies_->Notify([this, read, queued_at = Now()] { copying_since_ = !read || read->Ready() ? queued_at : 0; });
  }
  if (read) copies_->Wait(read);
  if (is_paced) {
    copies_->Notify([this] {
      if (copying_since_ == 0) copying_since_ = Now();
    });
  }
  copies_->Gather(staging_[buffer].get(), from, layout.strip_offset(layer, 0), layer_bytes);
  if (is_paced) {
    copies_->Notify(
        [this, count = from.size(), layer_bytes] { options_.link->Await(copying_since_, count, count * layer_bytes); });
  }
  stream.Wait(copies_->Record());
  layout.num_layers = 1;
  return {.pool = staging_[buffer].get(), .layout = layout};
}

void HomeReader::Attend(Stream& stream, const Layout& device, const AttentionArgs& args) {
  read_bytes_ += static_cast<std::int64_t>(counts_.blocks * options_.home.layout.layer_bytes());
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
