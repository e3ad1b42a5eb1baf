// A row is swept twice, the second time from the cache: for the largest, then for the exponentials of the others. These
// are added up in float within a lane of a block, the blocks' sums in double: of 1 - p some 1e-8 of itself is lost.

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../cpu/vectors.h"
#include "largest.h"

namespace illada::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 8 * kLanes;       // elements that are added up in float, 8 to a lane
constexpr int64_t kSearched = 1 << 10;       // elements among which the largest is looked for a second time
constexpr int64_t kLeastOfThread = 1 << 15;  // elements; for fewer a thread is not woken
constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Of equals the first; NaN is larger than all.
int64_t index_of_largest(const float* x, int64_t n) {
  float largest = kNothing;
  int64_t block = 0;
  for (int64_t first = 0; first < n; first += kSearched) {
    const int64_t end = std::min(first + kSearched, n);
    int64_t i = first;
    float of_block = x[first];
    if (i + kLanes <= end) {
      Floats most = Floats::loadu(x + i);
      for (i += kLanes; i + kLanes <= end; i += kLanes) most = at::vec::maximum(most, Floats::loadu(x + i));
      of_block = largest_of(most);
    }
    for (; i < end; ++i) of_block = x[i] > of_block || std::isnan(x[i]) ? x[i] : of_block;
    if (std::isnan(of_block) || of_block > largest) {
      largest = of_block;
      block = first;
      if (std::isnan(largest)) break;
    }
  }
  const float* found = std::find_if(x + block, x + std::min(block + kSearched, n), [&](float one) {
    return one == largest || (std::isnan(one) && std::isnan(largest));
  });
  return found - x;
}

// e^x for x <= 0, to 1e-7; 0 below -87.7. NaN stays NaN.
Floats exp_of_negative(const Floats& x) {
  const Floats bounded = at::vec::clamp_min(x, Floats(-88.0f));
  const Floats whole = (bounded * Floats(1.44269504f)).round();  // -127 at the least, of which the power below is 0
  Floats rest = at::vec::fmadd(whole, Floats(-0.693359375f), bounded);  // ln 2 in two parts, the first of few bits
  rest = at::vec::fmadd(whole, Floats(2.12194440e-4f), rest);           // |rest| <= ln(2) / 2
  // minimax polynomial of (e^rest - 1 - rest) / rest^2: 3e-9 of e^rest
  Floats y = at::vec::fmadd(rest, Floats(1.38145984e-3f), Floats(8.3687169e-3f));
  y = at::vec::fmadd(y, rest, Floats(4.16683881e-2f));
  y = at::vec::fmadd(y, rest, Floats(1.66665206e-1f));
  y = at::vec::fmadd(y, rest, Floats(4.99999934e-1f));
  y = at::vec::fmadd(y, rest * rest, rest) + Floats(1.0f);
  const Words power = (at::vec::convert_to_int_of_same_size(whole) + Words(127)) << Words(23);
  return y * at::vec::cast<float, int32_t>(power);
}

// Adds the exponentials of a block, less `largest`, to a sum for each lane.
void add_block(const float* x, float largest, std::array<double, kLanes>& total) {
  Floats sum(0.0f);
  for (int64_t i = 0; i < kBlock; i += kLanes) sum = sum + exp_of_negative(Floats::loadu(x + i) - Floats(largest));
  std::array<float, kLanes> lanes;
  sum.store(lanes.data());
  for (int64_t lane = 0; lane < kLanes; ++lane) total[lane] += lanes[lane];
}

double sum_of_others(const float* x, int64_t n, int64_t at) {
  std::array<double, kLanes> total{};
  for (int64_t first = 0; first < n; first += kBlock) {
    const bool has_largest = first <= at && at < first + kBlock;
    if (first + kBlock <= n && !has_largest) {
      add_block(x + first, x[at], total);
      continue;
    }
    std::array<float, kBlock> some;
    some.fill(kNothing);
    std::copy(x + first, x + std::min(first + kBlock, n), some.begin());
    if (has_largest) some[at - first] = kNothing;
    add_block(some.data(), x[at], total);
  }
  double sum = 0;
  for (const double lane : total) sum += lane;
  return sum;
}

void largest(const at::Tensor& index, const at::Tensor& rest, const at::Tensor& logits) {
  const int64_t m = logits.size(0), v = logits.size(1);
  const float* rows = logits.const_data_ptr<float>();
  auto* const of_index = index.mutable_data_ptr<int64_t>();
  auto* const of_rest = rest.mutable_data_ptr<double>();
  at::parallel_for(0, m, std::max<int64_t>(1, kLeastOfThread / v), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = rows + row * v;
      of_index[row] = index_of_largest(x, v);
      of_rest[row] = sum_of_others(x, v, of_index[row]);
    }
  });
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_largest_stub, &illada::CPU_CAPABILITY::largest)

}  // namespace at::native
