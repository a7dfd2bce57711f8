#pragma once

// BlockPool: the fixed block slots of one tier. It owns ids and their counts, not the memory.
//
// Every block is in exactly one state:
//   free   nobody holds it and its content means nothing
//   held   at least one BlockRef
//   cold   no BlockRef, but its content is retained: findable by the index until it is taken again; in order of release
//
// One thread at a time.

#include <cstdint>
#include <optional>
#include <vector>

namespace spillway {

enum class BlockId : std::uint32_t {};

class BlockPool;

// A hold on one block: move-only, dropping it releases. Sharing is spelled out.
class BlockRef {
 public:
  BlockRef() = default;
  BlockRef(BlockRef&& other) noexcept;
  BlockRef& operator=(BlockRef&& other) noexcept;
  BlockRef(const BlockRef&) = delete;
  BlockRef& operator=(const BlockRef&) = delete;
  ~BlockRef();

  BlockRef Share() const;
  BlockId id() const { return id_; }
  explicit operator bool() const { return pool_ != nullptr; }

 private:
  friend class BlockPool;
  BlockRef(BlockPool* pool, BlockId id) : pool_(pool), id_(id) {}

  BlockPool* pool_ = nullptr;
  BlockId id_{};
};

class BlockPool {
 public:
  explicit BlockPool(std::uint32_t num_blocks);
  ~BlockPool();  // CHECKs that no block is held
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  std::optional<BlockRef> Take();  // a free block, never a cold one
  BlockRef Share(BlockId id);      // of a held or cold block, which becomes held

  void Retain(BlockId id);  // held: turns cold instead of free when released
  void Forget(BlockId id);  // retained and cold: becomes free. Retained and held: becomes free when released

  std::optional<BlockId> OldestCold() const;  // least recently released

  std::uint32_t num_blocks() const { return static_cast<std::uint32_t>(slots_.size()); }
  std::uint32_t num_free() const { return num_free_; }
  std::uint32_t num_cold() const { return num_cold_; }
  std::uint32_t num_held() const { return num_blocks() - num_free() - num_cold_; }
  std::uint32_t refs(BlockId id) const { return slot(id).refs; }
  bool is_retained(BlockId id) const { return slot(id).retained; }

  std::size_t memory_bytes() const { return slots_.capacity() * sizeof(Slot); }

  void CheckInvariants() const;

 private:
  friend class BlockRef;
  static constexpr std::uint32_t kNone = ~0U;

  struct Slot {
    std::uint32_t refs = 0;
    bool retained = false;
    std::uint32_t colder = kNone;  // neighbours in the cold list, oldest first
    std::uint32_t warmer = kNone;  // of a free block: the next free one
  };

  Slot& slot(BlockId id) { return slots_[static_cast<std::uint32_t>(id)]; }
  const Slot& slot(BlockId id) const { return slots_[static_cast<std::uint32_t>(id)]; }
  void Release(BlockId id);
  void PushFree(std::uint32_t index);
  void PushCold(std::uint32_t index);
  void UnlinkCold(std::uint32_t index);

  std::vector<Slot> slots_;
  std::uint32_t first_free_ = kNone;  // last in, first out
  std::uint32_t num_free_ = 0;
  std::uint32_t oldest_ = kNone;
  std::uint32_t newest_ = kNone;
  std::uint32_t num_cold_ = 0;
};

}  // namespace spillway
