#pragma once

// What the kernel tests share: a device with one stream, arrays of either dtype, random numbers.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/targets.h"
#include "kernels/device.h"
#include "kernels/element.h"
#include "kernels/kernels.h"

namespace spillway {

// How many random cases to try: under a sanitizer each costs many times as much, and one is as good as ten at finding a
// race or a stray access.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr int kEffort = 1;
#else
inline constexpr int kEffort = 10;
#endif

// "reference" and every SIMD target of this machine.
inline std::vector<std::string> AllTargets() {
  std::vector<std::string> names = {"reference"};
  for (const cpu::Target target : cpu::SupportedTargets()) names.emplace_back(NameOf(target));
  return names;
}
inline std::vector<std::string> FastTargets() {
  std::vector<std::string> names = AllTargets();
  names.erase(names.begin());
  return names;
}

// What every implementation computes with.
inline std::vector<DType> AllDTypes() { return {DType::kF32, DType::kBF16}; }

class Rig {
 public:
  explicit Rig(const std::string& target, int num_workers = 2, const std::string& gemm = "fma") {
    CpuDeviceOptions options;
    options.target = target;
    options.num_workers = num_workers;
    options.gemm = gemm;
    device_ = MakeCpuDevice(options).value();
    stream_ = device_->NewStream().value();
  }

  const Kernels& kernels() const { return device_->kernels(); }
  Device& device() { return *device_; }
  Stream& stream() { return *stream_; }
  void Finish() { ASSERT_TRUE(stream_->Record()->Await().ok()) << stream_->status(); }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
};

// Floats, stored as F32 or rounded, at an offset that breaks alignment.
class Array {
 public:
  Array(DType dtype, std::size_t size, std::size_t misaligned_elements = 0)
      : dtype_(dtype),
        size_(size),
        offset_(misaligned_elements * SizeOf(dtype)),
        bytes_(std::make_shared<std::vector<std::byte>>(size * SizeOf(dtype) + offset_)) {}
  Array(DType dtype, const std::vector<float>& values, std::size_t misaligned_elements = 0)
      : Array(dtype, values.size(), misaligned_elements) {
    for (std::size_t i = 0; i < size_; ++i) StoreElement(data(), dtype, static_cast<std::int64_t>(i), values[i]);
  }

  std::byte* data() const { return bytes_->data() + offset_; }
  DType dtype() const { return dtype_; }
  std::size_t size() const { return size_; }
  float at(std::size_t i) const { return LoadElement(data(), dtype_, static_cast<std::int64_t>(i)); }
  std::vector<float> Values() const {
    std::vector<float> values(size_);
    for (std::size_t i = 0; i < size_; ++i) values[i] = at(i);
    return values;
  }

 private:
  DType dtype_;
  std::size_t size_;
  std::size_t offset_;
  std::shared_ptr<std::vector<std::byte>> bytes_;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  float Normal(float scale = 1) { return scale * normal_(engine_); }
  std::vector<float> Normals(std::size_t size, float scale = 1) {
    std::vector<float> values(size);
    for (float& value : values) value = Normal(scale);
    return values;
  }
  std::int64_t Below(std::int64_t bound) {
    return static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(bound));
  }
  // Of [-scale, scale), the same on every machine: what the hash of their results is compared with is a constant.
  std::vector<float> Uniforms(std::size_t size, float scale = 1) {
    std::vector<float> values(size);
    for (float& value : values) value = scale * (2 * Uniform() - 1);
    return values;
  }
  float Uniform() { return static_cast<float>(engine_() >> 40) * 0x1p-24F; }
  std::mt19937_64& engine() { return engine_; }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<float> normal_;
};

// |a - b| <= tolerance * (1 + |b|), where b is the oracle.
inline void ExpectNear(const std::vector<float>& actual, const std::vector<float>& oracle, float tolerance,
                       const std::string& what) {
  ASSERT_EQ(actual.size(), oracle.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(actual[i] - oracle[i]), tolerance * (1 + std::abs(oracle[i])))
        << what << ": element " << i << " is " << actual[i] << ", should be " << oracle[i];
  }
}

// The norm of the error, relative to that of the oracle.
inline void ExpectNearByNorm(const std::vector<float>& actual, const std::vector<float>& oracle, double tolerance,
                             const std::string& what) {
  ASSERT_EQ(actual.size(), oracle.size()) << what;
  double error = 0;
  double norm = 0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_FALSE(std::isnan(actual[i])) << what << ": element " << i;
    error += (double{actual[i]} - oracle[i]) * (double{actual[i]} - oracle[i]);
    norm += double{oracle[i]} * oracle[i];
  }
  ASSERT_LE(std::sqrt(error), tolerance * std::sqrt(norm)) << what;
}

inline void ExpectSameBits(const std::vector<float>& actual, const std::vector<float>& expected,
                           const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(std::memcmp(&actual[i], &expected[i], sizeof(float)), 0)
        << what << ": element " << i << " is " << actual[i] << ", not " << expected[i];
  }
}

inline MatrixView ViewOf(const Array& array, std::int64_t rows, std::int64_t cols) {
  return {array.data(), array.dtype(), rows, cols, cols};
}

}  // namespace spillway
