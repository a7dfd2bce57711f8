#include "engine/link_share.h"

#include <algorithm>

#include "kernels/check.h"

namespace spillway {

void LinkShare::Add(Sequence& sequence) {
  Tenant& tenant = tenants_[sequence.request.tenant];
  if (tenant.waiting.empty()) tenant.granted = std::max(tenant.granted, virtual_now_);
  SPILLWAY_CHECK(tenant.waiting.insert(&sequence).second);
  ++size_;
}

void LinkShare::Remove(Sequence& sequence) {
  const auto tenant = tenants_.find(sequence.request.tenant);
  SPILLWAY_CHECK(tenant != tenants_.end() && tenant->second.waiting.erase(&sequence) == 1);
  --size_;
  if (tenant->second.waiting.empty() && tenant->second.granted <= virtual_now_) tenants_.erase(tenant);
}

Sequence* LinkShare::Next() const {
  const Tenant* next = nullptr;
  const auto is_earlier = [&](const Tenant& tenant) {
    if (tenant.granted != next->granted) return tenant.granted < next->granted;
    return FirstInRank()(*tenant.waiting.begin(), *next->waiting.begin());
  };
  for (const auto& [name, tenant] : tenants_) {
    if (!tenant.waiting.empty() && (next == nullptr || is_earlier(tenant))) next = &tenant;
  }
  return next == nullptr ? nullptr : *next->waiting.begin();
}

void LinkShare::Grant(const Sequence& sequence, std::int64_t bytes) {
  const auto num_waiting =
      std::ranges::count_if(tenants_, [](const auto& each) { return !each.second.waiting.empty(); });
  Tenant& tenant = tenants_[sequence.request.tenant];
  tenant.granted = std::max(tenant.granted, virtual_now_) + bytes;
  virtual_now_ += bytes / std::max<std::int64_t>(num_waiting, 1);
  absl::erase_if(tenants_,
                 [&](const auto& each) { return each.second.waiting.empty() && each.second.granted <= virtual_now_; });
}

void LinkShare::AppendTo(std::vector<Sequence*>& all) const {
  for (const auto& [name, tenant] : tenants_) all.insert(all.end(), tenant.waiting.begin(), tenant.waiting.end());
}

}  // namespace spillway
