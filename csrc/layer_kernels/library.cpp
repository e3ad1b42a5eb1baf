// Schemas of the layers' operators, their checks and their CPU implementations.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu_kernels.h"

namespace at::native {

DEFINE_DISPATCH(illada_attention_forward_stub);
DEFINE_DISPATCH(illada_attention_backward_stub);
DEFINE_DISPATCH(illada_rms_norm_forward_stub);
DEFINE_DISPATCH(illada_rms_norm_backward_stub);
DEFINE_DISPATCH(illada_swiglu_forward_stub);
DEFINE_DISPATCH(illada_swiglu_backward_stub);

}  // namespace at::native

namespace illada {
namespace {

void check_dtype(const char* name, const at::Tensor& tensor) {
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16, name, " must be float32 or bfloat16, found ", dtype);
}

void check_same_dtype(const char* name, const at::Tensor& tensor, const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), name, " must be ", other.scalar_type(),
                   " as the input, found ", tensor.scalar_type());
}

void check_table(const char* name, const at::Tensor& table, int64_t longest, int64_t dim) {
  TORCH_CHECK_TYPE(table.scalar_type() == at::kFloat, name, " must be float32, found ", table.scalar_type());
  TORCH_CHECK(table.dim() == 2 && table.size(0) >= longest && table.size(1) == dim / 2, name, " must be [>= ", longest,
              ", ", dim / 2, "], a row for each position of the longest segment, found ", table.sizes());
}

std::vector<Segment> segments_of(const at::Tensor& cu_seqlens, int64_t tokens) {
  TORCH_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt, "cu_seqlens must be int32, found ", cu_seqlens.scalar_type());
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, "cu_seqlens must be [n + 1], found ",
              cu_seqlens.sizes());
  const at::Tensor offsets = cu_seqlens.contiguous();
  const int32_t* offset = offsets.const_data_ptr<int32_t>();
  const int64_t count = offsets.numel() - 1;
  TORCH_CHECK_VALUE(offset[0] == 0 && offset[count] == tokens, "cu_seqlens must lead from 0 to the ", tokens,
                    " tokens of qkv, found ", offset[0], " to ", offset[count]);
  std::vector<Segment> segments;
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(offset[i] <= offset[i + 1], "cu_seqlens must not fall, found ", offset[i], " before ",
                      offset[i + 1]);
    if (offset[i] < offset[i + 1]) segments.push_back({offset[i], offset[i + 1] - offset[i]});
  }
  return segments;
}

// The arguments, checked, in the form that the kernels take; qkv, cos and sin are contiguous.
AttentionProblem problem_of(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin,
                            const at::Tensor& cu_seqlens, double scale) {
  check_dtype("qkv", qkv);
  TORCH_CHECK(qkv.dim() == 4 && qkv.size(2) >= 3 && qkv.size(3) % 2 == 0,
              "qkv must be [tokens, groups, query heads of a group + 2, an even size of a head], found ", qkv.sizes());
  TORCH_CHECK_VALUE(scale > 0, "scale must be positive, found ", scale);
  AttentionProblem problem{qkv.scalar_type(),
                           segments_of(cu_seqlens, qkv.size(0)),
                           qkv.size(0),
                           qkv.size(1),
                           qkv.size(2) - 2,
                           qkv.size(3),
                           static_cast<float>(scale),
                           cos.const_data_ptr<float>(),
                           sin.const_data_ptr<float>(),
                           qkv.const_data_ptr()};
  int64_t longest = 0;
  for (const Segment& segment : problem.segments) longest = std::max(longest, segment.length);
  check_table("cos", cos, longest, problem.dim);
  check_table("sin", sin, longest, problem.dim);
  return problem;
}

std::tuple<at::Tensor, at::Tensor> segment_attention(const at::Tensor& qkv, const at::Tensor& cos,
                                                     const at::Tensor& sin, const at::Tensor& cu_seqlens,
                                                     double scale) {
  const at::Tensor rows = qkv.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
  const AttentionProblem problem = problem_of(rows, cosines, sines, cu_seqlens, scale);
  at::Tensor out = at::empty({problem.tokens, problem.heads(), problem.dim}, qkv.options());
  at::Tensor lse = at::empty({problem.heads(), problem.tokens}, qkv.options().dtype(at::kFloat));
  at::native::illada_attention_forward_stub(at::kCPU, problem, out.mutable_data_ptr(), lse.mutable_data_ptr<float>());
  return {out, lse};
}

at::Tensor segment_attention_backward(const at::Tensor& grad_out, const at::Tensor& qkv, const at::Tensor& cos,
                                      const at::Tensor& sin, const at::Tensor& cu_seqlens, const at::Tensor& out,
                                      const at::Tensor& lse, double scale) {
  const at::Tensor rows = qkv.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
  const AttentionProblem problem = problem_of(rows, cosines, sines, cu_seqlens, scale);
  const std::vector<int64_t> shape{problem.tokens, problem.heads(), problem.dim};
  TORCH_CHECK(grad_out.sizes() == shape && out.sizes() == shape, "grad_out and out must be ", at::IntArrayRef(shape),
              ", found ", grad_out.sizes(), " and ", out.sizes());
  check_same_dtype("grad_out", grad_out, qkv);
  check_same_dtype("out", out, qkv);
  TORCH_CHECK(lse.dim() == 2 && lse.size(0) == problem.heads() && lse.size(1) == problem.tokens, "lse must be [",
              problem.heads(), ", ", problem.tokens, "], found ", lse.sizes());
  const at::Tensor outs = out.contiguous(), grads = grad_out.contiguous(), sums = lse.contiguous();
  at::Tensor grad_qkv = at::empty(rows.sizes(), rows.options());
  at::native::illada_attention_backward_stub(at::kCPU, problem, outs.const_data_ptr(), sums.const_data_ptr<float>(),
                                             grads.const_data_ptr(), grad_qkv.mutable_data_ptr());
  return grad_qkv;
}

RmsNormShape rms_norm_shape(const at::Tensor& x, const at::Tensor& weight) {
  check_dtype("x", x);
  TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && x.size(-1) == weight.size(0) && weight.size(0) > 0,
              "weight must be as long as a row of x, found x ", x.sizes(), " and weight ", weight.sizes());
  check_same_dtype("weight", weight, x);
  return {x.scalar_type(), x.numel() / weight.size(0), weight.size(0)};
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const RmsNormShape shape = rms_norm_shape(x, weight);
  const at::Tensor rows = x.contiguous(), weights = weight.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options()), rstd = at::empty({shape.rows}, x.options().dtype(at::kFloat));
  at::native::illada_rms_norm_forward_stub(at::kCPU, shape, static_cast<float>(eps), rows.const_data_ptr(),
                                           weights.const_data_ptr(), y.mutable_data_ptr(),
                                           rstd.mutable_data_ptr<float>());
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, const at::Tensor& rstd) {
  const RmsNormShape shape = rms_norm_shape(x, weight);
  TORCH_CHECK(grad.sizes() == x.sizes(), "grad must be ", x.sizes(), " as x, found ", grad.sizes());
  check_same_dtype("grad", grad, x);
  TORCH_CHECK(rstd.numel() == shape.rows, "rstd must be [", shape.rows, "], found ", rstd.sizes());
  const at::Tensor grads = grad.contiguous(), rows = x.contiguous(), weights = weight.contiguous();
  const at::Tensor factors = rstd.contiguous();
  at::Tensor grad_x = at::empty(x.sizes(), x.options()), grad_weight = at::empty(weight.sizes(), weight.options());
  at::native::illada_rms_norm_backward_stub(at::kCPU, shape, grads.const_data_ptr(), rows.const_data_ptr(),
                                            weights.const_data_ptr(), factors.const_data_ptr<float>(),
                                            grad_x.mutable_data_ptr(), grad_weight.mutable_data_ptr());
  return {grad_x, grad_weight};
}

// [..., 2 f] -> [..., f]
std::vector<int64_t> swiglu_shape(const at::Tensor& x) {
  check_dtype("x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) % 2 == 0,
              "x must be [..., 2 f], gate and up beside each other, found ", x.sizes());
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() /= 2;
  return shape;
}

at::Tensor swiglu(const at::Tensor& x) {
  const std::vector<int64_t> shape = swiglu_shape(x);
  const at::Tensor rows = x.contiguous();
  at::Tensor y = at::empty(shape, x.options());
  at::native::illada_swiglu_forward_stub(at::kCPU, x.scalar_type(), y.numel() / shape.back(), shape.back(),
                                         rows.const_data_ptr(), y.mutable_data_ptr());
  return y;
}

at::Tensor swiglu_backward(const at::Tensor& grad, const at::Tensor& x) {
  const std::vector<int64_t> shape = swiglu_shape(x);
  TORCH_CHECK(grad.sizes() == shape, "grad must be ", at::IntArrayRef(shape), ", found ", grad.sizes());
  check_same_dtype("grad", grad, x);
  const at::Tensor grads = grad.contiguous(), rows = x.contiguous();
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  at::native::illada_swiglu_backward_stub(at::kCPU, x.scalar_type(), grad.numel() / shape.back(), shape.back(),
                                          grads.const_data_ptr(), rows.const_data_ptr(), grad_x.mutable_data_ptr());
  return grad_x;
}

// What the operators return of tensors without data; the checks are the CPU implementations'.

std::tuple<at::Tensor, at::Tensor> segment_attention_meta(const at::Tensor& qkv, const at::Tensor&, const at::Tensor&,
                                                          const at::Tensor&, double) {
  const c10::SymInt tokens = qkv.sym_size(0), heads = qkv.sym_size(1) * (qkv.sym_size(2) - 2);
  return {at::empty_symint({tokens, heads, qkv.sym_size(3)}, qkv.options()),
          at::empty_symint({heads, tokens}, qkv.options().dtype(at::kFloat))};
}

at::Tensor segment_attention_backward_meta(const at::Tensor&, const at::Tensor& qkv, const at::Tensor&,
                                           const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           double) {
  return at::empty_symint(qkv.sym_sizes(), qkv.options());
}

std::tuple<at::Tensor, at::Tensor> rms_norm_meta(const at::Tensor& x, const at::Tensor& weight, double) {
  return {at::empty_symint(x.sym_sizes(), x.options()),
          at::empty_symint({x.sym_numel() / weight.sym_size(0)}, x.options().dtype(at::kFloat))};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward_meta(const at::Tensor&, const at::Tensor& x,
                                                          const at::Tensor& weight, const at::Tensor&) {
  return {at::empty_symint(x.sym_sizes(), x.options()), at::empty_symint(weight.sym_sizes(), weight.options())};
}

at::Tensor swiglu_meta(const at::Tensor& x) {
  std::vector<c10::SymInt> shape = x.sym_sizes().vec();
  shape.back() = shape.back() / 2;
  return at::empty_symint(shape, x.options());
}

at::Tensor swiglu_backward_meta(const at::Tensor&, const at::Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(illada, library) {
  library.def(
      "segment_attention(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens, float scale) -> (Tensor, Tensor)");
  library.def(
      "segment_attention_backward(Tensor grad_out, Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor out, "
      "Tensor lse, float scale) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)");
  library.def("swiglu(Tensor x) -> Tensor");
  library.def("swiglu_backward(Tensor grad, Tensor x) -> Tensor");
}

TORCH_LIBRARY_IMPL(illada, CPU, library) {
  library.impl("segment_attention", &segment_attention);
  library.impl("segment_attention_backward", &segment_attention_backward);
  library.impl("rms_norm", &rms_norm);
  library.impl("rms_norm_backward", &rms_norm_backward);
  library.impl("swiglu", &swiglu);
  library.impl("swiglu_backward", &swiglu_backward);
}

TORCH_LIBRARY_IMPL(illada, Meta, library) {
  library.impl("segment_attention", &segment_attention_meta);
  library.impl("segment_attention_backward", &segment_attention_backward_meta);
  library.impl("rms_norm", &rms_norm_meta);
  library.impl("rms_norm_backward", &rms_norm_backward_meta);
  library.impl("swiglu", &swiglu_meta);
  library.impl("swiglu_backward", &swiglu_backward_meta);
}

}  // namespace illada
