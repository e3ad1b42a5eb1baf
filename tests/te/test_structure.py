"""Models of Transformer Engine's layers are the models of the local ones: names, shapes, and where a rank's part lies
in the whole, for ranks of large layouts and every recipe."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.fp8 import stand_in
from illada_megatron.config import load_config
from illada_megatron.config.parameters import parameters
from tests.te.structure import BF16, LAYOUTS, LOCAL, RECIPES

pytestmark = pytest.mark.skipif(not stand_in.is_installed() and stand_in.missing() is not None, reason=stand_in.HOW)
RANKS = [(preset, rank) for preset, (_, ranks) in LAYOUTS.items() for rank in ranks]
KINDS = (BF16, *RECIPES)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.te.structure"], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    result = json.loads(process.stdout[process.stdout.index('{"real"') :])
    print(result["versions"])
    return result


def test_megatron_core_finds_transformer_engine(found: dict[str, Any]) -> None:
    """It hides an ImportError, and all that follows would be of something else."""
    assert found["have_te"]
    assert found["real"] == stand_in.is_installed()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("preset", "rank"), RANKS)
def test_a_rank_holds_what_it_holds_of_local_layers(preset: str, rank: int, kind: str, found: dict[str, Any]) -> None:
    local, ours = (found["presets"][preset][str(rank)][one] for one in (LOCAL, kind))
    assert ours["parameters"] == local["parameters"]
    assert ours["sharding"] == local["sharding"]
    assert len(ours["sharding"]) == len([name for name in ours["parameters"] if ".layers." in name])
    assert ours["counted"] == local["counted"]
    assert ours["devices"] == ["meta"]
    assert ours["attention"] == ["AttnMaskType.no_mask"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranks_of_8b_hold_the_whole_model_once(kind: str, found: dict[str, Any]) -> None:
    ranks = found["presets"]["illada-8b"].values()
    assert sum(rank[kind]["counted"] for rank in ranks) == 7_615_025_152
    names = {name for rank in ranks for name in rank[kind]["parameters"]}
    assert names == {one.name for one in parameters(load_config("illada-8b").model)}


@pytest.mark.parametrize("preset", LAYOUTS)
def test_layers_in_fp8_are_those_of_the_configuration(preset: str, found: dict[str, Any]) -> None:
    last = load_config(preset).model.num_layers - 1
    for rank in found["presets"][preset].values():
        assert rank[BF16]["fp8_layers"] == []
        everywhere = rank["blockwise"]["fp8_layers"]
        assert rank["delayed"]["fp8_layers"] == rank["mxfp8"]["fp8_layers"] == everywhere
        assert rank["tensorwise"]["fp8_layers"] == [one for one in everywhere if 0 < one < last]
