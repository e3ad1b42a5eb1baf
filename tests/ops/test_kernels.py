"""What the compiled operators run on."""

import pytest
import torch

from illada_megatron.ops.kernels import load_error, missing, no_image


@pytest.mark.parametrize(
    ("architectures", "runs_on", "not_on"),
    [
        ("8.0;9.0;10.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 0), (7, 5)]),
        ("9.0", [(9, 0)], [(8, 0), (8, 9), (10, 0)]),
        ("9.0a 10.0f", [(9, 0), (10, 0), (10, 3)], [(9, 1), (8, 0), (12, 0)]),
        ("9.0a+PTX", [(9, 0)], [(10, 0)]),
        ("Hopper", [(7, 5), (9, 0)], []),
    ],
)
def test_code_of_an_architecture_runs_on(
    architectures: str, runs_on: list[tuple[int, int]], not_on: list[tuple[int, int]]
) -> None:
    assert [no_image(architectures, capability) for capability in runs_on] == [None] * len(runs_on)
    for major, minor in not_on:
        reason = no_image(architectures, (major, minor))
        assert reason is not None
        assert f"built for {architectures}, this GPU has {major}.{minor}" in reason


@pytest.mark.skipif(load_error() is not None, reason="the operators are not built")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_operator_of_a_later_build_is_missing(device: str) -> None:
    assert "has no of_tomorrow: it is an older build" in (missing("of_tomorrow", torch.device(device)) or "")
