#include "kernels/device.h"

#include <sched.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/stream.h"
#include "kernels/cpu/targets.h"
#include "kernels/cpu/worker_pool.h"
#include "kernels/kernels.h"
#include "kernels/reference.h"
#include "kernels/status_macros.h"

namespace spillway {
namespace cpu {
namespace {

int CoresOfThisProcess() {
  cpu_set_t cores;
  CPU_ZERO(&cores);
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

class CpuDevice final : public Device {
 public:
  CpuDevice(const CpuDeviceOptions& options, std::unique_ptr<WorkerPool> pool, std::unique_ptr<Kernels> kernels,
            std::string description)
      : options_(options),
        budget_(std::make_shared<MemoryBudget>(options.memory_bytes)),
        pool_(std::move(pool)),
        kernels_(std::move(kernels)),
        description_(std::move(description)) {}

  absl::StatusOr<Buffer> Allocate(MemoryKind kind, std::size_t size_bytes) override {
    return MapPages(size_bytes, kind == MemoryKind::kDevice ? budget_ : nullptr);
  }

  absl::StatusOr<std::unique_ptr<Stream>> NewStream() override {
    return std::make_unique<CpuStream>(*pool_, options_.before_item, options_.ignored_order);
  }

  const Kernels& kernels() const override { return *kernels_; }
  std::size_t free_bytes() const override { return budget_->free_bytes(); }
  HostKv host_kv() const override { return HostKv::kInPlace; }
  std::string description() const override { return description_; }

 private:
  const CpuDeviceOptions options_;
  const std::shared_ptr<MemoryBudget> budget_;
  const std::unique_ptr<WorkerPool> pool_;
  const std::unique_ptr<Kernels> kernels_;
  const std::string description_;
};

}  // namespace
}  // namespace cpu

absl::StatusOr<std::unique_ptr<Device>> MakeCpuDevice(const CpuDeviceOptions& options) {
  if (options.num_workers < 0) {
    return absl::InvalidArgumentError(absl::StrCat("cpu device: num_workers is ", options.num_workers));
  }
  auto pool =
      std::make_unique<cpu::WorkerPool>(options.num_workers > 0 ? options.num_workers : cpu::CoresOfThisProcess());
  if (options.target == "reference") {
    return std::make_unique<cpu::CpuDevice>(options, std::move(pool), MakeReferenceKernels(), "cpu reference");
  }
  ASSIGN_OR_RETURN(const cpu::Target target, cpu::ChooseTarget(options.target));
  ASSIGN_OR_RETURN(cpu::CpuKernels fast, cpu::MakeCpuKernels(target, options.gemm, *pool));
  return std::make_unique<cpu::CpuDevice>(options, std::move(pool), std::move(fast.kernels),
                                          absl::StrCat("cpu ", std::string(cpu::NameOf(target)), " ", fast.gemm));
}

}  // namespace spillway
