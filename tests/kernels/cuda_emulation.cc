#include "tests/kernels/cuda_emulation.h"

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/check.h"

// Saves the callee-saved registers on the stack, the stack's top in *from, and goes on where `to` was left.
extern "C" void SpillwaySwitchFiber(void** from, void* to);
asm(R"(
.text
.globl SpillwaySwitchFiber
SpillwaySwitchFiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace spillway::emulation {

Place place;

namespace {

constexpr std::size_t kStackBytes = std::size_t{256} << 10;
constexpr std::size_t kMaxSharedBytes = std::size_t{227} << 10;
constexpr std::size_t kSharedAlignment = 1024;
constexpr std::size_t kFreeSharedBytes = std::size_t{48} << 10;

struct PendingCopy {
  std::byte* to;
  const std::byte* from;  // null: zeros
  int num_bytes;
};

// By the copy engine, in pieces of 16 bytes.
struct BulkCopy {
  Barrier* barrier;
  std::vector<PendingCopy> pieces;
};

struct Fiber {
  std::unique_ptr<std::byte[]> stack;
  void* top = nullptr;
  bool is_done = false;
  int group = 0;                                   // the copy group now being filled
  std::deque<std::pair<int, PendingCopy>> copies;  // (group, copy), in order
};

// Lanes of one warp and mask that have come together.
struct Gathering {
  unsigned warp = 0;
  unsigned mask = 0;
  int arrived = 0;
  int left = 0;
  std::byte slots[32][32] = {};
};

struct Machine {
  std::mutex launch;  // one grid at a time
  std::vector<Fiber> fibers;
  std::deque<Gathering> gatherings;  // stable addresses; reused once everyone has left
  std::deque<BulkCopy> bulk_copies;  // that nothing has waited for yet
  std::vector<std::byte> shared;
  std::map<const void*, std::size_t> allowed_shared;
  void* scheduler = nullptr;
  unsigned current = 0;
  unsigned num_threads = 0;
  unsigned num_live = 0;
  unsigned barrier_arrived = 0;
  std::uint64_t barrier_round = 0;
  std::uint64_t progress = 0;
  std::uint64_t num_launches = 0;
  bool is_lazy = false;  // copies as late as allowed
  const std::function<void()>* thread = nullptr;
};
Machine machine;

Fiber& Current() { return machine.fibers[machine.current]; }

void Yield() { SpillwaySwitchFiber(&Current().top, machine.scheduler); }

void RunFiber() {
  (*machine.thread)();
  Current().is_done = true;
  ++machine.progress;
  Yield();
  SPILLWAY_CHECK(false) << "a finished fiber ran";
}

void Prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = std::make_unique<std::byte[]>(kStackBytes);
  fiber.is_done = false;
  fiber.group = 0;
  fiber.copies.clear();
  // As if RunFiber had just been called: 16-byte aligned plus a return address, below it six saved registers.
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.get() + kStackBytes) / 16 * 16 - 8;
  auto* words = reinterpret_cast<void**>(top);
  *--words = reinterpret_cast<void*>(&RunFiber);
  for (int i = 0; i < 6; ++i) *--words = nullptr;
  fiber.top = words;
}

void RunBlock(unsigned num_threads) {
  machine.num_live = num_threads;
  machine.barrier_arrived = 0;
  machine.gatherings.clear();
  std::ranges::fill(machine.shared, std::byte{0xff});  // NaN
  for (unsigned t = 0; t < num_threads; ++t) Prepare(machine.fibers[t]);
  const bool is_reversed = machine.num_launches % 2 == 1;
  std::uint64_t seen = machine.progress;
  int idle_rounds = 0;
  while (machine.num_live > 0) {
    for (unsigned i = 0; i < num_threads; ++i) {
      const unsigned t = is_reversed ? num_threads - 1 - i : i;
      Fiber& fiber = machine.fibers[t];
      if (fiber.is_done) continue;
      machine.current = t;
      place.thread = {t, 0, 0};
      SpillwaySwitchFiber(&machine.scheduler, fiber.top);
      if (fiber.is_done) --machine.num_live;
    }
    idle_rounds = machine.progress == seen ? idle_rounds + 1 : 0;
    seen = machine.progress;
    SPILLWAY_CHECK(idle_rounds < 4) << "threads wait for each other: a divergent barrier or warp operation";
  }
  SPILLWAY_CHECK(machine.bulk_copies.empty()) << "a block ended before its copies";
}

}  // namespace

cudaError_t RunGrid(const void* kernel, unsigned num_ctas, unsigned num_threads, std::size_t shared_bytes,
                    const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(machine.launch);
  const auto allowed = machine.allowed_shared.find(kernel);
  const std::size_t limit = allowed == machine.allowed_shared.end() ? kFreeSharedBytes : allowed->second;
  if (num_ctas == 0 || num_threads == 0 || num_threads > 1024 || shared_bytes > std::max(limit, kFreeSharedBytes)) {
    return cudaErrorInvalidConfiguration;
  }
  ++machine.num_launches;
  machine.is_lazy = machine.num_launches % 4 < 2;
  machine.thread = &thread;
  machine.num_threads = num_threads;
  machine.shared.resize(shared_bytes + kSharedAlignment);
  if (machine.fibers.size() < num_threads) machine.fibers.resize(num_threads);
  place.block_size = dim3(num_threads);
  place.grid_size = dim3(num_ctas);
  for (unsigned block = 0; block < num_ctas; ++block) {
    place.block = {block, 0, 0};
    RunBlock(num_threads);
  }
  return cudaSuccess;
}

void AllowShared(const void* kernel, std::size_t size_bytes) {
  SPILLWAY_CHECK(size_bytes <= kMaxSharedBytes) << size_bytes << " bytes of shared memory";
  machine.allowed_shared[kernel] = size_bytes;
}

std::byte* SharedMemory() {
  const auto address = reinterpret_cast<std::uintptr_t>(machine.shared.data());
  return machine.shared.data() + ((address + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment - address);
}

unsigned Lane() { return machine.current % 32; }

void SyncBlock() {
  const std::uint64_t round = machine.barrier_round;
  ++machine.barrier_arrived;
  ++machine.progress;
  while (machine.barrier_round == round) {
    // Threads that have returned are not waited for.
    if (machine.barrier_arrived == machine.num_live) {
      machine.barrier_arrived = 0;
      ++machine.barrier_round;
      ++machine.progress;
      return;
    }
    Yield();
  }
}

bool IsLazy() { return machine.is_lazy; }

Meeting::Meeting(unsigned mask, const void* value, std::size_t size) : index_(-1) {
  const unsigned warp = machine.current / 32;
  const unsigned lane = Lane();
  SPILLWAY_CHECK((mask >> lane & 1U) != 0 && size <= 32) << "lane " << lane << " is not in mask " << mask;
  const unsigned live = machine.num_threads - warp * 32 >= 32 ? ~0U : (1U << (machine.num_threads - warp * 32)) - 1;
  const int expected = __builtin_popcount(mask & live);
  while (true) {
    int free = -1;
    index_ = -1;
    bool is_leaving = false;
    for (int i = 0; i < static_cast<int>(machine.gatherings.size()); ++i) {
      Gathering& each = machine.gatherings[static_cast<std::size_t>(i)];
      if (each.mask == 0) free = i;
      if (each.mask != mask || each.warp != warp) continue;
      if (each.arrived < expected) {
        index_ = i;
      } else {
        is_leaving = true;
      }
    }
    if (!is_leaving) {
      if (index_ < 0 && free < 0) {
        free = static_cast<int>(machine.gatherings.size());
        machine.gatherings.emplace_back();
      }
      if (index_ < 0) index_ = free;
      break;
    }
    Yield();
  }
  Gathering& mine = machine.gatherings[static_cast<std::size_t>(index_)];
  mine.warp = warp;
  mine.mask = mask;
  std::memcpy(mine.slots[lane], value, size);
  ++mine.arrived;
  ++machine.progress;
  while (mine.arrived < expected) Yield();
}

Meeting::~Meeting() {
  Gathering& mine = machine.gatherings[static_cast<std::size_t>(index_)];
  ++machine.progress;
  if (++mine.left == mine.arrived) {
    mine.mask = 0;
    mine.arrived = 0;
    mine.left = 0;
  }
}

const std::byte* Meeting::Slot(unsigned lane) const {
  return machine.gatherings[static_cast<std::size_t>(index_)].slots[lane];
}

namespace {

void Perform(const PendingCopy& copy) {
  if (copy.from != nullptr) {
    std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.num_bytes));
  } else {
    std::memset(copy.to, 0, static_cast<std::size_t>(copy.num_bytes));
  }
}

}  // namespace

void CopyAsync(std::byte* to, const std::byte* from, int num_bytes, bool is_valid) {
  const auto size = static_cast<std::uintptr_t>(num_bytes);
  SPILLWAY_CHECK(reinterpret_cast<std::uintptr_t>(to) % size == 0 && reinterpret_cast<std::uintptr_t>(from) % size == 0)
      << "a misaligned asynchronous copy";
  const PendingCopy copy = {to, is_valid ? from : nullptr, num_bytes};
  if (machine.is_lazy) {
    Current().copies.emplace_back(Current().group, copy);
  } else {
    Perform(copy);
  }
}

void CommitCopies() { ++Current().group; }

void AwaitCopies(int pending) {
  Fiber& fiber = Current();
  while (!fiber.copies.empty() && fiber.copies.front().first < fiber.group - pending) {
    Perform(fiber.copies.front().second);
    fiber.copies.pop_front();
  }
}

namespace {

constexpr int kRank = 4;
// What EncodeTiled writes.
struct Map {
  const std::byte* address;
  cuuint64_t strides[kRank];  // bytes
  cuuint32_t box[kRank];
  cuuint32_t dims[kRank];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

void EndPhaseIfOver(Barrier& barrier) {
  if (barrier.missing_arrivals > 0 || barrier.missing_bytes != 0) return;
  barrier.missing_arrivals = barrier.num_arrivals;
  barrier.parity ^= 1U;
  ++machine.progress;
}

void Perform(const BulkCopy& copy) {
  for (const PendingCopy& piece : copy.pieces) Perform(piece);
  copy.barrier->missing_bytes -= static_cast<int>(copy.pieces.size() * 16);
  EndPhaseIfOver(*copy.barrier);
}

void Queue(BulkCopy copy) {
  SPILLWAY_CHECK(copy.barrier->is_set_up == 1) << "a copy that tells a barrier which is not set up";
  if (machine.is_lazy) {
    machine.bulk_copies.push_back(std::move(copy));
  } else {
    Perform(copy);
  }
}

}  // namespace

void InitBarrier(Barrier& barrier, int num_arrivals) {
  const auto number = static_cast<std::uint8_t>(num_arrivals);
  barrier = {0, number, number, 0, 1};
}

void Arrive(Barrier& barrier, int num_bytes) {
  SPILLWAY_CHECK(barrier.is_set_up == 1 && barrier.missing_arrivals > 0) << "one arrival too many";
  barrier.missing_bytes += num_bytes;
  --barrier.missing_arrivals;
  ++machine.progress;
  EndPhaseIfOver(barrier);
}

void AwaitPhase(Barrier& barrier, int parity) {
  SPILLWAY_CHECK(barrier.is_set_up == 1) << "a barrier that is not set up";
  while (barrier.parity == parity) {
    // The last that was queued comes first: copies have no order.
    const auto is_awaited = [&](const BulkCopy& copy) { return copy.barrier == &barrier; };
    const auto last = std::find_if(machine.bulk_copies.rbegin(), machine.bulk_copies.rend(), is_awaited);
    if (last == machine.bulk_copies.rend()) {
      Yield();
      continue;
    }
    const BulkCopy copy = std::move(*last);
    machine.bulk_copies.erase(std::next(last).base());
    Perform(copy);
  }
}

void CopyBulk(std::byte* to, const std::byte* from, int num_bytes, Barrier& barrier) {
  SPILLWAY_CHECK(reinterpret_cast<std::uintptr_t>(to) % 16 == 0 && reinterpret_cast<std::uintptr_t>(from) % 16 == 0 &&
                 num_bytes % 16 == 0)
      << "a misaligned bulk copy";
  BulkCopy copy = {&barrier, {}};
  for (int i = 0; i < num_bytes; i += 16) copy.pieces.push_back({to + i, from + i, 16});
  Queue(std::move(copy));
}

void CopyBox(std::byte* to, const CUtensorMap& map, const int (&at)[4], Barrier& barrier) {
  Map encoded;
  std::memcpy(&encoded, &map, sizeof(encoded));
  SPILLWAY_CHECK(reinterpret_cast<std::uintptr_t>(to) % kSharedAlignment == 0) << "a misaligned box";
  BulkCopy copy = {&barrier, {}};
  const std::size_t num_rows = std::size_t{encoded.box[1]} * encoded.box[2] * encoded.box[3];
  for (std::size_t row = 0; row < num_rows; ++row) {
    const std::size_t index[kRank] = {0, row % encoded.box[1], row / encoded.box[1] % encoded.box[2],
                                      row / encoded.box[1] / encoded.box[2]};
    bool is_inside = true;
    const std::byte* from = encoded.address + static_cast<std::size_t>(at[0]) * encoded.strides[0];
    for (int d = 1; d < kRank; ++d) {
      const std::size_t coordinate = index[d] + static_cast<std::size_t>(at[d]);
      is_inside = is_inside && coordinate < encoded.dims[d];
      from += coordinate * encoded.strides[d];
    }
    for (std::size_t piece = 0; piece < 8; ++piece) {
      copy.pieces.push_back({to + row * 128 + (piece ^ (row & 7)) * 16, is_inside ? from + piece * 16 : nullptr, 16});
    }
  }
  Queue(std::move(copy));
}

CUresult EncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                     const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                     CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion /*promotion*/,
                     CUtensorMapFloatOOBfill /*fill*/) {
  if (rank != kRank || type != CU_TENSOR_MAP_DATA_TYPE_UINT16 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] != 64 || reinterpret_cast<std::uintptr_t>(address) % 16 != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  Map encoded = {static_cast<const std::byte*>(address), {2}, {}, {}};
  for (int d = 0; d < kRank; ++d) {
    if (d > 0) encoded.strides[d] = strides[d - 1];
    if (dims[d] == 0 || box[d] == 0 || box[d] > 256 || steps[d] != 1 || (d > 0 && encoded.strides[d] % 16 != 0)) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    encoded.box[d] = box[d];
    encoded.dims[d] = static_cast<cuuint32_t>(dims[d]);
  }
  *map = {};
  std::memcpy(map, &encoded, sizeof(encoded));
  return CUDA_SUCCESS;
}

}  // namespace spillway::emulation
