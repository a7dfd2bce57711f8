#pragma once

// StepRunner: executes a StepPlan. It lays the step's metadata out in pinned host memory, sends it to the device in one
// copy, queues the forward pass and the sampling, and brings the results back. A step may be launched while the one
// before it runs, two at a time at most: it finds the tokens that were sampled on the device. Engine thread only, but
// for `done`, which runs on a device thread.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/home_reader.h"
#include "engine/input_writer.h"
#include "engine/model.h"
#include "engine/step_plan.h"
#include "kernels/arena.h"
#include "kernels/kernels.h"

namespace spillway {

class StepRunner {
 public:
  struct Limits {
    std::int32_t max_tokens = 0;
    std::int32_t max_sequences = 0;
    std::int32_t max_blocks_per_sequence = 0;
    std::int32_t max_banned_per_sequence = 0;
  };

  // Reserves the model's workspace. `device` and `model` outlive the runner. `home_reader`, `layer_loader`,
  // `input_writer`: null where no sequence has blocks at home; where none come up inside a step; where no layer inputs
  // are kept.
  static absl::StatusOr<std::unique_ptr<StepRunner>> Make(Device& device, Model& model, const Limits& limits,
                                                          std::unique_ptr<HomeReader> home_reader,
                                                          std::unique_ptr<LayerLoader> layer_loader,
                                                          std::unique_ptr<InputWriter> input_writer, bool hash_logits);

  struct Launched {
    std::span<const SampleResult> results;  // after `done`, until the next launch but one: per sampling sequence
    std::shared_ptr<Event> begin;           // times of the device: before the step's first kernel,
    std::shared_ptr<Event> end;             // and after its last
  };
  // Queues the step. Only `plan` and its sequences as they are now are read; their blocks stay held until it is done.
  // `kv` is the same in every call. `done` may only post to a mailbox.
  Launched Launch(const StepPlan& plan, const KvView& kv, std::function<void()> done);

  // Blocks until what was launched is done; start-up only.
  absl::Status Await() { return stream_->Record()->Await(); }

  // After done: whether the step succeeded.
  absl::Status status() const { return stream_->status(); }
  std::int64_t home_buffer_bytes() const {
    const std::size_t reading = home_reader_ ? home_reader_->buffer_bytes() : 0;
    return static_cast<std::int64_t>(reading + (input_writer_ ? input_writer_->buffer_bytes() : 0));
  }
  // Any thread: blocks that came up inside steps, and the seconds that took.
  std::int64_t loaded_blocks() const { return layer_loader_ ? layer_loader_->loaded_blocks() : 0; }
  double load_seconds() const { return layer_loader_ ? layer_loader_->seconds() : 0; }
  double load_stalled_seconds() const { return layer_loader_ ? layer_loader_->stalled_seconds() : 0; }
  std::int64_t streamed_bytes() const { return home_reader_ ? home_reader_->read_bytes() : 0; }
  std::int64_t projected_blocks() const { return home_reader_ ? home_reader_->projected_blocks() : 0; }
  // Of streamed steps, where layer inputs are kept.
  bool is_timing_streams() const { return input_writer_ != nullptr; }
  HomeReader::Times home_times() const { return home_reader_ ? home_reader_->times() : HomeReader::Times{}; }

 private:
  // The same layout on host and device.
  struct Layout {
    std::int32_t* tokens;
    std::int32_t* positions;
    std::int32_t* blocks;
    std::int32_t* query_begin;
    std::int32_t* first_position;
    std::int32_t* block_begin;
    std::int32_t* sampled_rows;
    std::int32_t* banned_begin;
    std::int32_t* banned;
    SampleRow* sample_rows;
    HomeReader::Layout home;
    std::int32_t* block_table;  // last: its size is no part of what a repeated step is
  };
  struct Counts {
    std::size_t tokens = 0;
    std::size_t sequences = 0;
    std::size_t blocks = 0;
    std::size_t sampled = 0;
    std::size_t banned = 0;
    HomeReader::Counts home;
  };

  StepRunner(Device& device, Model& model, const Limits& limits, std::unique_ptr<HomeReader> home_reader,
             std::unique_ptr<LayerLoader> layer_loader, std::unique_ptr<InputWriter> input_writer, bool hash_logits)
      : device_(device),
        model_(model),
        max_banned_per_sequence_(static_cast<std::size_t>(limits.max_banned_per_sequence)),
        hash_logits_(hash_logits),
        home_reader_(std::move(home_reader)),
        layer_loader_(std::move(layer_loader)),
        input_writer_(std::move(input_writer)) {}
  static Layout LayOut(Arena& arena, const Counts& counts);
  Counts CountsOf(const StepPlan& plan) const;
  Counts PaddedDecode(std::size_t num_sequences, std::size_t num_blocks) const;
  static void Fill(const StepPlan& plan, const Counts& counts, const Layout& host);
  static void FillPadding(const StepPlan& plan, const Counts& counts, const Layout& host);
  void QueueStep(const Counts& counts, const Layout& device, const KvView& kv, LayerLoader* layer_loader);

  Device& device_;
  Model& model_;
  const std::size_t max_banned_per_sequence_;
  const bool hash_logits_;
  const std::unique_ptr<HomeReader> home_reader_;
  const std::unique_ptr<LayerLoader> layer_loader_;
  const std::unique_ptr<InputWriter> input_writer_;
  struct HostSide {
    Buffer metadata;
    Buffer results;
  };
  HostSide host_sides_[2];  // of steps by turns
  int next_side_ = 0;
  Buffer device_metadata_;
  Buffer device_results_;
  std::unique_ptr<Stream> stream_;  // last: its destructor waits for work that reads the buffers
};

}  // namespace spillway
