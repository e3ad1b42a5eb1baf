// Gradients of the attention of cpu_kernels_attention_forward.cpp (arXiv 2205.14135, algorithm 4), with respect to
// queries, keys and values as they were before the rotary embedding.
//
// Scores are computed again, transposed: keys are rows and queries columns, so that P^T and dS^T come out as the left
// operands that dV = P^T dO and dK = dS^T Q need, and the statistics of the queries are vectors along a row. A query
// head of a segment is one task; the shares of the heads of a group in dK and dV are added in order afterwards.

#include <ATen/Parallel.h>

#include <cmath>
#include <limits>

#include "segments.h"

namespace illada::CPU_CAPABILITY {
namespace {

// Extents of a block of scores, chosen so that it and its operands fit in an L2 cache of 1 MB.
constexpr int64_t kQueries = 256;
constexpr int64_t kKeys = 128;

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

// Keys and values of all groups for the backward pass: [ng, packed rows, d] each.
template <typename T>
struct Operands {
  explicit Operands(const AttentionProblem& problem)
      : rows(packed_rows(problem)),
        keys(problem.groups * rows * problem.dim),
        keys_transposed(problem.groups * rows * problem.dim),
        values(problem.groups * rows * problem.dim) {
    const auto* qkv = static_cast<const T*>(problem.qkv);
    const Layout<T> layout(problem);
    const std::vector<Block> blocks = blocks_of(problem, kKeys);
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
      : gathered(kQueries * dim),
        queries(kQueries * dim),
        queries_transposed(kQueries * dim),
        grads(kQueries * dim),
        grads_transposed(kQueries * dim),
        lse(kQueries),
        delta(kQueries) {}

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
  HeadBackward(const AttentionProblem& problem, const Operands<T>& operands)
      : problem_(problem),
        operands_(operands),
        query_(problem.dim),
        scores_(kKeys * kQueries),
        products_(kKeys * kQueries),
        pairs_(kKeys * kQueries),
        sums_(kQueries * problem.dim),
        rows_(kQueries * problem.dim) {}

  void run(int64_t head, const std::vector<Block>& blocks, const T* out, const float* lse, const T* grad_out,
           T* grad_qkv, float* grad_keys, float* grad_values) {
    const int64_t dim = problem_.dim, group = head / problem_.heads_per_group;
    const float factor = problem_.scale * static_cast<float>(M_LOG2E);
    for (const Block& block : blocks) {
      query_.load(problem_, head, block, out, grad_out, lse);
      const int64_t queries = block.width(), packed = block.packed_offset - block.from;
      for (int64_t from = 0; from < block.segment.length; from += kKeys) {
        const int64_t valid = std::min(kKeys, block.segment.length - from), keys = padded(valid);
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
  const Operands<T>& operands_;
  QueryBlock<T> query_;
  Scratch<float> scores_, products_;  // [keys, queries], overwritten by P and dS
  Scratch<T> pairs_;                  // dS as a right operand
  Scratch<float> sums_, rows_;        // dQ^T [d, queries], dQ [queries, d]
};

// Shares [ng * r, packed rows, d] of the query heads -> gradients of keys and values.
template <typename T>
void store_keys_and_values(const AttentionProblem& problem, int64_t rows, float* grad_keys, float* grad_values,
                           T* grad_qkv) {
  const std::vector<Block> blocks = blocks_of(problem, kKeys);
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
  const Operands<T> operands(problem);
  const Scratch<float> grad_keys(problem.heads() * operands.rows * problem.dim);
  const Scratch<float> grad_values(problem.heads() * operands.rows * problem.dim);
  std::vector<std::vector<Block>> blocks(problem.segments.size());
  size_t segment = 0;
  for (const Block& block : blocks_of(problem, kQueries)) {
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

void attention_backward(const AttentionProblem& problem, const void* out, const float* lse, const void* grad_out,
                        void* grad_qkv) {
  with_type(problem.dtype, [&]<typename T>() {
    backward(problem, static_cast<const T*>(out), lse, static_cast<const T*>(grad_out), static_cast<T*>(grad_qkv));
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_attention_backward_stub, &illada::CPU_CAPABILITY::attention_backward)

}  // namespace at::native
