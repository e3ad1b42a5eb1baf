// Bidirectional attention over packed segments, with the rotary embedding applied on the way in and out.
//
// No row of scores is kept: a block of them lies in the cache between two of oneDNN's products, which run on one thread
// and accumulate in float. Every result is computed by one task in a fixed order, so that it depends neither on the
// number of threads nor on how many heads there are. Formulas: docs/cpu_kernels.md.

#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <limits>
#include <memory>

#include "cpu_kernels.h"
#include "packing.h"

namespace illada::CPU_CAPABILITY {
namespace {

// Extents of a block of scores, chosen so that it and its operands fit in an L2 cache of 1 MB.
constexpr int64_t kForwardQueries = 64;
constexpr int64_t kForwardKeys = 512;
constexpr int64_t kBackwardQueries = 256;
constexpr int64_t kBackwardKeys = 128;

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

template <typename T>
float dot(const T* a, const T* b, int64_t n) {
  Floats sum0(0.0f), sum1(0.0f);
  for_steps(n, [&](int64_t i, int64_t count) {
    const auto [a0, a1] = load_two(a + i, count);
    const auto [b0, b1] = load_two(b + i, count);
    sum0 = at::vec::fmadd(a0, b0, sum0);
    sum1 = at::vec::fmadd(a1, b1, sum1);
  });
  return sum_of(sum0 + sum1);
}

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

  int64_t dim() const { return problem_.dim; }
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

std::vector<Block> blocks_of(const AttentionProblem& problem, int64_t size) {
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

int64_t packed_rows(const AttentionProblem& problem) {
  int64_t rows = 0;
  for (const Segment& segment : problem.segments) rows += padded(segment.length);
  return rows;
}

// Keys and values of all groups as operands: [ng, packed rows, d] each.
template <typename T>
struct ForwardOperands {
  explicit ForwardOperands(const AttentionProblem& problem)
      : rows(packed_rows(problem)),
        keys(problem.groups * rows * problem.dim),
        values(problem.groups * rows * problem.dim) {
    const auto* qkv = static_cast<const T*>(problem.qkv);
    const Layout<T> layout(problem);
    const std::vector<Block> blocks = blocks_of(problem, kForwardKeys);
    const int64_t count = blocks.size(), dim = problem.dim;
    at::parallel_for(0, problem.groups * count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> gathered(kForwardKeys * dim);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / count;
        const Block& block = blocks[task % count];
        const int64_t place = (group * rows + block.packed_offset) * dim;
        gather_rotated(problem, layout.key(qkv, group), block.segment, block.from, block.count, gathered.get());
        pack_transposed(gathered.get(), block.width(), dim, keys + place);
        gather(layout.value(qkv, group), dim, block.segment.start + block.from, block.count, gathered.get());
        pack_rows(gathered.get(), block.width(), dim, values + place);
      }
    });
  }
  int64_t rows;
  Scratch<T> keys;    // a block of n: K^T [d, n]
  Scratch<T> values;  // a block of n: V [n, d]
};

// The running softmax of a query.
struct Running {
  float max = -std::numeric_limits<float>::infinity();  // of scores times scale * log2(e)
  float sum = 0.0f;
};

// Scores of a query (n valid of `width`) -> 2^(factor * score - max) in their place, as T, and zeros to `width`.
// Returns by how much what came before has to be multiplied.
template <typename T>
float exponentiate(float* scores, int64_t n, int64_t width, float factor, Running& running) {
  const float lowest = -std::numeric_limits<float>::infinity();
  std::fill(scores + n, scores + width, lowest);
  Floats max0(lowest), max1(lowest);
  for (int64_t j = 0; j < width; j += kStep) {
    max0 = at::vec::maximum(max0, Floats::loadu(scores + j));
    max1 = at::vec::maximum(max1, Floats::loadu(scores + j + kLanes));
  }
  const float max = std::max(running.max, factor * largest_of(at::vec::maximum(max0, max1)));
  const Floats factors(factor), maxima(max);
  Floats sum0(0.0f), sum1(0.0f);
  T* probabilities = reinterpret_cast<T*>(scores);
  for (int64_t j = 0; j < width; j += kStep) {
    const Floats p0 = exp2(at::vec::fmsub(Floats::loadu(scores + j), factors, maxima));
    const Floats p1 = exp2(at::vec::fmsub(Floats::loadu(scores + j + kLanes), factors, maxima));
    sum0 = sum0 + p0;
    sum1 = sum1 + p1;
    store_two(probabilities + j, p0, p1);
  }
  const float change = std::exp2(running.max - max);
  running = {max, running.sum * change + sum_of(sum0 + sum1)};
  return change;
}

void multiply_row(float* row, int64_t dim, float factor) {
  for (int64_t i = 0; i < dim; ++i) row[i] *= factor;
}

template <typename T>
void forward(const AttentionProblem& problem, T* out, float* lse) {
  const auto* qkv = static_cast<const T*>(problem.qkv);
  const Layout<T> layout(problem);
  const ForwardOperands<T> operands(problem);
  const std::vector<Block> blocks = blocks_of(problem, kForwardQueries);
  const int64_t count = blocks.size(), dim = problem.dim;
  const float factor = problem.scale * static_cast<float>(M_LOG2E);
  at::parallel_for(0, problem.heads() * count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> queries(kForwardQueries * dim);
    const Scratch<float> scores(kForwardQueries * kForwardKeys), sums(kForwardQueries * dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / count, group = head / problem.heads_per_group;
      const Block& block = blocks[task % count];
      const Segment& segment = block.segment;
      gather_rotated(problem, layout.query(qkv, head), segment, block.from, block.count, queries.get());
      std::array<Running, kForwardQueries> running{};
      for (int64_t from = 0; from < segment.length; from += kForwardKeys) {
        const int64_t keys = std::min(kForwardKeys, segment.length - from), width = padded(keys);
        const int64_t place = (group * operands.rows + block.packed_offset - block.from + from) * dim;
        multiply(block.width(), width, dim, queries.get(), dim, operands.keys + place, scores.get(), false);
        for (int64_t i = 0; i < block.count; ++i) {
          const float change = exponentiate<T>(scores + i * width, keys, width, factor, running[i]);
          if (from > 0 && change != 1.0f) multiply_row(sums + i * dim, dim, change);
        }
        multiply(block.width(), dim, width, reinterpret_cast<const T*>(scores.get()), width * kPair<T>,
                 operands.values + place, sums.get(), from > 0);
      }
      const Rows<T> results = layout.output(out, head);
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t token = segment.start + block.from + i;
        const float inverse = 1.0f / running[i].sum;
        T* result = results[token];
        for (int64_t j = 0; j < dim; ++j) result[j] = static_cast<T>((sums + i * dim)[j] * inverse);
        lse[head * problem.tokens + token] = running[i].max + std::log2(running[i].sum);
      }
    }
    at::native::cpublas::brgemm_release(kPair<T> == 2);
  });
}

// Keys and values of all groups for the backward pass: [ng, packed rows, d] each.
template <typename T>
struct BackwardOperands {
  explicit BackwardOperands(const AttentionProblem& problem)
      : rows(packed_rows(problem)),
        keys(problem.groups * rows * problem.dim),
        keys_transposed(problem.groups * rows * problem.dim),
        values(problem.groups * rows * problem.dim) {
    const auto* qkv = static_cast<const T*>(problem.qkv);
    const Layout<T> layout(problem);
    const std::vector<Block> blocks = blocks_of(problem, kBackwardKeys);
    const int64_t count = blocks.size(), dim = problem.dim;
    at::parallel_for(0, problem.groups * count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / count;
        const Block& block = blocks[task % count];
        const int64_t place = (group * rows + block.packed_offset) * dim;
        gather_rotated(problem, layout.key(qkv, group), block.segment, block.from, block.count, keys + place);
        transpose(keys + place, dim, block.width(), dim, keys_transposed + place, block.width());
        gather(layout.value(qkv, group), dim, block.segment.start + block.from, block.count, values + place);
      }
    });
  }
  int64_t rows;
  Scratch<T> keys;             // K [n, d]
  Scratch<T> keys_transposed;  // a block of n: K^T [d, n], as a left operand
  Scratch<T> values;           // V [n, d]
};

// Queries of a block and the gradients of their outputs, as right operands.
template <typename T>
struct QueryBlock {
  explicit QueryBlock(int64_t dim)
      : gathered(kBackwardQueries * dim),
        queries(kBackwardQueries * dim),
        queries_transposed(kBackwardQueries * dim),
        grads(kBackwardQueries * dim),
        grads_transposed(kBackwardQueries * dim),
        lse(kBackwardQueries),
        delta(kBackwardQueries) {}

  void load(const AttentionProblem& problem, int64_t head, const Block& block, const T* out, const T* grad_out,
            const float* row_lse) {
    const Layout<T> layout(problem);
    const int64_t dim = problem.dim, width = block.width(), start = block.segment.start + block.from;
    const auto* qkv = static_cast<const T*>(problem.qkv);
    gather_rotated(problem, layout.query(qkv, head), block.segment, block.from, block.count, gathered.get());
    pack_rows(gathered.get(), width, dim, queries.get());
    pack_transposed(gathered.get(), width, dim, queries_transposed.get());
    const Rows<const T> outs = layout.output(out, head), grads_out = layout.output(grad_out, head);
    gather(grads_out, dim, start, block.count, gathered.get());
    pack_rows(gathered.get(), width, dim, grads.get());
    pack_transposed(gathered.get(), width, dim, grads_transposed.get());
    // a query that only pads has probability 0 everywhere
    std::fill_n(lse.get(), width, std::numeric_limits<float>::infinity());
    std::fill_n(delta.get(), width, 0.0f);
    for (int64_t i = 0; i < block.count; ++i) {
      lse.get()[i] = row_lse[head * problem.tokens + start + i];
      delta.get()[i] = dot(outs[start + i], grads_out[start + i], dim);
    }
  }

  Scratch<T> gathered;
  Scratch<T> queries, queries_transposed;  // Q [n, d], Q^T [d, n]
  Scratch<T> grads, grads_transposed;      // dO [n, d], dO^T [d, n]
  Scratch<float> lse, delta;               // [n]; delta is the row sum of dO * O
};

// Scores and dP of keys (rows; `valid` of `height`) and queries (columns) -> in their places, as T, P and
// dS = P * (dP - delta); dS also as a right operand in `pairs`.
template <typename T>
void differentiate(float* scores, float* products, T* pairs, int64_t valid, int64_t height, int64_t width, float factor,
                   const float* lse, const float* delta) {
  const Floats factors(factor);
  for (int64_t row = 0; row < height; row += 2) {
    for (int64_t j = 0; j < width; j += kStep) {
      T* grads[2];
      for (int64_t i = row; i < row + 2; ++i) {
        T* probabilities = reinterpret_cast<T*>(scores + i * width) + j;
        grads[i - row] = reinterpret_cast<T*>(products + i * width) + j;
        if (i >= valid) {
          store_two(probabilities, Floats(0.0f), Floats(0.0f));
          store_two(grads[i - row], Floats(0.0f), Floats(0.0f));
          continue;
        }
        const float *score = scores + i * width + j, *product = products + i * width + j;
        const Floats p0 = exp2(at::vec::fmsub(Floats::loadu(score), factors, Floats::loadu(lse + j)));
        const Floats p1 = exp2(at::vec::fmsub(Floats::loadu(score + kLanes), factors, Floats::loadu(lse + j + kLanes)));
        const Floats d0 = p0 * (Floats::loadu(product) - Floats::loadu(delta + j));
        const Floats d1 = p1 * (Floats::loadu(product + kLanes) - Floats::loadu(delta + j + kLanes));
        store_two(probabilities, p0, p1);
        store_two(grads[i - row], d0, d1);
      }
      if constexpr (kPair<T> == 2) pack_pair(grads[0], grads[1], kStep, pairs + row * width + 2 * j);
    }
  }
}

// Gradients of a query head's rows, and its share [packed rows, d] of those of its key and value.
template <typename T>
class HeadBackward {
 public:
  HeadBackward(const AttentionProblem& problem, const BackwardOperands<T>& operands)
      : problem_(problem),
        operands_(operands),
        query_(problem.dim),
        scores_(kBackwardKeys * kBackwardQueries),
        products_(kBackwardKeys * kBackwardQueries),
        pairs_(kBackwardKeys * kBackwardQueries),
        sums_(kBackwardQueries * problem.dim),
        rows_(kBackwardQueries * problem.dim) {}

  void run(int64_t head, const std::vector<Block>& blocks, const T* out, const float* lse, const T* grad_out,
           T* grad_qkv, float* grad_keys, float* grad_values) {
    const int64_t dim = problem_.dim, group = head / problem_.heads_per_group;
    const float factor = problem_.scale * static_cast<float>(M_LOG2E);
    for (const Block& block : blocks) {
      query_.load(problem_, head, block, out, grad_out, lse);
      const int64_t queries = block.width(), packed = block.packed_offset - block.from;
      for (int64_t from = 0; from < block.segment.length; from += kBackwardKeys) {
        const int64_t valid = std::min(kBackwardKeys, block.segment.length - from), keys = padded(valid);
        const int64_t place = (group * operands_.rows + packed + from) * dim;
        const int64_t share = (head * operands_.rows + packed + from) * dim;
        multiply(keys, queries, dim, operands_.keys + place, dim, query_.queries_transposed.get(), scores_.get(),
                 false);
        multiply(keys, queries, dim, operands_.values + place, dim, query_.grads_transposed.get(), products_.get(),
                 false);
        differentiate(scores_.get(), products_.get(), pairs_.get(), valid, keys, queries, factor, query_.lse.get(),
                      query_.delta.get());
        const T* probabilities = reinterpret_cast<const T*>(scores_.get());
        const T* grads = reinterpret_cast<const T*>(products_.get());
        const int64_t stride = queries * kPair<T>;
        multiply(keys, dim, queries, probabilities, stride, query_.grads.get(), grad_values + share, block.from > 0);
        multiply(keys, dim, queries, grads, stride, query_.queries.get(), grad_keys + share, block.from > 0);
        multiply(dim, queries, keys, operands_.keys_transposed + place, keys, kPair<T> == 2 ? pairs_.get() : grads,
                 sums_.get(), from > 0);
      }
      store_query(head, block, grad_qkv);
    }
  }

 private:
  void store_query(int64_t head, const Block& block, T* grad_qkv) {
    const int64_t dim = problem_.dim, half = dim / 2;
    transpose(sums_.get(), block.width(), dim, block.width(), rows_.get(), dim);
    const Rows<T> grads = Layout<T>(problem_).query(grad_qkv, head);
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t position = block.from + i;
      rotate(rows_ + i * dim, problem_.cos + position * half, problem_.sin + position * half, -1.0f, problem_.scale,
             dim, grads[block.segment.start + position]);
    }
  }

  const AttentionProblem& problem_;
  const BackwardOperands<T>& operands_;
  QueryBlock<T> query_;
  Scratch<float> scores_, products_;  // [keys, queries], overwritten by P and dS
  Scratch<T> pairs_;                  // dS as a right operand
  Scratch<float> sums_, rows_;        // dQ^T [d, queries], dQ [queries, d]
};

// Shares [ng * r, packed rows, d] of the query heads -> gradients of keys and values.
template <typename T>
void store_keys_and_values(const AttentionProblem& problem, int64_t rows, float* grad_keys, float* grad_values,
                           T* grad_qkv) {
  const std::vector<Block> blocks = blocks_of(problem, kBackwardKeys);
  const int64_t count = blocks.size(), dim = problem.dim, half = dim / 2, share = rows * dim;
  const Layout<T> layout(problem);
  at::parallel_for(0, problem.groups * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / count;
      const Block& block = blocks[task % count];
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t first = (group * problem.heads_per_group * rows + block.packed_offset + i) * dim;
        float *key = grad_keys + first, *value = grad_values + first;
        for (int64_t head = 1; head < problem.heads_per_group; ++head) {
          for (int64_t j = 0; j < dim; ++j) key[j] += key[head * share + j];
          for (int64_t j = 0; j < dim; ++j) value[j] += value[head * share + j];
        }
        const int64_t position = block.from + i, token = block.segment.start + position;
        rotate(key, problem.cos + position * half, problem.sin + position * half, -1.0f, problem.scale, dim,
               layout.key(grad_qkv, group)[token]);
        std::copy_n(value, dim, layout.value(grad_qkv, group)[token]);
      }
    }
  });
}

template <typename T>
void backward(const AttentionProblem& problem, const T* out, const float* lse, const T* grad_out, T* grad_qkv) {
  const BackwardOperands<T> operands(problem);
  const Scratch<float> grad_keys(problem.heads() * operands.rows * problem.dim);
  const Scratch<float> grad_values(problem.heads() * operands.rows * problem.dim);
  std::vector<std::vector<Block>> blocks(problem.segments.size());
  size_t segment = 0;
  for (const Block& block : blocks_of(problem, kBackwardQueries)) {
    while (problem.segments[segment].start != block.segment.start) ++segment;
    blocks[segment].push_back(block);
  }
  const int64_t heads = problem.heads(), count = blocks.size();
  at::parallel_for(0, count * heads, 1, [&](int64_t begin, int64_t end) {
    HeadBackward<T> head(problem, operands);
    for (int64_t task = begin; task < end; ++task) {
      head.run(task % heads, blocks[task / heads], out, lse, grad_out, grad_qkv, grad_keys.get(), grad_values.get());
    }
    at::native::cpublas::brgemm_release(kPair<T> == 2);
  });
  store_keys_and_values(problem, operands.rows, grad_keys.get(), grad_values.get(), grad_qkv);
}

void attention_forward(const AttentionProblem& problem, void* out, float* lse) {
  with_type(problem.dtype, [&]<typename T>() { forward(problem, static_cast<T*>(out), lse); });
}

void attention_backward(const AttentionProblem& problem, const void* out, const float* lse, const void* grad_out,
                        void* grad_qkv) {
  with_type(problem.dtype, [&]<typename T>() {
    backward(problem, static_cast<const T*>(out), lse, static_cast<const T*>(grad_out), static_cast<T*>(grad_qkv));
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_attention_forward_stub, &illada::CPU_CAPABILITY::attention_forward)
ALSO_REGISTER_AVX512_DISPATCH(illada_attention_backward_stub, &illada::CPU_CAPABILITY::attention_backward)

}  // namespace at::native
