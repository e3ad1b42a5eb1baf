"""Weight gradients are summed in fp32 in every linear: what one micro-batch adds is not rounded to bf16 first."""

import pytest
import torch
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.ops import kernels
from illada_megatron.ops.add_product import add_product_
from illada_megatron.runtime import Runtime


def _bf16(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": "bf16"})})


def _step(model: torch.nn.Module, tokens: Tensor) -> None:
    from illada_megatron.model import equal_segments

    count = tokens.numel()
    loss_weight = torch.full((count,), 2.0)
    segments = equal_segments(1, count, "cpu")
    output = model(tokens[None], segments, labels=tokens, loss_weight=loss_weight, grad_scale=1 / count)
    (output.loss_sum / count).backward()


def test_no_linear_rounds_its_gradient(tiny_config: RunConfig, single_process: Runtime) -> None:
    """One that went through a bf16 gradient holds bf16 numbers alone."""
    from illada_megatron.model import build_model_chunks, fill_initial_weights
    from illada_megatron.training.setup import wrap_data_parallel

    config = _bf16(tiny_config)
    models = build_model_chunks(config, single_process.device)
    fill_initial_weights(models, config.model, seed=3)
    (wrapped,) = wrap_data_parallel(config.parallel, models)
    wrapped.zero_grad_buffer()
    _step(wrapped, torch.randint(0, 250, (96,), generator=torch.Generator().manual_seed(0)))
    matrices = [(name, one) for name, one in wrapped.module.named_parameters() if one.dim() == 2]
    assert {name.split(".")[-2] for name, _ in matrices} >= {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    for name, parameter in matrices:
        assert parameter.dtype == torch.bfloat16
        rounded = (parameter.main_grad.bfloat16().float() == parameter.main_grad).float().mean()
        assert rounded < 0.5, name


def test_small_gradients_of_many_microbatches_are_kept(single_process: Runtime, tiny_config: RunConfig) -> None:
    """A layer's main_grad after 64 micro-batches against fp64, where sums of bf16 gradients are off by 2^-9."""
    from illada_megatron.model import transformer_config
    from illada_megatron.model.remade_input import RowLinear

    config = transformer_config(_bf16(tiny_config), single_process.device, "local")
    layer = RowLinear(
        64, 48, config=config, init_method=torch.nn.init.normal_, bias=False, input_is_parallel=True, skip_bias_add=True
    )
    layer.weight.main_grad = torch.zeros(48, 64)
    layer.weight.grad_added_to_main_grad = False
    exact, gen = torch.zeros(48, 64, dtype=torch.float64), torch.Generator().manual_seed(0)
    for _ in range(64):
        inputs, gradient = (torch.randn(32, 1, size, generator=gen).bfloat16() for size in (64, 48))
        output, _bias = layer(inputs.requires_grad_())
        output.backward(gradient)
        exact += gradient[:, 0].double().T @ inputs.detach()[:, 0].double()
    assert layer.weight.grad_added_to_main_grad
    torch.testing.assert_close(layer.weight.main_grad.double(), exact, rtol=1e-5, atol=1e-4)


def test_ddp_is_told_of_each_gradient(tiny_config: RunConfig, single_process: Runtime) -> None:
    """Also of layers whose input is made again: an overlapped reduction waits for what autograd hands over."""
    from illada_megatron.model import build_model_chunks, fill_initial_weights
    from illada_megatron.training.setup import wrap_data_parallel

    overlapped = tiny_config.parallel.model_copy(update={"overlap_grad_reduce": True})
    models = build_model_chunks(tiny_config, single_process.device)
    fill_initial_weights(models, tiny_config.model, seed=3)
    (wrapped,) = wrap_data_parallel(overlapped, models)
    wrapped.zero_grad_buffer()
    _step(wrapped, torch.arange(96))
    linears = [one for name, one in wrapped.module.named_parameters() if ".linear_" in name and one.dim() == 2]
    assert len(linears) == 4 * tiny_config.model.num_layers
    assert all(one.grad_added_to_main_grad for one in linears)


def test_a_layer_without_main_grad_differentiates_as_ever(single_process: Runtime, tiny_config: RunConfig) -> None:
    from illada_megatron.model import transformer_config
    from illada_megatron.model.remade_input import ColumnLinear

    config = transformer_config(tiny_config, single_process.device, "local")
    layer = ColumnLinear(
        8, 6, config=config, init_method=torch.nn.init.normal_, bias=False, gather_output=False, skip_bias_add=True
    )
    inputs = torch.randn(5, 1, 8)
    layer(inputs)[0].sum().backward()
    torch.testing.assert_close(layer.weight.grad, inputs.sum((0, 1)).expand(6, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(5, 3, 7), (130, 33, 64), (300, 600, 1040), (257, 1031, 96)], ids=str)
def test_add_product(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """bf16 factors into an fp32 sum: odd sizes, more columns than are packed at once, and a left factor that is a
    transposed view of a wider matrix."""
    gen = torch.Generator().manual_seed(0)
    m, k, n = sizes
    for a in (torch.randn(m, k, generator=gen), torch.randn(k, m + 9, generator=gen)[:, :m].T):
        a, b = a.to(dtype), torch.randn(k, n, generator=gen).to(dtype)
        total = torch.randn(m, n, generator=gen)
        expected = total.double() + a.double() @ b.double()
        add_product_(total, a, b)
        torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * k**0.5)


@pytest.mark.skipif(not kernels.has_cpu_products(torch.bfloat16), reason="this CPU does not multiply bf16 itself")
def test_the_compiled_product() -> None:
    total, ones = torch.zeros(2, 2), torch.ones(2, 2).bfloat16()
    torch.ops.illada.add_product_(total, ones, ones)
    assert total.tolist() == [[2.0, 2.0], [2.0, 2.0]]


@pytest.mark.skipif(kernels.has_cpu_products(torch.bfloat16), reason="this CPU multiplies bf16 itself")
def test_a_cpu_without_bf16_says_so() -> None:
    ones = torch.ones(2, 2).bfloat16()
    with pytest.raises(NotImplementedError, match="bfloat16"):
        torch.ops.illada.add_product_(torch.zeros(2, 2), ones, ones)
