#include "engine/input_writer.h"

#include <algorithm>
#include <utility>

#include "engine/sequence.h"
#include "kernels/status_macros.h"

namespace spillway {

absl::StatusOr<std::unique_ptr<InputWriter>> InputWriter::Make(Device& device, const Options& options) {
  std::unique_ptr<InputWriter> writer(new InputWriter(options));
  const std::size_t bytes = static_cast<std::size_t>(options.max_tokens) * options.layout.row_bytes();
  for (Buffer& buffer : writer->buffers_) {
    ASSIGN_OR_RETURN(buffer, device.Allocate(MemoryKind::kDevice, bytes));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Stream> stream, device.NewStream());
  writer->copies_ = std::make_unique<TimedCopies>(std::move(stream), *options.link, /*times=*/false);
  return writer;
}

void InputWriter::Fill(const StepPlan& plan) {
  spans_.clear();
  std::int64_t row = 0;
  for (const PlannedSequence& planned : plan.sequences) {
    const Sequence& sequence = *planned.sequence;
    const std::int32_t end = sequence.num_computed + sequence.num_planned;
    for (std::int32_t position = sequence.num_computed; position < end;) {
      const std::int32_t block = position / kBlockTokens;
      const std::int32_t count = std::min(end, (block + 1) * kBlockTokens) - position;
      if (sequence.HasInputs(block)) {
        std::byte* const bytes = sequence.inputs[static_cast<std::size_t>(block)].bytes;
        const auto index = static_cast<std::size_t>(position % kBlockTokens);
        spans_.push_back({.row = row, .count = count, .to = bytes + index * options_.layout.row_bytes()});
      }
      position += count;
      row += count;
    }
  }
}

void InputWriter::Write(Stream& stream, int layer, const std::byte* rows) {
  if (spans_.empty()) return;
  const std::size_t row_bytes = options_.layout.row_bytes();
  const std::size_t buffer = std::exchange(next_buffer_, 1 - next_buffer_);
  std::byte* const taken = buffers_[buffer].get();
  const auto offset = [&](std::int64_t row) { return static_cast<std::size_t>(row) * row_bytes; };
  const std::int64_t first = spans_.front().row;
  const std::int64_t end = spans_.back().row + spans_.back().count;
  if (written_[buffer]) stream.Wait(written_[buffer]);
  stream.Copy(taken + offset(first), rows + offset(first), offset(end - first));
  copies_->stream().Wait(stream.Record());
  copies_->Begin();
  std::int64_t num_rows = 0;
  for (const Span& span : spans_) {
    copies_->stream().Copy(span.to + static_cast<std::size_t>(layer) * options_.layout.strip_bytes(),
                           taken + offset(span.row), offset(span.count));
    num_rows += span.count;
  }
  copies_->End(spans_.size(), offset(num_rows), sum_);
  written_[buffer] = copies_->stream().Record();
}

void InputWriter::Join(Stream& stream) {
  if (!spans_.empty()) stream.Wait(written_[1 - next_buffer_]);
}

}  // namespace spillway
