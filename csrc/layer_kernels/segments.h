// Where the rows of packed attention lie, and how they are read: rotated by their position, in blocks of a segment,
// with zeros up to a multiple of kMultiple. Included by kernels alone: everything here is compiled once for each CPU
// capability.
#pragma once

#include <vector>

#include "../cpu/packing.h"
#include "cpu_kernels.h"

namespace illada::CPU_CAPABILITY {

// A query, key or value in qkv or out: its row of each token.
template <typename T>
struct Rows {
  T* first;
  int64_t stride;
  T* operator[](int64_t token) const { return first + token * stride; }
};

// Where things are.
template <typename T>
class Layout {
 public:
  explicit Layout(const AttentionProblem& problem) : problem_(problem) {}

  template <typename U>
  Rows<U> query(U* qkv, int64_t head) const {
    const int64_t group = head / problem_.heads_per_group;
    return slot(qkv, group, head % problem_.heads_per_group);
  }
  template <typename U>
  Rows<U> key(U* qkv, int64_t group) const {
    return slot(qkv, group, problem_.heads_per_group);
  }
  template <typename U>
  Rows<U> value(U* qkv, int64_t group) const {
    return slot(qkv, group, problem_.heads_per_group + 1);
  }
  template <typename U>
  Rows<U> output(U* out, int64_t head) const {
    return {out + head * problem_.dim, problem_.heads() * problem_.dim};
  }

 private:
  template <typename U>
  Rows<U> slot(U* qkv, int64_t group, int64_t number) const {
    return {qkv + (group * (problem_.heads_per_group + 2) + number) * problem_.dim, problem_.qkv_stride()};
  }
  const AttentionProblem& problem_;
};

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin): the two halves of a row (arXiv 2104.09864, eq. 34, in halves).
// sign -1 turns back.
template <typename From, typename To>
void rotate(const From* from, const float* cos, const float* sin, float sign, float scale, int64_t dim, To* to) {
  const int64_t half = dim / 2;
  const Floats cos_factor(scale), sin_factor(sign * scale);
  for_steps(half, [&](int64_t i, int64_t count) {
    const auto [a0, a1] = load_two(from + i, count);
    const auto [b0, b1] = load_two(from + half + i, count);
    auto [c0, c1] = load_two(cos + i, count);
    auto [s0, s1] = load_two(sin + i, count);
    c0 = c0 * cos_factor, c1 = c1 * cos_factor, s0 = s0 * sin_factor, s1 = s1 * sin_factor;
    store_two(to + i, a0 * c0 - b0 * s0, a1 * c1 - b1 * s1, count);
    store_two(to + half + i, b0 * c0 + a0 * s0, b1 * c1 + a1 * s1, count);
  });
}

// Rows [from, from + count) of a segment, rotated, and zeros up to padded(count).
template <typename T>
void gather_rotated(const AttentionProblem& problem, const Rows<const T>& rows, const Segment& segment, int64_t from,
                    int64_t count, T* to) {
  const int64_t dim = problem.dim, half = dim / 2;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = from + i;
    rotate(rows[segment.start + position], problem.cos + position * half, problem.sin + position * half, 1.0f, 1.0f,
           dim, to + i * dim);
  }
  std::fill_n(to + count * dim, (padded(count) - count) * dim, T(0));
}

template <typename T>
void gather(const Rows<const T>& rows, int64_t dim, int64_t first, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) std::copy_n(rows[first + i], dim, to + i * dim);
  std::fill_n(to + count * dim, (padded(count) - count) * dim, T(0));
}

// A task's place: which block of which segment.
struct Block {
  Segment segment;
  int64_t from;           // first position of the block within the segment
  int64_t count;          // positions in it
  int64_t packed_offset;  // rows before it, where every segment is padded
  int64_t width() const { return padded(count); }
};

inline std::vector<Block> blocks_of(const AttentionProblem& problem, int64_t size) {
  std::vector<Block> blocks;
  int64_t offset = 0;
  for (const Segment& segment : problem.segments) {
    for (int64_t from = 0; from < segment.length; from += size) {
      blocks.push_back({segment, from, std::min(size, segment.length - from), offset + from});
    }
    offset += padded(segment.length);
  }
  return blocks;
}

inline int64_t packed_rows(const AttentionProblem& problem) {
  int64_t rows = 0;
  for (const Segment& segment : problem.segments) rows += padded(segment.length);
  return rows;
}

}  // namespace illada::CPU_CAPABILITY
