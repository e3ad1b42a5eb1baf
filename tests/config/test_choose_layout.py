"""The first allowed layout that fits the number of ranks, with the same global batch."""

import contextlib
import re
from pathlib import Path

import pytest
import yaml

from illada_megatron.config import ConfigError, load_config
from illada_megatron.config.layout import choose_layout, layout_rows
from illada_megatron.config.load import to_yaml
from illada_megatron.config.machines import choose_work, layouts_by_nodes

EXAMPLES = Path(__file__).parents[2] / "examples"
# 4 layers, 8 heads, 2 groups; a batch of 12 divides by 1, 2, 3, 4 and 6
CHOICES = [
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "micro_batch_size": 3},
    {"micro_batch_size": 2, "recompute": "full"},
]
VALUES = {
    "parallel": {"layouts": CHOICES, "overlap_grad_reduce": True},
    "training": {"global_batch_size": 12, "micro_batch_size": 1},
}


@pytest.mark.parametrize(
    ("world_size", "number", "tensor", "pipeline", "virtual", "data", "microbatches"),
    [
        (8, 0, 2, 2, 1, 2, 6),
        (4, 0, 2, 2, 1, 1, 12),
        (2, 1, 1, 2, 2, 1, 4),
        (3, 2, 1, 1, 1, 3, 2),
        (1, 2, 1, 1, 1, 1, 6),
        (6, 2, 1, 1, 1, 6, 1),  # [1]: 12 / (3 * 3) is no number of micro-batches
    ],
)
def test_first_that_fits(
    world_size: int, number: int, tensor: int, pipeline: int, virtual: int, data: int, microbatches: int
) -> None:
    config = load_config(VALUES)
    chosen = choose_layout(config, world_size)
    layout = chosen.layout
    assert chosen.number == number
    assert (layout.tensor, layout.pipeline, layout.virtual, layout.data) == (tensor, pipeline, virtual, data)
    assert layout.num_microbatches == microbatches
    assert len(chosen.refused) == number
    parallel, training = chosen.config.parallel, chosen.config.training
    assert parallel.sequence_parallel is (number == 0)
    assert training.micro_batch_size == (1, 3, 2)[number]
    assert training.recompute == ("none", "none", "full")[number]
    assert (training.global_batch_size, parallel.overlap_grad_reduce) == (12, True)


def test_choosing_again_chooses_the_same() -> None:
    """The configuration beside a run, written and read, is the same run on every number of ranks."""
    config = load_config(VALUES)
    for world_size in (1, 2, 3, 4, 6, 8):
        saved = load_config(yaml.safe_load(to_yaml(choose_layout(config, world_size).config)))
        for other in (1, 2, 3, 4, 6, 8):
            assert choose_layout(saved, other).config == choose_layout(config, other).config


def test_the_table_says_which_and_why() -> None:
    chosen = choose_layout(load_config(VALUES), 2)
    rows = dict(layout_rows(chosen.config, chosen.layout))
    assert rows["layout"] == "tensor 1, pipeline 2 x 2 chunks, data 1"
    assert rows["chosen"].startswith(
        "parallel.layouts[1] of 3, the first that fits\nnot parallel.layouts[0]: world size"
    )
    alone = choose_layout(load_config(None), 1)
    assert alone.number is None
    assert "chosen" not in dict(layout_rows(alone.config, alone.layout))


def test_none_fits() -> None:
    """Each with its reason."""
    with pytest.raises(ValueError, match=r"none of the 3 parallel\.layouts fits 5 ranks") as error:
        choose_layout(load_config(VALUES), 5)
    for number, reason in enumerate(["tensor * pipeline parallel size 2 * 2", "1 * 2 = 2", "global_batch_size 12"]):
        assert re.search(rf"parallel\.layouts\[{number}\]: .*{re.escape(reason)}", str(error.value)), number


def test_layouts_by_number_of_machines() -> None:
    rows = dict(layouts_by_nodes(load_config(VALUES), 2, 1, 4))
    assert list(rows) == ["4 nodes", "3 nodes", "2 nodes", "1 nodes"]
    assert rows["4 nodes"] == "tensor 2 + sequence, pipeline 2, data 2; 6 micro-batches of 1 a rank"
    assert rows["1 nodes"].startswith(
        "tensor 1, pipeline 2 x 2 chunks, data 1; 4 micro-batches of 3 a rank; a step takes"
    )
    alone = {"parallel": {"pipeline_model_parallel_size": 4}}
    assert dict(layouts_by_nodes(load_config(alone), 2, 1, 2))["1 nodes"] == "no layout fits: the run would end"


def test_every_number_of_the_1024_gpu_example_has_a_layout() -> None:
    """Numbers of which the same is said share a row; the batch of 1280 divides on 128, 80 and 64 alone."""
    config = load_config(EXAMPLES / "illada_8b" / "config_1024_gpus.yaml")
    rows = dict(layouts_by_nodes(config, 8, 64, 128))
    assert list(rows) == [
        *("128 nodes", "107 to 127 nodes", "92 to 106 nodes", "80 to 91 nodes", "72 to 79 nodes", "64 to 71 nodes")
    ]
    assert rows["107 to 127 nodes"] == (
        "107 work, the others wait as spares: tensor 4 + sequence, pipeline 1, data 214; 6 micro-batches of 1 a rank; "
        "4 of 1284 places stay empty; a step takes 1.20 times as long as on 128 (without empty places 1.60, on 80)"
    )
    assert rows["80 to 91 nodes"].startswith("80 work, the others wait as spares: tensor 4 + sequence, pipeline 1")
    assert rows["64 to 71 nodes"].endswith("10 micro-batches of 1 a rank; a step takes 2.00 times as long as on 128")


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("choices", [[], CHOICES])
def test_the_cheapest_work_of_all(pad: bool, choices: list[dict]) -> None:
    """Compared with trying everything: no number of machines, with or without empty places where they are allowed, has
    a step that costs less, and none of fewer machines costs the same, but where all work without empty places."""
    config = load_config(
        {"parallel": {"layouts": choices}, "training": {**VALUES["training"], "pad_global_batch": pad}}
    )
    for present in range(1, 13):
        work = choose_work(config, 1, present)
        assert choose_layout(config, work.nodes).layout == work.chosen.layout
        costs = {}
        for tried in range(1, present + 1):
            with contextlib.suppress(ValueError):
                costs[tried] = choose_layout(config, tried).cost
        if work.nodes < present or work.chosen.empty_places:
            assert work.chosen.cost == pytest.approx(min(costs.values()))
            assert work.nodes == min(n for n, cost in costs.items() if cost == pytest.approx(work.chosen.cost))
        else:
            assert work.chosen.empty_places == 0
        assert pad or not work.chosen.empty_places


def test_what_a_step_costs() -> None:
    """Passes of one sample through the whole model: places of a rank over tensor * pipeline, and the pipeline's start
    and end; recomputation has four passes for three."""
    config = load_config(VALUES)
    assert choose_layout(config, 8).cost == (6 + 1) / 4  # TP 2, PP 2
    assert choose_layout(config, 2).cost == (4 + 1 / 2) * 3 / 2  # PP 2 in two chunks, micro-batches of 3
    assert choose_layout(config, 3).cost == pytest.approx(2 * 2 * 4 / 3)


def test_the_deepest_pipeline_goes_on_with_whole_replicas() -> None:
    """7 machines of 2 ranks hold three copies of a model that takes four ranks: the odd one waits."""
    values = {"parallel": {"pipeline_model_parallel_size": 4}, "training": {"global_batch_size": 12}}
    work = choose_work(load_config(values), 2, 7)
    assert (work.nodes, work.chosen.layout.data) == (6, 3)
    with pytest.raises(ValueError, match="world size 2 is not a multiple of tensor"):
        choose_work(load_config(values), 2, 1)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"layouts": [{}, {"tensor_model_parallel_size": 4}]}, r"parallel\.layouts\[1\]: model.num_query_groups 2"),
        ({"layouts": [{"sequence_parallel": True}]}, r"parallel\.layouts\[0\]: parallel.sequence_parallel true needs"),
        ({"layouts": [{"tensor_size": 2}]}, r"parallel\.layouts\.0\.tensor_size: unknown field; known: tensor"),
        ({"layouts": [{}], "data_parallel_size": 2}, "data_parallel_size 2 fixes the number of ranks"),
    ],
)
def test_a_choice_that_can_never_work_is_refused_at_once(parallel: dict, message: str) -> None:
    """Not in the night in which a machine is lost."""
    with pytest.raises(ConfigError, match=message):
        load_config({"parallel": parallel})
