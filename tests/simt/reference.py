"""The two passes over a chunk of logits in fp64, and how far fp32 arithmetic may be from them."""

import torch
from torch import Tensor

_EPS = 2.0**-24  # half a unit in fp32's last place, relative


def capped(logits: Tensor, softcap: float) -> Tensor:
    """z of the logits, in their own dtype."""
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def statistics(logits: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """`[3, m]`: maximum, sum of exp(z - maximum), z at the target or -inf; plainly, in the dtype of `logits`."""
    m, v = logits.shape
    z = capped(logits, softcap)
    held = (targets >= 0) & (targets < v)
    if v == 0:
        return logits.new_tensor([-torch.inf, 0, -torch.inf])[:, None].expand(3, m)
    maximum = z.amax(1)
    finite = torch.where(maximum == -torch.inf, 0, maximum)
    label = z.gather(1, torch.where(held, targets, 0)[:, None])[:, 0]
    return torch.stack((maximum, (z - finite[:, None]).exp().sum(1), torch.where(held, label, -torch.inf)))


def assert_statistics(found: Tensor, logits: Tensor, targets: Tensor, softcap: float) -> None:
    """Maximum and label are exact without softcap; the sum is as exact as adding in groups of a few dozen is."""
    expected = statistics(logits.double(), targets, softcap)
    z_error = 6 * _EPS * softcap
    torch.testing.assert_close(found[::2].double(), expected[::2], rtol=0, atol=z_error, equal_nan=True)
    rtol = 50 * _EPS + 2 * z_error
    torch.testing.assert_close(found[1].double(), expected[1], rtol=rtol, atol=0, equal_nan=True)


def assert_gradient(found: Tensor, logits: Tensor, targets: Tensor, row_values: Tensor, softcap: float) -> None:
    """`found` is the gradient of `logits` (both of the same dtype) to its rounding and that of fp32 arithmetic.

    row_values `[4, m]` float32: maximum, log of the sum, softmax's scale, label's scale.
    """
    assert found.dtype == logits.dtype
    if logits.numel() == 0:
        return
    values = logits.double()
    maximum, log_sum, softmax_scale, label_scale = row_values.double()[:, :, None]
    z = capped(values, softcap)
    d = (z - maximum) - log_sum
    at_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    terms = torch.where(at_target, label_scale * d.expm1(), 0), (softmax_scale - at_target * label_scale) * d.exp()
    slope = 1 - (z / softcap) ** 2 if softcap > 0 else torch.ones_like(z)
    expected = (terms[0] + terms[1]) * slope

    # Of exp and the products; of d, which is rounded; of z and of the slope, which the cap makes
    size = terms[0].abs() + terms[1].abs()
    finite_d = torch.where(d.isfinite(), d.abs(), 0)
    error = size * (slope * _EPS * (8 + 2 * finite_d + 6 * softcap) + (6 * _EPS if softcap > 0 else 0))
    info = torch.finfo(logits.dtype)
    error += (expected.abs() + error) * info.eps / 2 + info.smallest_normal * info.eps + 1e-44 * softmax_scale
    difference = (found.double() - expected).abs()
    outside = ~((difference <= error) | (found.isnan() & expected.isnan()))
    if outside.any():
        i, j = outside.nonzero()[0].tolist()
        raise AssertionError(
            f"{int(outside.sum())} of {outside.numel()} gradients are off, first at row {i}, column {j} (target "
            f"{int(targets[i])}): found {float(found[i, j])}, expected {float(expected[i, j])} +- {float(error[i, j])}"
        )
