"""Layers over pipeline stages: what auto makes of the embedding and the head, and which layouts are refused."""

import itertools
from typing import Any

import pytest

from illada_megatron.config import ConfigError, load_config
from illada_megatron.config.layout import layout_rows, pipeline_split, resolve_layout
from illada_megatron.config.pipeline_split import (
    PartFlops,
    Split,
    expected_flops,
    first_layers,
    megatron_layout,
    split_layers,
    split_of_megatron,
    stages,
)

PP, VP = "parallel.pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"
LAYOUT = "parallel.pipeline_layout"
MODEL = load_config("illada-8b").model


def _longest(split: Split, head: float) -> float:
    """Of the stages, in layers."""
    return max(sum(chunks) + (head if rank == len(split) - 1 else 0.0) for rank, chunks in enumerate(split))


@pytest.mark.parametrize("pipeline", [2, 3, 4])
@pytest.mark.parametrize("head", [0.0, 0.7, 1.0, 1.3, 2.9, 6.5])
def test_no_split_is_quicker_and_of_those_none_is_smaller(pipeline: int, head: float) -> None:
    """Against all splits of eleven layers."""
    model = MODEL.model_copy(update={"num_layers": 11})
    found = split_layers(model, pipeline, 1, "auto", PartFlops(1.0, head))
    assert sum(sum(chunks) for chunks in found) == 11
    others = [
        [[count] for count in counts]
        for counts in itertools.product(range(1, 12), repeat=pipeline)
        if sum(counts) == 11
    ]
    longest = min(_longest(other, head) for other in others)
    assert _longest(found, head) == pytest.approx(longest)

    def largest(split: Split) -> int:
        return max(stage.parameters for stage in stages(model, split, PartFlops(1.0, head)))

    smallest = min(largest(other) for other in others if _longest(other, head) <= longest + 1e-9)
    assert largest(found) == pytest.approx(smallest, rel=1e-5)  # the final norm is nothing


def test_what_the_head_and_the_embedding_weigh() -> None:
    """155,136 rows are three layers in parameters; where half of the tokens meet them, 1.1 layers in FLOPs."""
    flops = expected_flops(MODEL, load_config("illada-8b").diffusion, 8192)
    assert flops.head / flops.layer == pytest.approx(1.14, abs=0.01)
    even, balanced = (split_layers(MODEL, 4, 1, layout, flops) for layout in ("even", "auto"))
    assert (even, balanced) == ([[8], [8], [8], [8]], [[7], [9], [9], [7]])
    shares = [stage.flops_share for stage in stages(MODEL, balanced, flops)]
    assert sum(shares) == pytest.approx(1.0)
    assert max(shares) < max(stage.flops_share for stage in stages(MODEL, even, flops))
    parameters = [stage.parameters for stage in stages(MODEL, balanced, flops)]
    assert sum(parameters) == MODEL.num_parameters + MODEL.padded_vocab_size * MODEL.hidden_size  # in first and last


@pytest.mark.parametrize(("pipeline", "virtual"), [(2, 3), (4, 2), (3, 5)])
def test_chunks_of_an_interleaved_split(pipeline: int, virtual: int) -> None:
    """Each layer once, in the order in which a micro-batch passes; what is written reads back as the same."""
    flops = PartFlops(1.0, 1.7)
    split = split_layers(MODEL, pipeline, virtual, "auto", flops)
    first, seen = first_layers(split), []
    for chunk, rank in itertools.product(range(virtual), range(pipeline)):
        seen += range(first[rank][chunk], first[rank][chunk] + split[rank][chunk])
    assert seen == list(range(32))
    assert min(count for chunks in split for count in chunks) >= 1
    assert split_layers(MODEL, pipeline, virtual, megatron_layout(split), flops) == split


def test_megatrons_notation_is_read_as_megatron_core_reads_it() -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    for layout, pipeline in (("Et*3|(tt|)*13,tttL", 3), ("E,t*16|t*16L", 2), ("E(t*4|)*7t*4L", 4)):
        theirs = PipelineParallelLayerLayout(layout, pipeline).layout
        counts = [[chunk.count(LayerType.decoder) for chunk in chunks] for chunks in theirs]
        assert split_layers(MODEL, pipeline, len(counts[0]), layout, PartFlops(1.0, 0.0)) == counts, layout


def test_megatrons_other_options() -> None:
    assert split_of_megatron(30, 4, 1, {"decoder_first_pipeline_num_layers": 6}) == [[6], [8], [8], [8]]
    both = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert split_of_megatron(30, 4, 2, both) == [[3, 4], [4, 4], [4, 4], [4, 3]]
    with pytest.raises(ValueError, match="32 layers cannot be divided over 4 stages of 1 chunks with"):
        split_of_megatron(32, 4, 1, {"decoder_first_pipeline_num_layers": 6})


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no embedding": ([f"{PP}=2", f"{LAYOUT}=tt|ttL"], ["'tt|ttL'", "expected E (the embedding) first", "take auto"]),
    "another kind of layer": ([f"{PP}=2", f"{LAYOUT}=Ett|ttmL"], ["reads as 'Ett|ttmL'", "only t"]),
    "stages": ([f"{PP}=2", f"{LAYOUT}=Et|t|ttL"], ["has 3 stages", "2 * 1 = 2"]),
    "chunks": ([f"{PP}=2", f"{VP}=2", f"{LAYOUT}=Ett|ttL"], ["has 2 stages", "2 * 2 = 4"]),
    "layers": ([f"{PP}=2", f"{LAYOUT}=Ett|tL"], ["has 3 layers, model.num_layers is 4"]),
    "an empty stage": ([f"{PP}=2", f"{LAYOUT}=E|ttttL"], ["stage 1 has no layer"]),
    "more chunks than layers": ([f"{PP}=5", f"{LAYOUT}=auto"], ["model.num_layers 4 is below", "5"]),
    "even": ([f"{PP}=3"], ["model.num_layers 4 is not a multiple", "parallel.pipeline_layout=auto"]),
    "one of several layouts": (
        ["parallel.layouts=[{pipeline_model_parallel_size: 2, pipeline_layout: Et|tL}]"],
        ["parallel.layouts[0]", "has 2 layers"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case: str) -> None:
    overrides, parts = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        load_config("tiny", overrides)
    for part in parts:
        assert part in str(error.value)


def test_the_table_shows_each_stage() -> None:
    config = load_config("illada-8b", [f"{PP}=4", f"{LAYOUT}=auto"])
    rows: dict[str, Any] = dict(layout_rows(config, resolve_layout(config, 4)))
    assert rows["stages"].splitlines() == [
        "0: 7 layers, 21.1 % of the FLOPs, 2,162.2 million parameters",
        "1 to 2: 9 layers, 27.2 % of the FLOPs, 1,963.0 million parameters",
        "3: 7 layers, 24.6 % of the FLOPs, 2,162.2 million parameters",
    ]
    assert pipeline_split(config) == [[7], [9], [9], [7]]
    assert "stages" not in dict(layout_rows(load_config("illada-8b"), resolve_layout(load_config("illada-8b"), 8)))
