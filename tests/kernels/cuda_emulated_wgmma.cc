#include "tests/kernels/cuda_emulated_wgmma.h"

#include <cstring>
#include <deque>
#include <map>
#include <utility>

#include "tests/kernels/cuda_emulation.h"

namespace spillway::emulation {

namespace {

struct Products {
  int group = 0;                                   // the one now being filled
  std::deque<std::pair<int, Product>> unfinished;  // (group, product), in order
};

std::map<unsigned, Products> products_of;  // by thread; a finished block leaves none

// Bits 7 to 9 of an address are exchanged into bits 4 to 6.
std::uint32_t Swizzled(std::uint32_t address) { return address ^ (address >> 7 & 7U) << 4; }

std::byte* AtAddress(std::uint32_t address) { return SharedMemory() + address; }

float ElementAt(DType type, std::uint32_t address) {
  std::uint16_t bits;
  std::memcpy(&bits, AtAddress(Swizzled(address)), sizeof(bits));
  return type == DType::kBF16 ? FloatFromBF16(bits) : FloatFromF16(bits);
}

struct Matrix {
  std::uint32_t first;
  std::uint32_t next_columns;
  std::uint32_t next_rows;

  explicit Matrix(std::uint64_t description)
      : first(static_cast<std::uint32_t>(description & 0x3fffU) << 4),
        next_columns(static_cast<std::uint32_t>(description >> 16 & 0x3fffU) << 4),
        next_rows(static_cast<std::uint32_t>(description >> 32 & 0x3fffU) << 4) {}
  std::uint32_t At(std::uint32_t row, std::uint32_t column) const {
    return first + row / 8 * next_rows + row % 8 * 128 + column / 64 * next_columns + column % 64 * 2;
  }
};

void Perform(const Product& product) {
  const unsigned lane = Lane();
  const std::uint32_t row = place.thread.x / 32 % 4 * 16 + lane / 4;
  float a[2][16];
  if (product.a_registers == nullptr) {
    for (std::uint32_t r = 0; r < 2; ++r) {
      for (std::uint32_t k = 0; k < 16; ++k) a[r][k] = ElementAt(product.type, Matrix(product.a).At(row + r * 8, k));
    }
  } else {
    struct Words {
      std::uint32_t v[4];
    } mine;
    std::memcpy(&mine, product.a_registers, sizeof(mine));
    const Meeting meeting(0xffffffffU, &mine, sizeof(mine));
    for (unsigned r = 0; r < 2; ++r) {
      for (unsigned k = 0; k < 16; ++k) {
        const std::uint32_t word = meeting.Of<Words>(lane / 4 * 4 + k % 8 / 2).v[r + k / 8 * 2];
        const auto bits = static_cast<std::uint16_t>(k % 2 == 0 ? word : word >> 16);
        a[r][k] = product.type == DType::kBF16 ? FloatFromBF16(bits) : FloatFromF16(bits);
      }
    }
  }
  const Matrix b(product.b);
  for (int j = 0; j < product.num_columns / 4; ++j) {
    const auto column = static_cast<std::uint32_t>(j / 2 * 8 + j % 2) + lane % 4 * 2;
    float b_column[16];
    for (std::uint32_t k = 0; k < 16; ++k) {
      b_column[k] = ElementAt(product.type, product.a_registers == nullptr ? b.At(column, k) : b.At(k, column));
    }
    for (int r = 0; r < 2; ++r) {
      double sum = 0;
      for (int k = 0; k < 16; ++k) sum += double{a[r][k]} * b_column[k];
      float& d = product.d[j / 2 * 4 + r * 2 + j % 2];
      d = static_cast<float>(product.adds ? d + sum : sum);
    }
  }
}

}  // namespace

void Multiply(const Product& product) {
  if (!IsLazy()) return Perform(product);
  Products& mine = products_of[place.thread.x];
  mine.unfinished.emplace_back(mine.group, product);
}

void CommitProducts() { ++products_of[place.thread.x].group; }

void AwaitProducts(int pending) {
  const unsigned thread = place.thread.x;
  Products& mine = products_of[thread];
  while (!mine.unfinished.empty() && mine.unfinished.front().first < mine.group - pending) {
    Perform(mine.unfinished.front().second);
    mine.unfinished.pop_front();
  }
}

}  // namespace spillway::emulation
