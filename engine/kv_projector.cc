#include "engine/kv_projector.h"

#include <algorithm>
#include <utility>

#include "kernels/arena.h"
#include "kernels/check.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace {

// So few that their product is still in the cache when it is rotated, so many that the weights are well used.
constexpr std::int64_t kRowsAtOnce = 256;

}  // namespace

KvProjector::KvProjector(Device& device, Options options) : device_(device), options_(std::move(options)) {}

absl::StatusOr<std::unique_ptr<KvProjector>> KvProjector::Make(Device& device, Options options) {
  std::unique_ptr<KvProjector> projector(new KvProjector(device, std::move(options)));
  const auto count = static_cast<std::size_t>(projector->options_.max_positions);
  const auto head_dim = static_cast<std::size_t>(projector->options_.head_dim);
  Arena size;
  size.Take<float>(count * head_dim);
  size.Take<std::int32_t>(count);
  size.Take<std::int32_t>(count);
  ASSIGN_OR_RETURN(projector->tables_, device.Allocate(MemoryKind::kDevice, size.used()));
  const auto width = static_cast<std::size_t>(projector->options_.weights.front()->rows());
  ASSIGN_OR_RETURN(projector->product_,
                   device.Allocate(MemoryKind::kDevice, std::size_t{kRowsAtOnce} * width * sizeof(float)));
  Arena arena(projector->tables_.get(), projector->tables_.size_bytes);
  auto* const cos_sin = arena.Take<float>(count * head_dim);
  auto* const positions = arena.Take<std::int32_t>(count);
  auto* const blocks = arena.Take<std::int32_t>(count);
  projector->cos_sin_ = cos_sin;
  projector->positions_ = positions;
  projector->blocks_ = blocks;

  const std::size_t index_bytes = count * sizeof(std::int32_t);
  ASSIGN_OR_RETURN(const Buffer staging, device.Allocate(MemoryKind::kPinnedHost, 2 * index_bytes));
  auto* const host = reinterpret_cast<std::int32_t*>(staging.get());
  for (std::size_t i = 0; i < count; ++i) {
    host[i] = static_cast<std::int32_t>(i);
    host[count + i] = static_cast<std::int32_t>(i / kBlockTokens);
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<Stream> stream, device.NewStream());
  stream->Copy(reinterpret_cast<std::byte*>(positions), staging.get(), index_bytes);
  stream->Copy(reinterpret_cast<std::byte*>(blocks), staging.get() + index_bytes, index_bytes);
  device.kernels().RopeAngles(*stream, {.positions = positions,
                                        .inverse_frequency = projector->options_.inverse_frequency,
                                        .num_tokens = projector->options_.max_positions,
                                        .half = projector->options_.head_dim / 2,
                                        .cos_sin = cos_sin});
  RETURN_IF_ERROR(stream->Record()->Await());
  return projector;
}

double KvProjector::flops_per_row() const {
  const PackedMatrix& weight = *options_.weights.front();
  return 2 * static_cast<double>(weight.rows()) * static_cast<double>(weight.cols());
}

void KvProjector::Project(Stream& stream, const Args& args) const {
  SPILLWAY_CHECK(args.first_position % kBlockTokens == 0);
  SPILLWAY_CHECK(args.first_position + args.num_rows <= options_.max_positions);
  const PackedMatrix& weight = *options_.weights[static_cast<std::size_t>(args.layer)];
  const std::int64_t row_bytes = weight.cols() * static_cast<std::int64_t>(SizeOf(options_.dtype));
  auto* const product = reinterpret_cast<float*>(product_.get());
  for (std::int64_t begin = 0; begin < args.num_rows; begin += kRowsAtOnce) {
    const std::int64_t count = std::min(kRowsAtOnce, args.num_rows - begin);
    device_.kernels().Gemm(stream, {.a = args.inputs + begin * row_bytes,
                                    .a_dtype = options_.dtype,
                                    .num_rows = count,
                                    .weight = &weight,
                                    .output = GemmOutput::kStore,
                                    .out = product});
    device_.kernels().RopeAppend(stream, {.qkv = product,
                                          .cos_sin = cos_sin_ + (args.first_position + begin) * options_.head_dim,
                                          .positions = positions_ + args.first_position + begin,
                                          .blocks = blocks_ + begin,
                                          .num_tokens = count,
                                          .num_heads = 0,  // no queries
                                          .layer = 0,
                                          .kv = args.kv,
                                          .q = nullptr,
                                          .q_dtype = options_.dtype});
  }
}

}  // namespace spillway
