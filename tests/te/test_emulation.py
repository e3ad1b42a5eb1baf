"""FP8 as Transformer Engine's own Python does it, over stand-ins for its kernels: what is multiplied in FP8, that
weights are quantised anew with each step, and that a run goes on in FP8, from it to bf16 and back."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from corpus import write_corpus
from ranks import run_ranks

from benchmarks.fp8 import stand_in
from tests.te.emulation_run import LAYERS, RECIPES, SAVED, STEPS, tensor_parallel_rank

pytestmark = [
    pytest.mark.skipif(stand_in.is_installed(), reason="Transformer Engine is here, and no GPU is stood in for"),
    pytest.mark.skipif(stand_in.missing() is not None, reason=stand_in.HOW),
]
MICROBATCHES = 2 * STEPS
GRADIENTS = {"tensorwise": "e5m2", "delayed": "e5m2", "blockwise": "e4m3"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("emulation")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.te.emulation_run", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    return json.loads(process.stdout.splitlines()[-1])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_product_of_the_layers_takes_fp8(recipe: str, found: dict[str, Any]) -> None:
    """Four linears a layer, each a product forward and two backward, and nothing else of Transformer Engine's."""
    linears, gradient = 4 * LAYERS * MICROBATCHES, GRADIENTS[recipe]
    gemms = found[recipe]["gemms"]
    assert sum(gemms.values()) == 3 * linears
    assert gemms.get("e4m3 x e4m3") == (3 * linears if gradient == "e4m3" else linears)
    if gradient == "e5m2":
        assert gemms["e5m2 x e4m3"] == 2 * linears


def test_bf16_takes_none(found: dict[str, Any]) -> None:
    assert list(found["bf16"]["gemms"]) == ["bf16 x bf16"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_is_that_of_bf16_within_fp8s_rounding(recipe: str, found: dict[str, Any]) -> None:
    """At a learning rate at which four steps do not multiply it: at five times this one the same rounding is 2 % of a
    loss on some processors, by the signs that Adam's first steps follow."""
    losses, bf16 = found[recipe]["losses"], found["bf16"]["losses"]
    assert losses != bf16
    assert losses == pytest.approx(bf16, rel=0.01)


def test_stale_weights_are_another_run(found: dict[str, Any]) -> None:
    """Without `is_first_microbatch` the layers compute with the first step's weights: the first loss is right, later
    ones are not. The run of this package is the other one."""
    stale, ours = found["stale"]["losses"], found["tensorwise"]["losses"]
    assert stale[0] == ours[0]
    assert stale[1:] != ours[1:]
    assert abs(stale[-1] - found["bf16"]["losses"][-1]) > abs(ours[-1] - found["bf16"]["losses"][-1])


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_a_resumed_run_goes_on_to_the_last_bit(recipe: str, found: dict[str, Any]) -> None:
    assert found[f"{recipe} -> {recipe}"]["losses"] == found[recipe]["losses"][SAVED:]


@pytest.mark.parametrize("change", ["delayed -> bf16", "bf16 -> delayed", "delayed -> blockwise"])
def test_another_precision_on_resume(change: str, found: dict[str, Any]) -> None:
    """Delayed scaling that begins at trained weights has no factors yet: its first step rounds as if all were 1."""
    losses, bf16 = found[change]["losses"], found["bf16"]["losses"][SAVED:]
    assert losses[0] == pytest.approx(bf16[0], rel=0.05 if change == "bf16 -> delayed" else 0.01)
    assert losses[1:] == pytest.approx(bf16[1:], rel=0.01)
    formats = set("".join(found[change]["gemms"]).replace("x", " ").split())
    assert ("bf16" in formats) == change.endswith("bf16")


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_weights_kept_in_fp8_are_the_same_run(recipe: str, found: dict[str, Any]) -> None:
    """From the same initial weights, but for the last bits of sums in fp32, also when it is continued; saved are main
    weights, and bf16 ones made of them."""
    gathered = found[f"{recipe}, gathered"]
    assert found[f"{recipe}, kept in bf16"] == found[recipe]["losses"]
    assert gathered[0] == found[recipe]["losses"][0]
    assert gathered == pytest.approx(found[recipe]["losses"], rel=1e-3)
    assert found[f"{recipe}, largest difference"] < 5e-3  # one bit of bf16


def test_delayed_scalings_state_has_canonical_names(found: dict[str, Any]) -> None:
    tensors = found["tensors"]
    linear = "decoder.layers.1.mlp.linear_fc1"
    assert tensors[f"fp8.scale_fwd.{linear}"] == [3]
    assert tensors[f"fp8.amax_history_fwd.{linear}"] == [1024, 3]
    assert tensors[f"fp8.scale_bwd.{linear}"] == [2]
    assert len(tensors) == 4 * 4 * LAYERS


def test_validation_changes_nothing(found: dict[str, Any]) -> None:
    """Its passes would raise the largest values that the next step's factors are made of."""
    for what in ("losses", "curves", "scaling"):
        assert found["validated"][what] == found["delayed"][what]


def test_a_skipped_step_leaves_delayed_scaling_as_it_was(found: dict[str, Any]) -> None:
    """An infinite value would keep factors as they are for as many passes as are remembered."""
    bad = found["bad step"]
    assert bad["skipped"] == [False, True, False, False]
    assert not bad["finite"]
    assert bad["as before"]


def test_layers_that_have_seen_something_begin_anew(found: dict[str, Any]) -> None:
    """Where a run goes back to a checkpoint that has none of delayed scaling's state."""
    assert found["bad step"]["begun anew"]


@pytest.mark.slow
def test_two_tensor_parallel_ranks_keep_what_one_does(found: dict[str, Any], tmp_path: Path) -> None:
    """Under the same names: largest values are reduced over the ranks, and each rank has the whole layer's. FP8 rounds
    one's sums otherwise than two's, and Adam's first steps follow the sign of what is rounded."""
    corpus = write_corpus(tmp_path / "text")
    run_ranks(tensor_parallel_rank, 2, str(tmp_path), f"data.train_paths=[{corpus}]")
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["scaling"] == ranks[1]["scaling"]
    for what in ("curves", "scaling"):
        one, two = found["delayed"][what], ranks[0][what]
        assert list(two) == list(one)
        for name, values in one.items():
            assert two[name] == pytest.approx(values, rel=0.25), name


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_largest_values_and_factors_are_curves(recipe: str, found: dict[str, Any]) -> None:
    curves = found[recipe]["curves"]
    assert len(curves) == LAYERS * 4 * 3 * 2
    amax, scale = curves["fp8_amax/layer_001.linear_fc2/weight"], curves["fp8_scale/layer_001.linear_fc2/weight"]
    assert 0 < amax < 10
    if recipe == "tensorwise":
        assert amax * scale == pytest.approx(448.0, rel=1e-5)
    assert found["bf16"]["curves"] == found["blockwise"]["curves"] == {}
