// Bidirectional attention over packed segments, the rotary embedding applied on the way in.
//
// No row of scores is kept: a block of them lies in the cache between two of oneDNN's products, which run on one thread
// and accumulate in float; the softmax is carried from block to block of keys (arXiv 2205.14135, algorithm 1). Every
// result is computed by one task in a fixed order, so that it depends neither on the number of threads nor on how many
// heads there are. Formulas: docs/cpu_kernels.md.

#include <ATen/Parallel.h>

#include <array>
#include <cmath>
#include <limits>

#include "segments.h"

namespace illada::CPU_CAPABILITY {
namespace {

// Extents of a block of scores, chosen so that it and its operands fit in an L2 cache of 1 MB.
constexpr int64_t kQueries = 64;
constexpr int64_t kKeys = 512;

// Keys and values of all groups as operands: [ng, packed rows, d] each.
template <typename T>
struct Operands {
  explicit Operands(const AttentionProblem& problem)
      : rows(packed_rows(problem)),
        keys(problem.groups * rows * problem.dim),
        values(problem.groups * rows * problem.dim) {
    const auto* qkv = static_cast<const T*>(problem.qkv);
    const Layout<T> layout(problem);
    const std::vector<Block> blocks = blocks_of(problem, kKeys);
    const int64_t count = blocks.size(), dim = problem.dim;
    at::parallel_for(0, problem.groups * count, 1, [&](int64_t begin, int64_t end) {
      const Scratch<T> gathered(kKeys * dim);
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
  const Operands<T> operands(problem);
  const std::vector<Block> blocks = blocks_of(problem, kQueries);
  const int64_t count = blocks.size(), dim = problem.dim;
  const float factor = problem.scale * static_cast<float>(M_LOG2E);
  at::parallel_for(0, problem.heads() * count, 1, [&](int64_t begin, int64_t end) {
    const Scratch<T> queries(kQueries * dim);
    const Scratch<float> scores(kQueries * kKeys), sums(kQueries * dim);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / count, group = head / problem.heads_per_group;
      const Block& block = blocks[task % count];
      const Segment& segment = block.segment;
      gather_rotated(problem, layout.query(qkv, head), segment, block.from, block.count, queries.get());
      std::array<Running, kQueries> running{};
      for (int64_t from = 0; from < segment.length; from += kKeys) {
        const int64_t keys = std::min(kKeys, segment.length - from), width = padded(keys);
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

void attention_forward(const AttentionProblem& problem, void* out, float* lse) {
  with_type(problem.dtype, [&]<typename T>() { forward(problem, static_cast<T*>(out), lse); });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_attention_forward_stub, &illada::CPU_CAPABILITY::attention_forward)

}  // namespace at::native
