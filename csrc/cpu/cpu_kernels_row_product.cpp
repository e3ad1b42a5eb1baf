// Panels of 32 rows of x lie transposed, a vector of rows for each column; each element of w is a factor for all of a
// panel. A sum is made of blocks of kInner products, each from the first to the last, the blocks' sums added up one
// after the other: nothing of it depends on the number of rows, nor on the threads.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "packing.h"
#include "row_product.h"

namespace illada::CPU_CAPABILITY {
namespace {

constexpr int64_t kPanel = 32;         // rows of x
constexpr int64_t kInner = 128;        // columns of a block; of a panel 16 kB, half of a first-level cache
constexpr int64_t kBlock = 1 << 15;    // elements of w that are multiplied with one panel after the other, 128 kB
constexpr int64_t kMostRows = 96;      // of w in such a block
constexpr int64_t kPanelsOfTask = 16;  // of x
constexpr int64_t kLine = 16;          // floats of a cache line

// Rows of w whose sums are in registers at the same time, for `vectors` of rows of x: 8 to 16 sums, which is what hides
// the latency of an addition.
template <int vectors>
constexpr int kTile = vectors == 1   ? 8
                      : vectors == 2 ? 6
                      : vectors == 4 ? 3
                                     : 2;

// sums [rows, vectors * kLanes] (+)= x [inner, vectors * kLanes] times w [rows, inner]
template <int vectors, int rows>
void add_tile(const float* x, const float* w, int64_t stride, int64_t inner, float* sums, bool add) {
  Floats total[rows][vectors];
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) total[row][i] = Floats(0.0f);
  }
  for (int64_t column = 0; column < inner; ++column, x += vectors * kLanes) {
    Floats values[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) values[i] = Floats::loadu(x + i * kLanes);
#pragma GCC unroll 8
    for (int row = 0; row < rows; ++row) {
      const Floats factor(w[row * stride + column]);
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) total[row][i] = at::vec::fmadd(factor, values[i], total[row][i]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i, sums += kLanes) {
      (add ? Floats::loadu(sums) + total[row][i] : total[row][i]).store(sums);
    }
  }
}

// sums [rows, vectors * kLanes] = a panel [k, vectors * kLanes] times `rows` rows of w [.., k], for all columns. w is
// read once and from memory where there are few rows of x: what is to come is asked for two steps ahead.
template <int vectors, int rows>
void multiply_rows_of_w(const float* panel, const float* w, int64_t k, float* sums) {
  for (int64_t column = 0; column < k; column += kInner) {
    const int64_t inner = std::min(kInner, k - column);
    for (int row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < inner; i += kLine) __builtin_prefetch(w + (2 * rows + row) * k + column + i);
    }
    add_tile<vectors, rows>(panel + column * vectors * kLanes, w + column, k, inner, sums, column > 0);
  }
}

template <int vectors>
void multiply_panel(const float* panel, const float* w, int64_t rows, int64_t k, float* sums) {
  constexpr int64_t width = vectors * kLanes;
  int64_t row = 0;
  for (; row + kTile<vectors> <= rows; row += kTile<vectors>) {
    multiply_rows_of_w<vectors, kTile<vectors>>(panel, w + row * k, k, sums + row * width);
  }
  for (; row < rows; ++row) multiply_rows_of_w<vectors, 1>(panel, w + row * k, k, sums + row * width);
}

using MultiplyPanel = void (*)(const float*, const float*, int64_t, int64_t, float*);

// The kernel of panels of so many rows, and how many it takes.
template <int vectors = 1>
std::pair<MultiplyPanel, int64_t> kernel_of(int64_t rows) {
  if constexpr (vectors * kLanes < kPanel) {
    if (rows > vectors * kLanes) return kernel_of<2 * vectors>(rows);
  }
  return {&multiply_panel<vectors>, vectors * kLanes};
}

// x [rows, k] -> [k, width], zeros beside the last row
template <typename T>
void pack_panel(const T* x, int64_t rows, int64_t k, int64_t width, float* panel) {
  const Scratch<float> wide(std::is_same_v<T, float> ? 1 : rows * k);
  const float* from;
  if constexpr (std::is_same_v<T, float>) {
    from = x;
  } else {
    for_steps(rows * k, [&](int64_t first, int64_t count) {
      const auto [low, high] = load_two(x + first, count);
      store_two(wide + first, low, high, count);
    });
    from = wide.get();
  }
  if (rows < width) std::fill_n(panel, k * width, 0.0f);
  transpose(from, k, rows, k, panel, width);
}

// Of sums [columns, width] the first `rows` columns -> y [rows, ...] from `y` on, rows n apart
template <typename T>
void unpack(const float* sums, int64_t columns, int64_t width, int64_t rows, T* y, int64_t n, float* turned) {
  if constexpr (std::is_same_v<T, float>) {
    transpose(sums, width, columns, rows, y, n);
  } else {
    transpose(sums, width, columns, rows, turned, columns);
    for (int64_t row = 0; row < rows; ++row) {
      for_steps(columns, [&](int64_t first, int64_t count) {
        const auto [low, high] = load_two(turned + row * columns + first, count);
        store_two(y + row * n + first, low, high, count);
      });
    }
  }
}

template <typename T>
void multiply_rows(T* y, const T* x, const T* w, int64_t m, int64_t n, int64_t k) {
  const int64_t panels = (m + kPanel - 1) / kPanel;
  const Scratch<float> packed(panels * kPanel * k);
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, rows = std::min(kPanel, m - first);
      pack_panel(x + first * k, rows, k, kernel_of(rows).second, packed + first * k);
    }
  });
  const int64_t threads = at::get_num_threads();
  const int64_t block = std::min({kMostRows, std::max<int64_t>(kBlock / k, 24), (n + threads - 1) / threads});
  const int64_t blocks = (n + block - 1) / block, groups = (panels + kPanelsOfTask - 1) / kPanelsOfTask;
  at::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> sums(block * kPanel), turned(block * kPanel);
    const Scratch<float> wide(std::is_same_v<T, float> ? 1 : block * k);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % blocks * block, columns = std::min(block, n - column);
      const float* factors;
      if constexpr (std::is_same_v<T, float>) {
        factors = w + column * k;
      } else {
        for_steps(columns * k, [&](int64_t first, int64_t count) {
          const auto [low, high] = load_two(w + column * k + first, count);
          store_two(wide + first, low, high, count);
        });
        factors = wide.get();
      }
      const int64_t first_panel = task / blocks * kPanelsOfTask;
      for (int64_t panel = first_panel; panel < std::min(first_panel + kPanelsOfTask, panels); ++panel) {
        const int64_t first = panel * kPanel, rows = std::min(kPanel, m - first);
        const auto [multiply, width] = kernel_of(rows);
        multiply(packed + first * k, factors, columns, k, sums.get());
        unpack(sums.get(), columns, width, rows, y + first * n + column, n, turned.get());
      }
    }
  });
}

void row_product(const at::Tensor& y, const at::Tensor& x, const at::Tensor& w) {
  const int64_t m = x.size(0), n = w.size(0), k = x.size(1);
  const auto multiply = [&]<typename T>() {
    multiply_rows(y.mutable_data_ptr<T>(), x.const_data_ptr<T>(), w.const_data_ptr<T>(), m, n, k);
  };
  if (x.scalar_type() == at::kFloat) {
    multiply.operator()<float>();
  } else {
    multiply.operator()<at::BFloat16>();
  }
}

}  // namespace
}  // namespace illada::CPU_CAPABILITY

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_row_product_stub, &illada::CPU_CAPABILITY::row_product)

}  // namespace at::native
