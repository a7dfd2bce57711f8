#pragma once

// LinkShare: sequences that wait for their turn on the link, by tenant. The next turn is that of the tenant whose
// sequences were granted the fewest bytes, within a tenant that of the first in rank. A tenant that comes, or comes
// back, begins at the even share granted so far: it has saved up nothing, and it passes those who wait by no more than
// what they had ahead of that share. Engine thread only.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/btree_set.h"
#include "engine/sequence.h"

namespace spillway {

class LinkShare {
 public:
  void Add(Sequence& sequence);     // one that is not here
  void Remove(Sequence& sequence);  // one that is here
  // Whose turn it is; null: nobody waits. Stays the same until Grant, Add or Remove.
  Sequence* Next() const;
  // `sequence` is to load so many bytes: its tenant pays for them.
  void Grant(const Sequence& sequence, std::int64_t bytes);

  std::size_t size() const { return size_; }
  void AppendTo(std::vector<Sequence*>& all) const;

 private:
  struct Tenant {
    std::int64_t granted = 0;  // bytes, from virtual_now_ at its first sequence on
    absl::btree_set<Sequence*, FirstInRank> waiting;
  };

  absl::btree_map<std::string, Tenant> tenants_;  // those with waiting sequences, and those ahead of virtual_now_
  std::int64_t virtual_now_ = 0;                  // bytes that an even share has been granted since start
  std::size_t size_ = 0;
};

}  // namespace spillway
