// The products themselves are oneDNN's (brgemm, which torch exports): blocks of rows of a in parallel, times blocks of
// b that stay in the second-level cache, packed once into pairs of rows as the processor's bf16 dot product takes them.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>

#include "add_product.h"

namespace illada {
namespace {
inline namespace CPU_CAPABILITY {

using c10::BFloat16;

constexpr int64_t kBlockRows = 64;     // of a
constexpr int64_t kCopyRows = 256;     // of a are copied at a time where they have to be
constexpr int64_t kBlockInner = 512;   // columns of a, rows of b: with 512 columns of b 512 kB
constexpr int64_t kPackRows = 8192;    // of b, and
constexpr int64_t kPackColumns = 512;  // of it: what its packed copy may take is bounded
constexpr int64_t kTile = 32;          // what at::vec transposes at once
constexpr int64_t kMultiple = 32;      // of inner columns: with AMX, oneDNN reads to the end of the last 32

int64_t padded(int64_t count) { return (count + kMultiple - 1) / kMultiple * kMultiple; }

const BFloat16* elements(const at::TensorBase& tensor) { return static_cast<const BFloat16*>(tensor.const_data_ptr()); }

// b [k, n] -> [padded(k) / 2, n, 2]; behind the last row are zeros
at::Tensor pack_pairs(const at::TensorBase& b) {
  const int64_t k = b.size(0), n = b.size(1), stride = b.stride(0), pairs = padded(k) / 2;
  at::Tensor packed = at::empty({pairs, n, 2}, b.options());
  const auto* from = reinterpret_cast<const uint16_t*>(elements(b));
  auto* to = static_cast<uint32_t*>(packed.mutable_data_ptr());
  at::parallel_for(0, pairs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const uint16_t* even = from + 2 * pair * stride;
      const uint16_t* odd = even + stride;
      uint32_t* out = to + pair * n;
      if (2 * pair + 1 < k) {
        for (int64_t j = 0; j < n; ++j) {
          out[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
        }
      } else if (2 * pair < k) {
        std::copy_n(even, n, out);
      } else {
        std::fill_n(out, n, 0u);
      }
    }
  });
  return packed;
}

// A block of a `[rows, inner]` whose elements are `strides` apart, as rows of `padded` elements; those beyond are zero.
void copy_block(const BFloat16* from, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t inner,
                int64_t padded, BFloat16* to) {
  for (int64_t column = 0; column < inner; column += kTile) {  // outside: a transposed block is read along its rows
    for (int64_t row = 0; row < rows; row += kTile) {
      const int64_t height = std::min(kTile, rows - row), width = std::min(kTile, inner - column);
      const BFloat16* tile = from + row * row_stride + column * column_stride;
      BFloat16* out = to + row * padded + column;
      if (row_stride == 1) {
        at::vec::transpose_mxn<BFloat16>(tile, column_stride, out, padded, static_cast<int>(width),
                                         static_cast<int>(height));
        continue;
      }
      for (int64_t i = 0; i < height; ++i) {
        for (int64_t j = 0; j < width; ++j) {
          out[i * padded + j] = tile[i * row_stride + j * column_stride];
        }
      }
    }
  }
  for (int64_t row = 0; row < rows; ++row) {
    std::fill(to + row * padded + inner, to + (row + 1) * padded, BFloat16(0.0f));
  }
}

// total += a b for so many columns of a that b's rows are packed at once.
void add_packed_product(const at::TensorBase& total, const at::TensorBase& a, const at::TensorBase& b) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1), stride = total.stride(0);
  const at::Tensor packed = pack_pairs(b);
  const BFloat16* pairs = elements(packed);
  auto* sum = static_cast<float*>(total.mutable_data_ptr());
  at::parallel_for(0, (m + kBlockRows - 1) / kBlockRows, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlockRows, m);
    const at::Tensor copy = at::empty({kCopyRows, kBlockInner}, a.options());
    for (int64_t inner = 0; inner < k; inner += kBlockInner) {
      const int64_t count = std::min(kBlockInner, k - inner), full = padded(count);
      for (int64_t top = begin * kBlockRows; top < last; top += kCopyRows) {
        const int64_t bottom = std::min(top + kCopyRows, last);
        const BFloat16* factor = elements(a) + top * a.stride(0) + inner * a.stride(1);
        int64_t factor_stride = a.stride(0);
        if (a.stride(1) != 1 || count != full) {
          auto* block = static_cast<BFloat16*>(copy.mutable_data_ptr());
          copy_block(factor, a.stride(0), a.stride(1), bottom - top, count, full, block);
          factor = block;
          factor_stride = full;
        }
        for (int64_t first = top; first < bottom; first += kBlockRows) {
          at::native::cpublas::brgemm(std::min(kBlockRows, bottom - first), n, full, factor_stride, n, stride, true,
                                      factor + (first - top) * factor_stride, pairs + inner * n, sum + first * stride);
        }
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

void add_product(const at::Tensor& total, const at::Tensor& a, const at::Tensor& b) {
  const int64_t k = b.size(0), n = b.size(1);
  for (int64_t first = 0; first < k; first += kPackRows) {
    const int64_t count = std::min(kPackRows, k - first);
    for (int64_t column = 0; column < n; column += kPackColumns) {
      const int64_t width = std::min(kPackColumns, n - column);
      add_packed_product(total.narrow(1, column, width), a.narrow(1, first, count),
                         b.narrow(0, first, count).narrow(1, column, width));
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace
}  // namespace illada

namespace at::native {

ALSO_REGISTER_AVX512_DISPATCH(illada_add_product_stub, &illada::add_product)

}  // namespace at::native
