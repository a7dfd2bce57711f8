#pragma once

// HomeReader: attention of a step's streamed sequences, those whose first blocks are at home only. Passes over the home
// blocks build partial states, and a last one merges the blocks that the device holds.
//
//   in place  kernels read the host tier's slots where they are, all in one pass per layer
//   staged    a stream of its own copies the layer's strips, some blocks at a time, into one of three buffers on the
//             device, while the passes before are computed from the others; the next layer's strips follow without a
//             gap
//
// Of a block whose layer inputs are kept, a staged pass may copy these instead, which are fewer bytes, and project its
// keys and values from them while the strips of the pass's other blocks are on their way.
//
// The bits are those of attention over blocks that are all on the device. Everything is reserved by Make. Engine thread
// only; one step in flight at a time.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/input_layout.h"
#include "engine/kv_projector.h"
#include "engine/step_plan.h"
#include "engine/timed_copies.h"
#include "kernels/arena.h"
#include "kernels/kernels.h"
#include "kvstore/paced_link.h"

namespace spillway {

class HomeReader {
 public:
  // kByRows: in place where every streamed sequence computes one token, else staged.
  enum class Path : std::uint8_t { kInPlace, kStaged, kByRows };

  struct Options {
    Path path = Path::kInPlace;
    KvView home;                // the host tier's slots
    PacedLink* link = nullptr;  // outlives the reader; kStaged: paces its copies
    int num_heads = 0;
    std::int64_t max_tokens = 0;       // rows of a step
    std::int64_t max_home_blocks = 0;  // of all sequences of a step together
    std::int64_t staging_blocks = 0;   // of each buffer; a multiple of kSegmentBlocks
    InputLayout inputs;                // with a projector
  };

  // `device` outlives the reader. `projector`: null where no inputs are kept; else the path is kStaged.
  static absl::StatusOr<std::unique_ptr<HomeReader>> Make(Device& device, const Options& options,
                                                          std::unique_ptr<KvProjector> projector);

  // The step's arrays, laid out alike on host and device.
  struct Counts {
    std::size_t sequences = 0;
    std::size_t passes = 0;  // over home blocks
    std::size_t blocks = 0;  // at home
  };
  struct Layout {
    std::int32_t* key_begin;    // [passes + 1, sequences]: the last of the blocks on the device
    std::int32_t* key_end;      // as key_begin
    std::int32_t* block_begin;  // [passes, sequences + 1]
    std::int32_t* block_table;  // [blocks]
  };
  static Layout LayOut(Arena& arena, const Counts& counts);
  Counts CountsOf(std::span<const PlannedSequence> streamed) const;
  Counts MaxCounts(std::size_t max_sequences) const;

  // Writes the host arrays and remembers the slots, which stay home until the step is done. Up to `num_projected` of
  // the home blocks are projected from their inputs, as evenly over the passes as inputs are kept.
  void Fill(std::span<const PlannedSequence> streamed, std::int32_t num_projected, const Layout& host);

  // Queues one layer's attention of the streamed sequences on `stream`. `args` is that of a whole pass over the blocks
  // on the device; `device` is the copy of what Fill wrote.
  void Attend(Stream& stream, const Layout& device, const AttentionArgs& args);

  std::size_t buffer_bytes() const;
  Path path() const { return options_.path; }
  // Of home blocks, by the passes that were queued so far.
  std::int64_t read_bytes() const { return read_bytes_; }
  std::int64_t projected_blocks() const { return projected_blocks_; }  // by the steps that were queued so far

  // Of the steps that are done; measured where there is a projector.
  struct Times {
    TimedCopies::Sum strips;  // of keys and values
    TimedCopies::Sum inputs;
    double projected_flops = 0;
    double projecting_seconds = 0;
    double waiting_seconds = 0;  // of a step's stream for copies
  };
  const Times& times() const { return times_; }

 private:
  // Blocks of one pass that follow each other, all of them copied or all of them projected (then of one sequence).
  struct Span {
    std::int32_t first = 0;  // in the buffer
    std::int32_t count = 0;
    std::int32_t first_position = 0;
    std::size_t source = 0;  // of the first, in sources_
    bool is_projected = false;
  };

  // One that is read, one that is full, one that is filled: neither side waits for the other's last moment.
  static constexpr std::size_t kNumBuffers = 3;

  HomeReader(Device& device, const Options& options, std::unique_ptr<KvProjector> projector);
  bool ReadsInPlace(std::span<const PlannedSequence> streamed) const;
  std::size_t BlocksPerPass(std::size_t num_blocks, bool in_place) const;
  void AddBlock(const Sequence& sequence, std::int32_t block, std::int32_t index, bool is_projected);
  std::span<const Span> SpansOf(std::size_t pass) const;
  KvView Stage(Stream& stream, std::size_t pass, int layer, std::size_t buffer);
  std::shared_ptr<Event> CopyInputs(std::span<const Span> spans, int layer, std::size_t buffer);
  std::shared_ptr<Event> CopyStrips(std::span<const Span> spans, int layer, std::size_t buffer);
  void Project(Stream& stream, std::span<const Span> spans, int layer, std::size_t buffer);
  void AwaitCopies(Stream& stream, const std::shared_ptr<Event>& event);

  Device& device_;
  const Options options_;
  const std::unique_ptr<KvProjector> projector_;
  Buffer states_;
  Buffer staging_[kNumBuffers];
  Buffer input_staging_[kNumBuffers];
  Counts counts_;  // of the step, as all up to layer_read_bytes_
  bool in_place_ = false;
  std::vector<const std::byte*> sources_;  // of the home blocks, pass by pass
  std::vector<Span> spans_;                // pass by pass
  std::vector<std::size_t> span_begin_;    // [passes + 1] into spans_
  std::int64_t layer_read_bytes_ = 0;
  std::size_t next_buffer_ = 0;
  std::shared_ptr<Event> read_[kNumBuffers];  // when the last pass over each buffer is done
  std::int64_t read_bytes_ = 0;
  std::int64_t projected_blocks_ = 0;
  Times times_;                          // threads of streams
  double since_ = 0;                     // thread of the step's stream
  std::unique_ptr<TimedCopies> copies_;  // last: its destructor waits for work that writes the buffers
};

}  // namespace spillway
