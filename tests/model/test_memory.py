"""What is not kept, copied or made in full: gradients stay what autograd alone would make of them."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.runtime import Runtime

LENGTHS = [0, 300, 512]


def build(config: RunConfig, run: Runtime) -> torch.nn.Module:
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    (model,) = build_model_chunks(config, run.device)
    fill_initial_weights([model], config.model, seed=3)
    return model


def step(model: torch.nn.Module, grad_scale: float | None) -> float:
    """One forward and backward pass over two segments."""
    from illada_megatron.model import pack

    gen = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 250, (1, 512), generator=gen)
    loss_weight = (torch.rand(512, generator=gen) < 0.5).float() * 2
    segments = pack(torch.tensor(LENGTHS, dtype=torch.int32), max(b - a for a, b in pairwise(LENGTHS)))
    output = model(tokens, segments, labels=tokens[0], loss_weight=loss_weight, grad_scale=grad_scale)
    (output.loss_sum * (grad_scale or 1 / 512)).backward()
    return float(output.loss_sum.detach())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("loss_in_main_grad", [True, False])
def test_main_grad_gets_what_autograd_makes(
    tied: bool, loss_in_main_grad: bool, tiny_config: RunConfig, single_process: Runtime
) -> None:
    """The embedding's rows, the head's gradient and the linears' behind what is not kept, under megatron-core's DDP."""
    from illada_megatron.training.gradient_reduction import wrap_data_parallel

    config = tiny_config.model_copy(
        update={"model": tiny_config.model.model_copy(update={"tie_word_embeddings": tied})}
    )
    plain = build(config, single_process)
    loss = step(plain, None)
    (wrapped,) = wrap_data_parallel(config.parallel, [build(config, single_process)])
    wrapped.zero_grad_buffer()
    for _ in range(2):  # two micro-batches: the second adds to the first
        assert step(wrapped, 1 / 512 if loss_in_main_grad else None) == loss
    table = wrapped.module.embedding.word_embeddings.weight
    assert table.grad_added_to_main_grad == (loss_in_main_grad or not tied)  # nothing dense was made of its rows
    for (name, found), wanted in zip(wrapped.module.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is None
        torch.testing.assert_close(found.main_grad, 2 * wanted.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_both_ways_in_one_step(tiny_config: RunConfig, single_process: Runtime) -> None:
    """A micro-batch whose head's gradient is in main_grad, then one whose comes through autograd: both count."""
    from illada_megatron.training.gradient_reduction import wrap_data_parallel

    plain = build(tiny_config, single_process)
    step(plain, None)
    (wrapped,) = wrap_data_parallel(tiny_config.parallel, [build(tiny_config, single_process)])
    wrapped.zero_grad_buffer()
    for grad_scale in (1 / 512, None):
        step(wrapped, grad_scale)
    found, wanted = (model.embedding.word_embeddings.weight for model in (wrapped.module, plain))
    torch.testing.assert_close(found.main_grad, 2 * wanted.grad, rtol=1e-5, atol=1e-7)


def test_no_norm_and_no_activation_is_kept(tiny_config: RunConfig, single_process: Runtime) -> None:
    """The linears' inputs are made again, to the last bit."""
    from illada_megatron.model import remade_input

    model = build(tiny_config, single_process)
    kept, made = [], []
    original = remade_input.saved_tensors_hooks

    def watched(pack: Callable[[Tensor], Tensor | None], unpack: Callable[[Tensor | None], Tensor]) -> object:
        given: list[Tensor] = []

        def watch_pack(saved: Tensor) -> Tensor | None:
            given.append(saved.clone())
            if (result := pack(saved)) is not None:
                kept.append(result)
            return result

        def watch_unpack(packed: Tensor | None) -> Tensor:
            result = unpack(packed)
            if packed is None:
                made.append(any(torch.equal(result, one) for one in given if one.shape == result.shape))
            return result

        return original(watch_pack, watch_unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remade_input, "saved_tensors_hooks", watched)
        step(model, None)
    layers = tiny_config.model.num_layers
    assert made == [True] * 3 * layers  # linear_qkv, linear_fc1, linear_fc2
    assert all(isinstance(one, torch.nn.Parameter) or one.dim() == 2 for one in kept)  # weights


def test_clipping_scales_in_place() -> None:
    from illada_megatron.training.optimizer import _scale

    grads = [torch.randn(7), torch.randn(3, 5)]
    wanted = [grad * 0.25 for grad in grads]
    _scale(0, None, [grads, grads], 0.25)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    copies = [torch.empty(7, dtype=torch.bfloat16)]
    _scale(0, None, [grads[:1], copies], 1.0)
    assert torch.equal(copies[0], grads[0].bfloat16())


def test_large_vocabularies_give_free_memory_back(
    tiny_config: RunConfig, single_process: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from illada_megatron.model import mask_predictor

    calls = []
    monkeypatch.setattr(mask_predictor, "release_free_heap", lambda: calls.append(1))
    model = build(tiny_config, single_process)
    step(model, None)
    assert not calls
    monkeypatch.setattr(mask_predictor, "_LARGE_VOCABULARY", 100)
    step(model, None)
    assert len(calls) == 2
