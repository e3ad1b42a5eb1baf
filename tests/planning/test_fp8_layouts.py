"""The search offers in FP8 what the configuration takes, all of it and nothing else."""

import itertools
from typing import NamedTuple

import pytest

from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.layout import check_config, pipeline_split, resolve_layout
from illada_megatron.planning import load_device, workload
from illada_megatron.planning.search import candidates

GPUS = 16
# 704 is a multiple of 16 on four ranks and of 32 on two; 384 tokens are blocks of 128 on one
MODEL = (
    *("model.num_layers=8", "model.hidden_size=256", "model.num_attention_heads=8", "model.num_query_groups=8"),
    *("model.ffn_hidden_size=704", "data.sequence_length=384", "training.global_batch_size=32"),
)


class Sizes(NamedTuple):
    tensor: int
    pipeline: int
    virtual: int
    context: int
    micro_batch_size: int
    pipeline_layout: str


def of_sizes(config: RunConfig, sizes: Sizes, precision: str) -> RunConfig:
    """As `illada plan --explain` says, unchecked."""
    parallel = {
        "tensor_model_parallel_size": sizes.tensor,
        "sequence_parallel": sizes.tensor > 1,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual if sizes.virtual > 1 else None,
        "pipeline_layout": sizes.pipeline_layout,
        "context_parallel_size": sizes.context,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    training = {"micro_batch_size": sizes.micro_batch_size, "precision": precision}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "training": config.training.model_copy(update=training),
        }
    )


def takes(config: RunConfig, sizes: Sizes, precision: str) -> bool:
    """Whether the configuration's own checks do; auto only where it is not even."""
    one = of_sizes(config, sizes, precision)
    try:
        check_config(one)
        resolve_layout(one, GPUS, padded=False)
    except ValueError:
        return False
    if sizes.pipeline_layout == "even":
        return True
    try:
        return pipeline_split(one) != pipeline_split(
            of_sizes(config, sizes._replace(pipeline_layout="even"), precision)
        )
    except ValueError:
        return True


@pytest.mark.parametrize(
    ("precision", "more"),
    [
        ("bf16", []),
        ("bf16", ["diffusion.attention_boundary=document"]),
        ("fp8", ["fp8.recipe=tensorwise"]),
        ("fp8", ["fp8.recipe=tensorwise", "fp8.num_layers_at_start_in_bf16=3", "fp8.param_gather=true"]),
        ("fp8", ["fp8.recipe=delayed"]),
        ("fp8", ["fp8.recipe=blockwise"]),
        ("fp8", ["fp8.recipe=mxfp8"]),
    ],
)
def test_what_is_offered_is_what_is_taken(precision: str, more: list[str]) -> None:
    config = load_config(None, [*MODEL, *more])
    offered = {
        Sizes(one.tensor, one.pipeline, one.virtual, one.context, one.micro_batch_size, one.pipeline_layout)
        for one in candidates(workload(config), GPUS, load_device("h100"), [precision])
        if one.micro_batch_size <= 2
    }
    sizes, layouts = (1, 2, 4, 8, 16), ("even", "auto")
    every = [Sizes(*one) for one in itertools.product((1, 2, 4, 8), sizes, (1, 2, 4, 8), sizes, (1, 2), layouts)]
    taken = {
        one for one in every if GPUS % (one.tensor * one.pipeline * one.context) == 0 and takes(config, one, precision)
    }
    assert offered == taken
    assert {one.context for one in offered} == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("more", [["fp8.recipe=mxfp8", "fp8.param_gather=true"], ["model.ffn_hidden_size=712"]])
def test_what_no_layout_helps_is_offered_nowhere(more: list[str]) -> None:
    work = workload(load_config(None, [*MODEL, *more]))
    assert not [*candidates(work, GPUS, load_device("h100"), ["fp8"])]
    assert [*candidates(work, GPUS, load_device("h100"), ["bf16"])]
