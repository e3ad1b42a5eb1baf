"""Delayed scaling's state among a checkpoint's tensors: its names say what it is, and that it is no weight."""

import pytest

from illada_megatron.checkpoint.files.names import EMA, FP8, WEIGHT, split_name, tensor_name

LINEAR = "decoder.layers.3.mlp.linear_fc1"


@pytest.mark.parametrize("state", [f"{FP8}scale_fwd", f"{FP8}amax_history_bwd", EMA, "main", WEIGHT])
def test_names_lead_back(state: str) -> None:
    assert split_name(tensor_name(LINEAR, state)) == (LINEAR, state)


def test_the_name_of_a_layers_state() -> None:
    assert tensor_name(LINEAR, f"{FP8}scale_fwd") == f"fp8.scale_fwd.{LINEAR}"
    assert split_name(f"fp8.scale_fwd.{LINEAR}").state != WEIGHT
