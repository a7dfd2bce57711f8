#pragma once

// A closure in a fixed place: queueing one does not allocate.

#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>

namespace spillway::cpu {

// Move-only. Holds any closure of up to kCapacity bytes that is called without arguments and returns nothing; larger
// ones do not compile.
class WorkItem {
 public:
  static constexpr std::size_t kCapacity = 240;

  template <typename Closure>
  requires(!std::is_same_v<std::remove_cvref_t<Closure>, WorkItem>) explicit WorkItem(Closure&& closure)
      : operations_(&kOperationsOf<std::remove_cvref_t<Closure>>) {
    using Stored = std::remove_cvref_t<Closure>;
    static_assert(sizeof(Stored) <= kCapacity && alignof(Stored) <= alignof(std::max_align_t));
    static_assert(std::is_nothrow_move_constructible_v<Stored>);
    new (storage_) Stored(std::forward<Closure>(closure));
  }
  WorkItem(WorkItem&& other) noexcept : operations_(other.operations_) { operations_->move(other.storage_, storage_); }
  WorkItem& operator=(WorkItem&&) = delete;
  ~WorkItem() { operations_->destroy(storage_); }

  void operator()() { operations_->call(storage_); }

 private:
  struct Operations {
    void (*call)(std::byte*);
    void (*move)(std::byte* from, std::byte* to);  // `from` is still to be destroyed
    void (*destroy)(std::byte*);
  };
  template <typename Stored>
  static constexpr Operations kOperationsOf = {
      [](std::byte* at) { (*reinterpret_cast<Stored*>(at))(); },
      [](std::byte* from, std::byte* to) { new (to) Stored(std::move(*reinterpret_cast<Stored*>(from))); },
      [](std::byte* at) { reinterpret_cast<Stored*>(at)->~Stored(); }};

  const Operations* operations_;
  alignas(std::max_align_t) std::byte storage_[kCapacity];
};

}  // namespace spillway::cpu
