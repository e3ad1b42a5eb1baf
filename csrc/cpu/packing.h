// Products of a single thread and their operands in the layout that they ask for. Included by kernels alone:
// everything here is compiled once for each CPU capability.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "vectors.h"

namespace illada::CPU_CAPABILITY {

// Memory for products: aligned to a cache line, not initialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(new (std::align_val_t(64)) T[count]) {}
  T* get() const { return memory_.get(); }
  T* operator+(int64_t offset) const { return memory_.get() + offset; }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> memory_;
};

// How many consecutive rows of a product's right operand lie interleaved: [k, n] is stored as [k / kPair, n, kPair]
// (oneDNN's VNNI layout: a word of 32 bits holds the two bfloat16 that one instruction multiplies).
template <typename T>
constexpr int64_t kPair = 4 / sizeof(T);

// Every extent of a product is a multiple of this (padded with zeros): oneDNN generates code for each shape, and so
// meets few of them.
constexpr int64_t kMultiple = 32;
inline int64_t padded(int64_t count) { return (count + kMultiple - 1) / kMultiple * kMultiple; }

// c [m, n] (+)= a [m, k] b [k, n] on this thread, accumulated in float. b is laid out as kPair says; rows of a are lda
// apart, those of c ldc, those of b follow each other. products.h says where it can run.
template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, n, ldc, add, a, b, c, /*is_vnni=*/kPair<T> == 2);
}

template <typename T>
void multiply(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, float* c, bool add) {
  multiply(m, n, k, a, lda, b, c, n, add);
}

// Matrix [rows, columns] -> its transpose; the rows of either are ld_from and ld_to elements apart.
template <typename Element>
void transpose(const Element* from, int64_t ld_from, int64_t rows, int64_t columns, Element* to, int64_t ld_to) {
  constexpr int kTile = std::min<int64_t>(16, at::vec::Vectorized<Element>::size());
  for (int64_t row = 0; row < rows; row += kTile) {
    for (int64_t column = 0; column < columns; column += kTile) {
      const Element* source = from + row * ld_from + column;
      Element* target = to + column * ld_to + row;
      if (row + kTile <= rows && column + kTile <= columns) {
        at::vec::transpose_mxn<Element, kTile, kTile>(source, ld_from, target, ld_to);
        continue;
      }
      for (int64_t i = 0; i < std::min<int64_t>(kTile, rows - row); ++i) {
        for (int64_t j = 0; j < std::min<int64_t>(kTile, columns - column); ++j) {
          std::memcpy(target + j * ld_to + i, source + i * ld_from + j, sizeof(Element));
        }
      }
    }
  }
}

// Rows [n, d] -> the right operand [d, n].
template <typename T>
void pack_transposed(const T* rows, int64_t n, int64_t dim, T* to) {
  const int64_t words = dim / kPair<T>;
  transpose(reinterpret_cast<const float*>(rows), words, n, words, reinterpret_cast<float*>(to), n);
}

// Two rows of [n, d] -> one row of pairs of the right operand; `count` long.
template <typename T>
void pack_pair(const T* first, const T* second, int64_t count, T* to) {
  static_assert(kPair<T> == 2);
  const Words low_half(0xffff), high_half(static_cast<int32_t>(0xffff0000u)), bits(16);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const Words a = Words::loadu(first + i), b = Words::loadu(second + i);
    const Words even = (a & low_half) | (b << bits), odd = ((a >> bits) & low_half) | (b & high_half);
    const auto [low, high] =
        at::vec::interleave2(at::vec::cast<float, int32_t>(even), at::vec::cast<float, int32_t>(odd));
    low.store(to + 2 * i);
    high.store(to + 2 * (i + kLanes));
  }
  for (; i < count; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second[i];
  }
}

// Rows [n, d] -> the right operand [n, d].
template <typename T>
void pack_rows(const T* rows, int64_t n, int64_t dim, T* to) {
  if constexpr (kPair<T> == 1) {
    std::copy_n(rows, n * dim, to);
  } else {
    for (int64_t row = 0; row < n; row += 2) {
      pack_pair(rows + row * dim, rows + (row + 1) * dim, dim, to + row * dim);
    }
  }
}

}  // namespace illada::CPU_CAPABILITY
