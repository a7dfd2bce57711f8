#pragma once

// Device: one place that has memory and can compute. Stream: a strict FIFO of copies and kernels on it.
// Event: a point in a stream. The cpu device is a real one: its streams run on their own threads and its
// memory is a bounded arena, so that ordering bugs and exhaustion show without a GPU.
//
// Errors of queued work are sticky: the stream keeps the first one, later work on it is skipped, and
// Stream::status() tells. Queueing itself therefore returns nothing.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace spillway {

class Kernels;

enum class MemoryKind : std::uint8_t { kDevice, kPinnedHost };

// Memory that frees itself with its last owner. 64-byte aligned or better; zero-filled when allocated.
struct Buffer {
  std::shared_ptr<std::byte> data;
  std::size_t size_bytes = 0;

  std::byte* get() const { return data.get(); }
};

// "All that was queued before Record() is done." Any thread.
class Event {
 public:
  virtual ~Event() = default;
  virtual bool Ready() const = 0;
  virtual absl::Status Await() = 0;  // blocks; tests, start-up and shutdown only
  // Seconds of the device's clock from `earlier`, of any of its streams, to this one; both are ready, and from
  // Stream::RecordTime. 0 where the device has failed.
  virtual double SecondsSince(const Event& earlier) const = 0;
};

// Queue calls come from one thread at a time; status() from any.
class Stream {
 public:
  virtual ~Stream() = default;  // waits for what is queued
  // The caller keeps both spans alive until an event recorded later is ready.
  virtual void Copy(std::byte* to, const std::byte* from, std::size_t size_bytes) = 0;
  // from[i][offset, offset + size_bytes) goes to `to` + i * size_bytes, for every i. `from` itself stays alive as well.
  virtual void Gather(std::byte* to, std::span<const std::byte* const> from, std::size_t offset,
                      std::size_t size_bytes) = 0;
  virtual std::shared_ptr<Event> Record() = 0;
  virtual std::shared_ptr<Event> RecordTime() = 0;  // as Record; the event also knows when it was reached
  // Later work on this stream starts after `event`; the calling thread does not block.
  virtual void Wait(const std::shared_ptr<Event>& event) = 0;
  // What is queued from Hold to the Resume that ends it begins with that Resume: where a stream is a thread, this one
  // is woken once, and finds all of it. Copies queued one after the other in between may be done in any order: none
  // touches what another writes.
  virtual void Hold() {}
  virtual void Resume() {}
  // Runs `reached` on a device thread once all work queued before is done (or was skipped after an error).
  // It may only post to a mailbox, pace the stream's copies, or note the time.
  virtual void Notify(std::function<void()> reached) = 0;
  // Calls `queue`, which queues work on this stream: kernels, copies, and Wait and Record to fork to other streams and
  // join them again. All calls with one key queue the same work with the same arguments, only what the arguments point
  // to differs; so a device may repeat what it recorded, without calling `queue`.
  virtual void Repeat(std::uint64_t /*key*/, const std::function<void()>& queue) { queue(); }
  virtual absl::Status status() const = 0;
};

// How kernels read KV that is in pinned host memory, where it is.
enum class HostKv : std::uint8_t {
  kByLink,   // at the link's speed: right where every key is read once, as by one new token
  kInPlace,  // as fast as device memory
};

// Owned by main, outlives everything made from it. Any thread.
class Device {
 public:
  virtual ~Device() = default;
  // Start-up only. RESOURCE_EXHAUSTED names what was asked for and what is left.
  virtual absl::StatusOr<Buffer> Allocate(MemoryKind kind, std::size_t size_bytes) = 0;
  virtual absl::StatusOr<std::unique_ptr<Stream>> NewStream() = 0;
  virtual const Kernels& kernels() const = 0;
  virtual std::size_t free_bytes() const = 0;  // what is left of the device's memory
  virtual HostKv host_kv() const = 0;
  // How many rows a step of num_rows decoding sequences is best padded to, so that Stream::Repeat meets few keys.
  virtual std::int64_t PaddedRows(std::int64_t num_rows) const { return num_rows; }
  // Device, SIMD target and GEMM path, for logs and for the compute id of cache keys: "cpu avx512 amx-gemm".
  virtual std::string description() const = 0;
};

enum class IgnoredOrder : std::uint8_t { kNone, kWait, kWaitAndNotify };

struct CpuDeviceOptions {
  // Threads that compute, the stream's own included. 0: the cores this process may run on.
  int num_workers = 0;
  // Bound of MemoryKind::kDevice. 0: unbounded.
  std::size_t memory_bytes = 0;
  // "auto", "reference" (plain loops, double accumulation) or a SIMD target: "avx2", "avx512",
  // "avx512_bf16", "amx", "neon", "scalar".
  // INVALID_ARGUMENT if this machine lacks it; the message lists those it has.
  std::string target = "auto";
  // How BF16 is multiplied: "amx", "avx512_bf16" (AVX512_BF16), "fma" (the same bits on every target), or "auto": the
  // first of these that the target and this machine have. INVALID_ARGUMENT if it lacks the one that is named.
  std::string gemm = "auto";
  // Fault injection for tests: runs on the stream's thread before every queued item; may block.
  std::function<void()> before_item;
  // Fault injection for tests: what does not wait. What a removed event wait looks like.
  IgnoredOrder ignored_order = IgnoredOrder::kNone;
};

absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice(const CpuDeviceOptions& options);

struct CudaDeviceOptions {
  int index = 0;  // as CUDA counts them
  // The slab that MemoryKind::kDevice and the weights come from. 0: what gpu_memory_utilization leaves.
  std::size_t memory_bytes = 0;
  double gpu_memory_utilization = 0.9;  // (0, 1]: share of all device memory, what others hold included
  // One GEMM algorithm per (N, K) whatever the number of rows, one attention kernel for prefill and decode: a row's
  // bits then depend on that row alone. Without it, compute capability 9.0 has a faster kernel for prefill.
  bool batch_invariant = false;
  // Repeated work is queued anew each time, not replayed from a CUDA graph.
  bool enforce_eager = false;
  // "auto" (SPILLWAY_CUBLASLT, the loader's places, the toolkit), a path to libcublasLt, or "none": our own slow GEMM.
  std::string cublaslt = "auto";
  // Partial states of long sequences, per stream that runs attention, outside the slab. Less only costs speed.
  std::size_t attention_workspace_bytes = std::size_t{128} << 20;
};

// UNAVAILABLE: no CUDA device, or no driver. UNIMPLEMENTED: built without CUDA; names the option that builds it.
absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(const CudaDeviceOptions& options);

}  // namespace spillway
