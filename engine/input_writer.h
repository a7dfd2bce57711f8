#pragma once

// InputWriter: copies layer inputs of a step's rows into host slots, those of sequences that have them kept. Per layer
// the rows go into one of two buffers on the device, from which a stream of its own takes them down while the step goes
// on. Engine thread only; one step in flight at a time.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/input_layout.h"
#include "engine/step_plan.h"
#include "engine/timed_copies.h"
#include "kernels/device.h"
#include "kvstore/paced_link.h"

namespace spillway {

class InputWriter {
 public:
  struct Options {
    InputLayout layout;
    PacedLink* link = nullptr;    // outlives the writer; paces its copies
    std::int64_t max_tokens = 0;  // rows of a step
  };

  // `device` outlives the writer. Reserves everything.
  static absl::StatusOr<std::unique_ptr<InputWriter>> Make(Device& device, const Options& options);

  // Remembers where the step's rows go; their sequences keep the slots until the step is done.
  void Fill(const StepPlan& plan);
  bool empty() const { return spans_.empty(); }  // the step has none that are kept
  // `rows`: the layer's inputs of all rows of the step. They are taken by the time that later work on `stream` runs.
  void Write(Stream& stream, int layer, const std::byte* rows);
  // Later work on `stream` starts when everything is written.
  void Join(Stream& stream);

  std::size_t buffer_bytes() const { return buffers_[0].size_bytes + buffers_[1].size_bytes; }

 private:
  // Consecutive rows of one block.
  struct Span {
    std::int64_t row = 0;
    std::int64_t count = 0;
    std::byte* to = nullptr;  // of layer 0
  };

  explicit InputWriter(const Options& options) : options_(options) {}

  const Options options_;
  Buffer buffers_[2];
  std::vector<Span> spans_;  // of the step, by row
  std::size_t next_buffer_ = 0;
  std::shared_ptr<Event> written_[2];    // when each buffer may be filled again
  TimedCopies::Sum sum_;                 // thread of copies_
  std::unique_ptr<TimedCopies> copies_;  // last: its destructor waits for work that reads the buffers
};

}  // namespace spillway
