"""The AdamW that megatron-core gets on a CPU: torch's numbers, Apex's place for the step count."""

import copy

import pytest
import torch
from torch import Tensor

from illada_megatron.training.optimizer import AdamW

SETTINGS = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.0}


def _parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (11,), (3, 2, 4)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def _groups(parameters: list[Tensor]) -> list[dict]:
    return [
        {"params": parameters[:1], "weight_decay": 0.3},
        {"params": parameters[1:2], "lr": 1e-3},
        {"params": parameters[2:], "betas": (0.5, 0.6), "weight_decay": 0.1},
    ]


def _set_gradients(parameters: list[Tensor], step: int) -> None:
    for index, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(100 * step + index)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_torch_over_steps_and_changing_rates() -> None:
    """Bias correction off by one step, decay coupled to the gradient, a group's setting ignored: all show."""
    ours, theirs = _parameters(0), _parameters(0)
    optimizers = AdamW(_groups(ours), **SETTINGS), torch.optim.AdamW(_groups(theirs), **SETTINGS)
    for step in range(5):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            _set_gradients(parameters, step)
            optimizer.param_groups[0]["lr"] = 3e-2 / (step + 1)
            optimizer.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(ours[0], _parameters(0)[0], atol=1e-3)


def test_step_is_kept_in_the_group_also_where_it_holds_nothing() -> None:
    """The count is saved once for all ranks; a rank without a parameter of the group must not say 0."""
    parameters = _parameters(0)
    optimizer = AdamW([{"params": parameters}, {"params": []}], **SETTINGS)
    for step in range(3):
        _set_gradients(parameters, step)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    state = optimizer.state_dict()
    assert [group["step"] for group in state["param_groups"]] == [3, 3]
    assert all(set(entry) == {"exp_avg", "exp_avg_sq"} for entry in state["state"].values())


def test_goes_on_from_its_state() -> None:
    """Interrupted after 3 of 6 steps, it ends at the same bits."""
    unbroken, resumed = _parameters(0), _parameters(0)
    first, second = AdamW(_groups(unbroken), **SETTINGS), AdamW(_groups(resumed), **SETTINGS)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(second.state_dict())
            second = AdamW(_groups(resumed), **SETTINGS)
            second.load_state_dict(state)
        for parameters, optimizer in ((unbroken, first), (resumed, second)):
            _set_gradients(parameters, step)
            optimizer.step()
    for a, b in zip(unbroken, resumed, strict=True):
        assert torch.equal(a, b)


def test_parameter_without_gradient_stays() -> None:
    parameters = _parameters(0)
    before = parameters[1].clone()
    optimizer = AdamW(_groups(parameters), **SETTINGS)
    _set_gradients(parameters, 0)
    parameters[1].grad = None
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state


def test_refuses_what_it_does_not_do() -> None:
    with pytest.raises(ValueError, match="found adam_w_mode=False"):
        AdamW(_parameters(0), **SETTINGS, adam_w_mode=False)
    with pytest.raises(ValueError, match="no closure"):
        AdamW(_parameters(0), **SETTINGS).step(lambda: 0.0)
