"""Stand-ins on a CPU for those of Transformer Engine's kernels (`transformer_engine_torch`, 2.11.0) that a layer of the
mask predictor calls: they round to real e4m3 and e5m2 with real factors, and multiply what that leaves in fp32.

What they do not show: the order of a tensor core's sums, and any speed.
"""

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

GEMMS: Counter[str] = Counter()
"""Matrix products so far by the formats of their operands, as "e4m3 x e5m2" or "bf16 x bf16"."""
BLOCK = 128
_LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}
_TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, _noop: Any = None) -> Any:
    """tensor [..., k] -> FP8 and factors in Transformer Engine's own tensor class, as `quantizer` says."""
    out = output
    if out is None:
        out = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    rows = tensor.detach().reshape(-1, tensor.shape[-1]).float()
    if hasattr(quantizer, "block_scaling_dim"):
        _quantize_blocks(rows, quantizer, out)
    else:
        _quantize_whole(rows, quantizer, out)
    return out


def _quantize_whole(rows: Tensor, quantizer: Any, out: Any) -> None:
    """One factor for the tensor: of its own largest value, or (delayed scaling) the one that `quantizer` has."""
    name, amax = format_name(quantizer.dtype), rows.abs().amax()
    if hasattr(quantizer, "use_existing_amax"):
        quantizer.amax.copy_(amax)
        quantizer.scale.copy_(_factors(amax, name, quantizer.force_pow_2_scales))
    elif quantizer.amax.numel():
        quantizer.amax.copy_(torch.maximum(quantizer.amax, amax))
    data = _rounded(rows * quantizer.scale, name)
    out._scale_inv.copy_(1.0 / quantizer.scale)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.t().reshape(out._transpose.shape))
        out._transpose_invalid = False


def _quantize_blocks(rows: Tensor, quantizer: Any, out: Any) -> None:
    """A factor for 1 x 128 values, along rows and again along columns, or for 128 x 128."""
    if quantizer.all_gather_usage:
        raise NotImplementedError("blocks in the order of an all-gather have no stand-in: use one tensor parallel rank")
    square = quantizer.block_scaling_dim == 2
    if out._rowwise_data is not None:
        data, inverse = _blocks(rows, quantizer, square)
        out._rowwise_data.copy_(data.view(out._rowwise_data.shape))
        _fill(out._rowwise_scale_inv, inverse)
    if out._columnwise_data is not None:
        data, inverse = _blocks(rows.t(), quantizer, square)
        out._columnwise_data.copy_(data.reshape(out._columnwise_data.shape))
        _fill(out._columnwise_scale_inv, inverse)


def _blocks(rows: Tensor, quantizer: Any, square: bool) -> tuple[Tensor, Tensor]:
    """[m, k] -> bytes [m, k], inverse factors [k / 128, m] (square: [m / 128, k / 128])."""
    name = format_name(quantizer.dtype)
    amax = _padded(rows.abs(), square)
    if square:
        amax = amax.view(-1, BLOCK, amax.shape[1] // BLOCK, BLOCK).amax((1, 3))
    else:
        amax = amax.view(len(amax), -1, BLOCK).amax(2)
    factors = _factors(amax, name, quantizer.force_pow_2_scales)
    data = _rounded(rows * _spread(factors, rows.shape, square), name)
    return data, 1.0 / (factors if square else factors.t())


def _spread(factors: Tensor, shape: torch.Size, square: bool) -> Tensor:
    """Each block's factor for each of its elements."""
    if square:
        factors = factors.repeat_interleave(BLOCK, 0)[: shape[0]]
    return factors.repeat_interleave(BLOCK, 1)[:, : shape[1]]


def _padded(rows: Tensor, square: bool) -> Tensor:
    below = -len(rows) % BLOCK if square else 0
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % BLOCK, 0, below))


def _fill(target: Tensor, values: Tensor) -> None:
    """Behind the values lies padding."""
    target.zero_()
    target[: values.shape[0], : values.shape[1]] = values


def _factors(amax: Tensor, name: str, powers_of_2: bool) -> Tensor:
    factors = torch.where(amax > 0, _LARGEST[name] / amax, torch.ones_like(amax))
    return torch.exp2(torch.floor(torch.log2(factors))) if powers_of_2 else factors


def _rounded(values: Tensor, name: str) -> Tensor:
    """The bytes of values that saturate."""
    return values.clamp(-_LARGEST[name], _LARGEST[name]).to(_TORCH[name]).view(torch.uint8)


def format_name(dtype: Any) -> str:
    """Of Transformer Engine's DType."""
    return {"kFloat8E4M3": "e4m3", "kFloat8E5M2": "e5m2"}[dtype.name]


def dequantize(tensor: Any, dtype: Any = None) -> Tensor:
    """What its bytes stand for."""
    values, _ = _operand(tensor, along_columns=False)
    shape = tensor._data.shape if hasattr(tensor, "_data") else tensor._rowwise_data.shape
    wanted = getattr(tensor, "dtype", torch.float32) if dtype is None else _TORCH_OF[dtype.name]
    return values.reshape(shape).to(wanted)


def fp8_transpose(data: Tensor, _dtype: Any, *, out: Tensor | None = None) -> Tensor:
    """[..., k] bytes -> [k, ...]."""
    turned = data.reshape(-1, data.shape[-1]).t().reshape(data.shape[-1], *data.shape[:-1]).contiguous()
    return turned if out is None else out.copy_(turned)


def _operand(tensor: Any, along_columns: bool) -> tuple[Tensor, str]:
    """[m, k] in fp32 from its bytes, those along columns where the product runs along them, and its format."""
    if hasattr(tensor, "_rowwise_data"):
        return _block_operand(tensor, along_columns)
    if not hasattr(tensor, "_scale_inv"):
        name = str(tensor.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        return tensor.reshape(-1, tensor.shape[-1]).float(), name
    name = format_name(tensor._fp8_dtype)
    turned = tensor._transpose is not None and (along_columns or tensor._data is None)
    data = tensor._transpose if turned else tensor._data
    values = data.reshape(data.shape[0], -1).t() if turned else data.reshape(-1, data.shape[-1])
    return values.contiguous().view(_TORCH[name]).float() * tensor._scale_inv, name


def _block_operand(tensor: Any, along_columns: bool) -> tuple[Tensor, str]:
    name, square = format_name(tensor._fp8_dtype), tensor._is_2D_scaled
    data = tensor._columnwise_data if along_columns else tensor._rowwise_data
    inverse = tensor._columnwise_scale_inv if along_columns else tensor._rowwise_scale_inv
    rows = data.reshape(data.shape[0], -1) if along_columns else data.reshape(-1, data.shape[-1])
    m, k = rows.shape
    counts = (math.ceil(m / BLOCK), math.ceil(k / BLOCK)) if square else (math.ceil(k / BLOCK), m)
    inverse = inverse[: counts[0], : counts[1]]
    values = rows.contiguous().view(_TORCH[name]).float() * _spread(
        inverse if square else inverse.t(), rows.shape, square
    )
    return (values.t() if along_columns else values), name


def generic_gemm(
    a: Any,
    transa: bool,
    b: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    _bias_dtype: Any,
    gelu: bool,
    _gelu_in: Any,
    grad: bool,
    _workspace: Tensor,
    _workspace_bytes: int,
    accumulate: bool,
    _split_accumulator: bool,
    **_: Any,
) -> tuple[Any, Tensor | None, None, None]:
    """op(b) @ op(a), of cuBLAS's column-major point of view: forward (TN) input @ weight^T, gradients of inputs (NN)
    gradient @ weight, of weights (NT) gradient^T @ input."""
    if gelu:
        raise NotImplementedError("a product fused with GELU has no stand-in")
    left, left_name = _operand(b, along_columns=transb)
    right, right_name = _operand(a, along_columns=not transa)
    GEMMS[f"{left_name} x {right_name}"] += 1
    result = (left.t() if transb else left) @ (right.t() if transa else right)
    bias_gradient = None
    if grad and bias is not None:
        bias_gradient = left.sum(0).to(bias.dtype)
    elif bias is not None and bias.numel():
        result = result + bias
    result = result.view(*b.size()[:-1], result.shape[-1]) if not transb else result
    if quantizer is not None:
        return quantize(result.to(torch.bfloat16), quantizer), bias_gradient, None, None
    if out is None:
        return result.to(_TORCH_OF[out_dtype.name]), bias_gradient, None, None
    out.add_(result.view(out.shape)) if accumulate else out.copy_(result.view(out.shape))
    return out, bias_gradient, None, None


_TORCH_OF = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16}


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: Any, _margin: int, centered: bool
) -> tuple[Any, None, Tensor]:
    """x [t, h] -> its norm, quantised where `quantizer` is given, and 1 / root mean square [t]."""
    rows = x.float()
    inverse = torch.rsqrt(rows.square().mean(-1) + eps)
    gain = weight.float() + 1.0 if centered else weight.float()
    result = (rows * inverse[..., None] * gain).to(_TORCH_OF[dtype.name])
    if quantizer is not None:
        return quantize(result, quantizer, out), None, inverse
    return (result if out is None else out.copy_(result)), None, inverse


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, _margin: int, centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x [t, h] and of the weight [h]."""
    rows, given = x.float(), gradient.view_as(x).float()
    gain = weight.float() + 1.0 if centered else weight.float()
    normal = rows * inverse.view(*rows.shape[:-1], 1)
    scaled = given * gain
    dx = (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * inverse.view(*rows.shape[:-1], 1)
    return dx.to(x.dtype), (given * normal).reshape(-1, rows.shape[-1]).sum(0).to(weight.dtype)


def compute_amax(tensor: Tensor, amax: Tensor) -> None:
    """Its largest value."""
    amax.copy_(tensor.abs().amax())


def multi_tensor_compute_scale_and_scale_inv(
    _chunk: int, _overflow: Tensor, lists: Any, largest: float, powers_of_2: bool, _epsilon: float
) -> None:
    """lists: largest values of tensors, and where their factors and the inverses go."""
    name = next(name for name, value in _LARGEST.items() if value == largest)
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_factors(amax, name, powers_of_2))
        inverse.copy_(1.0 / scale)


def multi_tensor_scale(_chunk: int, _overflow: Tensor, lists: Any, scale: float) -> None:
    """lists: from, to."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(_chunk: int, _overflow: Tensor, lists: Any, _per_tensor: bool) -> tuple[Tensor, None]:
    """Norm of all elements, fp32."""
    return torch.stack([one.float().norm() for one in lists[0]]).norm(), None
