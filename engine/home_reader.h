#pragma once

// HomeReader: attention of a step's streamed sequences, those whose first blocks are at home only. Passes over the home
// blocks build partial states, and a last one merges the blocks that the device holds.
//
//   in place  kernels read the host tier's slots where they are, all in one pass per layer
//   staged    a stream of its own copies the layer's strips, some blocks at a time, into one of three buffers on the
//             device, while the passes before are computed from the others; the next layer's strips follow without a
//             gap
//
// The bits are those of attention over blocks that are all on the device. Everything is reserved by Make. Engine thread
// only; one step in flight at a time.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/step_plan.h"
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
  };

  // `device` outlives the reader.
  static absl::StatusOr<std::unique_ptr<HomeReader>> Make(Device& device, const Options& options);

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

  // Writes the host arrays and remembers the slots, which stay home until the step is done.
  void Fill(std::span<const PlannedSequence> streamed, const Layout& host);

  // Queues one layer's attention of the streamed sequences on `stream`. `args` is that of a whole pass over the blocks
  // on the device; `device` is the copy of what Fill wrote.
  void Attend(Stream& stream, const Layout& device, const AttentionArgs& args);

  std::size_t buffer_bytes() const { return states_.size_bytes + kNumBuffers * staging_[0].size_bytes; }
  Path path() const { return options_.path; }
  // Of home blocks, by the passes that were queued so far.
  std::int64_t read_bytes() const { return read_bytes_; }

 private:
  // One that is read, one that is full, one that is filled: neither side waits for the other's last moment.
  static constexpr std::size_t kNumBuffers = 3;

  HomeReader(Device& device, const Options& options) : device_(device), options_(options) {}
  bool ReadsInPlace(std::span<const PlannedSequence> streamed) const;
  std::size_t PassesOver(std::size_t num_blocks, bool in_place) const;
  KvView Stage(Stream& stream, std::size_t pass, int layer, std::size_t buffer);

  Device& device_;
  const Options options_;
  Buffer states_;
  Buffer staging_[kNumBuffers];
  Counts counts_;                          // of the step
  bool in_place_ = false;                  // of the step
  std::vector<const std::byte*> sources_;  // the step's home blocks, pass by pass
  std::size_t next_buffer_ = 0;
  std::shared_ptr<Event> read_[kNumBuffers];  // when the last pass over each buffer is done
  std::int64_t read_bytes_ = 0;
  double copying_since_ = 0;        // thread of copies_; 0: once the buffer is free
  std::unique_ptr<Stream> copies_;  // last: its destructor waits for work that writes the buffers
};

}  // namespace spillway
