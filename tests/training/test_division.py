"""Samples of a step divided over ranks: each taken once, equally many a rank, and ranks nearer to each other than in
the order they come in."""

from collections import Counter

import numpy as np
import pytest
from ranks import run_ranks

from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.layout import Layout, resolve_layout
from illada_megatron.diffusion.work import SampleWork, work_of_samples
from illada_megatron.runtime import runtime
from illada_megatron.training.division import Division, divide, sample_costs


def _layout(data: int, pipeline: int = 1, virtual: int = 1) -> Layout:
    options = [f"parallel.pipeline_model_parallel_size={pipeline}", "training.pad_global_batch=true"]
    if virtual > 1:
        options.append(f"parallel.virtual_pipeline_model_parallel_size={virtual}")
    return resolve_layout(load_config("tiny", options), data * pipeline)


def _division(config: RunConfig, layout: Layout, size: int) -> Division:
    length, noise = config.data.sequence_length, config.training.seeds.noise

    def work(first: int, count: int) -> SampleWork:
        return work_of_samples(first, count, length, config.diffusion, noise)

    return Division(work, config.model, layout, size)


@pytest.mark.parametrize(("data", "pipeline", "virtual"), [(1, 1, 1), (2, 1, 1), (3, 1, 1), (1, 4, 1), (5, 2, 2)])
@pytest.mark.parametrize("size", [1, 3])
def test_every_sample_is_taken_once(data: int, pipeline: int, virtual: int, size: int) -> None:
    """Places that fill the step up included; in a micro-batch those without weight come last."""
    layout, count = _layout(data, pipeline, virtual), 50
    microbatches = layout.microbatches(count, size)
    division = _division(load_config("tiny", []), layout, size)
    taken: Counter[int] = Counter()
    for rank in range(data):
        for microbatch in range(microbatches):
            places = division.places(1000, count, microbatch, rank)
            assert places == sorted(places)
            assert len(places) == size
            taken.update(places)
    assert taken == Counter(range(data * microbatches * size))


def test_a_single_rank_takes_them_in_order() -> None:
    division = _division(load_config("tiny", []), _layout(1), 2)
    assert [division.places(7, 6, microbatch, 0) for microbatch in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_ranks_cost_alike() -> None:
    """illada-8b at DP256, 1,280 samples of a step: a fifth of the spread at most; an eighth was measured
    (benchmarks.step.rank_balance)."""
    config = load_config("illada-8b", [])
    work = work_of_samples(1280, 1280, 8192, config.diffusion, config.training.seeds.noise)
    costs = sample_costs(work, config.model, pipeline=1)
    in_order = costs.reshape(5, 256).sum(0)
    divided = costs[divide(costs, 256, 5, 1, pipelined=False)].sum((1, 2))
    assert divided.sum() == pytest.approx(in_order.sum())
    assert np.ptp(divided) < np.ptp(in_order) / 5
    assert divided.max() - divided.mean() < (in_order.max() - in_order.mean()) / 5


def test_microbatches_of_several_samples_cost_alike() -> None:
    costs = np.random.default_rng(0).random(2 * 8 * 4)
    divided = costs[divide(costs, 2, 8, 4, pipelined=True)].sum(2)
    assert np.ptp(divided) < np.ptp(costs.reshape(2, 8, 4).sum(2)) / 3


def test_a_pipeline_begins_and_ends_with_the_cheapest() -> None:
    costs = np.random.default_rng(0).random(3 * 8)
    for own in costs[divide(costs, 3, 8, 1, pipelined=True)][..., 0]:
        dearest = int(own.argmax())
        assert (np.diff(own[: dearest + 1]) > 0).all()
        assert (np.diff(own[dearest:]) < 0).all()
        assert {own[0], own[-1]} == set(np.sort(own)[:2])


def test_costs_count_the_head_and_this_stages_attention() -> None:
    config = load_config("tiny", [])
    model = config.model
    alone = sample_costs(SampleWork(np.array([1.0, 0.0]), np.array([0.0, 1.0])), model, pipeline=2)
    assert alone[0] == 6 * model.hidden_size * model.vocab_size
    assert alone[1] == 12 * model.num_layers * model.num_attention_heads * model.head_dim / 2


def _of_a_run(rank: int, arguments: tuple[str, ...]) -> None:
    config = load_config(None, list(arguments))
    with runtime(config) as run:
        from illada_megatron.training.forward_step import BatchSlice
        from illada_megatron.training.setup import setup

        source = setup(config, run).source
        assert source.division is not None
        count, size = config.training.global_batch_size, config.training.micro_batch_size
        microbatches = run.layout.microbatches(count, size)
        found = [source.samples(BatchSlice(count, count, number)) for number in range(microbatches)]
        places = [source.division.places(count, count, number, rank) for number in range(microbatches)]
        assert found == [[count + one for one in part] for part in places]
        in_order = [[count + (number * 2 + rank) * size + one for one in range(size)] for number in range(microbatches)]
        assert found != in_order


def test_a_run_divides_its_samples_so(small: tuple[str, ...]) -> None:
    """No loss would tell."""
    run_ranks(_of_a_run, 2, small)
