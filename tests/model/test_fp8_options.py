"""FP8 in megatron-core's words, and where a device cannot do it."""

import pytest
import torch

from illada_megatron.config import ConfigError, RunConfig, load_config
from illada_megatron.runtime import Runtime
from illada_megatron.runtime.device import Device, fp8_problem

CPU = Device(torch.device("cpu"), "a CPU", None)
GPU = Device(torch.device("cuda", 0), "a GPU", None)
FORMATS = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}


def _config(*overrides: str) -> RunConfig:
    return load_config(None, ["training.precision=fp8", *overrides])


@pytest.mark.parametrize("recipe", FORMATS)
def test_megatron_core_takes_every_recipe(recipe: str, single_process: Runtime) -> None:
    from illada_megatron.model import transformer_config

    config = _config(f"fp8.recipe={recipe}", f"fp8.param_gather={str(recipe != 'mxfp8').lower()}")
    core = transformer_config(config, CPU, "transformer_engine")
    assert (core.fp8, core.fp8_recipe, core.fp8_param) == (FORMATS[recipe], recipe, recipe != "mxfp8")
    assert (core.fp8_amax_history_len, core.fp8_amax_compute_algo) == (1024, "max")
    assert core.params_dtype == torch.bfloat16
    assert core.bf16
    if recipe == "tensorwise":
        assert core.first_last_layers_bf16
        assert (core.num_layers_at_start_in_bf16, core.num_layers_at_end_in_bf16) == (1, 1)
    else:
        assert not core.first_last_layers_bf16
    assert not core.fp8_dot_product_attention
    assert not getattr(core, "fp8_output_proj", False)


def test_layers_in_bf16_at_one_end_alone(single_process: Runtime) -> None:
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    from illada_megatron.model import transformer_config

    config = _config("fp8.num_layers_at_start_in_bf16=0", "fp8.num_layers_at_end_in_bf16=2")
    core = transformer_config(config, CPU, "transformer_engine")
    assert [is_first_last_bf16_layer(core, layer) for layer in range(4)] == [False, False, True, True]


def test_bf16_has_none_of_it(tiny_config: RunConfig, single_process: Runtime) -> None:
    from illada_megatron.model import transformer_config

    core = transformer_config(tiny_config, CPU, "local")
    assert core.fp8 is None
    assert not core.fp8_param


def test_a_cpu_is_refused(single_process: Runtime) -> None:
    from illada_megatron.model import build_model_chunks

    with pytest.raises(ConfigError) as error:
        build_model_chunks(_config(), CPU)
    assert "training.precision fp8 needs Transformer Engine on a GPU: found a CPU" in str(error.value)
    assert "set training.precision=bf16" in str(error.value)


def test_a_gpu_without_transformer_engine_is_refused(single_process: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    from illada_megatron.model import layer_specs

    monkeypatch.setattr(layer_specs, "has_transformer_engine", lambda: False)
    monkeypatch.setattr(layer_specs, "transformer_engine_problem", lambda: None)
    with pytest.raises(ConfigError, match="on a GPU: it is not installed; install it"):
        layer_specs.check_precision(_config(), GPU)


# (recipe, compute capability, torch's CUDA) -> part of the answer; None: it can
CHIPS = [
    ("mxfp8", (9, 0), "13.0", "its compute capability is 9.0, expected 10.x (Blackwell): set fp8.recipe=tensorwise"),
    ("mxfp8", (12, 0), "13.0", "its compute capability is 12.0, expected 10.x"),
    ("mxfp8", (10, 0), "13.0", None),
    ("blockwise", (8, 9), "13.0", "expected 9.0 (Hopper) or newer"),
    ("blockwise", (9, 0), "12.8", "CUDA 12.8, expected 12.9 or newer"),
    ("blockwise", (9, 0), "13.0", None),
    ("tensorwise", (9, 0), "12.6", None),
    ("tensorwise", (8, 0), "13.0", "its compute capability is 8.0, expected 8.9 or newer: take an H100 or newer"),
    ("delayed", (8, 9), "12.6", None),
]


@pytest.mark.parametrize(("recipe", "capability", "cuda", "answer"), CHIPS)
def test_a_chip_has_its_recipes(
    recipe: str, capability: tuple[int, int], cuda: str, answer: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    problem = fp8_problem(recipe)  # type: ignore[arg-type]
    assert problem == answer if answer is None else problem is not None and answer in problem
