"""The benchmark of the layers' kernels, one call of each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from illada_megatron.ops import segment_attention


def test_each_operator_races_torchs(benchmark: Callable[..., dict[str, Any]]) -> None:
    if (reason := segment_attention.missing(torch.device("cpu"), torch.float32)) is not None:
        pytest.skip(reason)
    report = benchmark("step.layer_kernels", "--precision", "fp32", "--rounds", 1)
    results = {one["name"]: one for one in report["results"]["fp32"]}
    assert results.keys() == {"attention with rotary", "RMSNorm", "SwiGLU"}
    assert all(one[key] > 0 for one in results.values() for key in ("ours_cpu_ms", "torch_cpu_ms"))
    assert len(report["bars"]) == 4
    assert report["holds"] == all(bar["holds"] for bar in report["bars"].values())
