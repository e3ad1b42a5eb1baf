"""What a rank makes at the start of a large run, counted with torch's fake process group: no rank is started."""

import subprocess
import sys
from typing import Any

import pytest
from launch import Illada
from ranks import run_ranks

from illada_megatron.config import load_config
from illada_megatron.config.layout import resolve_layout
from illada_megatron.runtime import count_groups, runtime

# A line for each rank of each world in the arguments (WORLD,TP,PP,CP,RANKS): what it asked torch for.
_CODE = """
import sys
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from illada_megatron.runtime import cpu_adaptor
from illada_megatron.runtime.megatron import import_megatron
from illada_megatron.runtime.process_groups import own_groups
import_megatron()
cpu_adaptor.install()
from megatron.core import parallel_state as state
new_group, asked = dist.new_group, []
def counted(**arguments):
    group, ranks = new_group(**arguments), tuple(arguments["ranks"])
    name = dist.distributed_c10d._world.pg_names[group]
    asked.append((ranks, sum(ranks == others for others, _ in asked)))
    # members wait for each other under the name that each of them finds
    assert names.setdefault(asked[-1], name) == name, arguments["group_desc"]
    return group
dist.new_group = counted
for case in sys.argv[1:]:
    names = {}
    world, tp, pp, cp, *ranks = map(int, case.split(","))
    for rank in ranks or range(world):
        asked.clear()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        with own_groups():
            state.initialize_model_parallel(tp, pp, context_parallel_size=cp, create_gloo_process_groups=False)
        dp = world // tp // pp // cp
        groups = [
            state.get_tensor_model_parallel_group(), state.get_pipeline_model_parallel_group(),
            state.get_data_parallel_group(with_context_parallel=True), state.get_model_parallel_group(),
            state.get_intra_distributed_optimizer_instance_group(), state.get_expert_data_parallel_group(),
            state.get_context_parallel_group(), state.get_data_parallel_group(),
        ]
        assert [group.size() for group in groups] == [tp, pp, dp * cp, tp * pp, world, dp * cp, cp, dp]
        assert state.get_tensor_model_parallel_rank() == rank % tp
        assert state.get_pipeline_model_parallel_rank() == rank // (world // pp)
        assert all(rank in ranks for ranks, _ in asked)
        # attention's ring, delayed scaling's reductions and DDP's collectives run at the same time
        ddp, amax = groups[2], state.get_amax_reduction_group(with_context_parallel=True)
        assert cp == 1 or state.get_context_parallel_group() is not ddp
        assert amax.size() == 1 or amax is not ddp
        print(case, rank, len(asked), *{hash(group) for group in asked})
        state.destroy_model_parallel()
        dist.destroy_process_group()
"""
_SMALL = [(8, 2, 2, 1), (8, 1, 1, 1), (8, 8, 1, 1), (8, 1, 4, 1), (64, 4, 1, 1), (64, 8, 4, 1)]
_SMALL += [(8, 1, 1, 2), (8, 2, 1, 4), (8, 2, 2, 2), (64, 2, 4, 4), (4, 1, 1, 4), (6, 1, 3, 1), (16, 1, 4, 2)]
_LARGE = [("illada-8b", 4, 1), ("illada-70b", 8, 4)]
_RANKS = (0, 511, 1023)


@pytest.fixture(scope="module")
def made() -> dict[tuple[int, ...], dict[int, tuple[int, set[str]]]]:
    """(world, tp, pp, cp) -> rank -> how many groups it made, which."""
    cases = [*_SMALL, *((1024, tp, pp, 1, *_RANKS) for _, tp, pp in _LARGE)]
    line = [sys.executable, "-W", "ignore", "-c", _CODE, *(",".join(map(str, case)) for case in cases)]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[tuple[int, ...], dict[int, tuple[int, set[str]]]] = {}
    for text in run.stdout.splitlines():
        case, rank, count, *sets = text.split()
        layout = tuple(map(int, case.split(",")[:4]))
        found.setdefault(layout, {})[int(rank)] = (int(count), set(sets))
    return found


@pytest.mark.parametrize(("world", "tp", "pp", "cp"), _SMALL)
def test_groups_of_every_rank(world: int, tp: int, pp: int, cp: int, made: dict[Any, Any]) -> None:
    """The dry run's figures are those of megatron-core's own start."""
    overrides = [f"parallel.tensor_model_parallel_size={tp}", f"parallel.pipeline_model_parallel_size={pp}"]
    overrides += ["model.num_query_groups=8", "training.global_batch_size=64", "training.micro_batch_size=1"]
    overrides += [f"parallel.context_parallel_size={cp}", "model.num_layers=12"]
    count = count_groups(resolve_layout(load_config("tiny", overrides), world))
    ranks = made[world, tp, pp, cp]
    assert len(ranks) == world
    assert max(number for number, _ in ranks.values()) + 1 == count.on_a_rank
    assert all(number == len(sets) for number, sets in ranks.values())
    assert len(set.union(*(sets for _, sets in ranks.values()))) + 1 == count.in_the_world


@pytest.mark.parametrize(("preset", "tp", "pp"), _LARGE)
def test_groups_of_1024_ranks(preset: str, tp: int, pp: int, made: dict[Any, Any]) -> None:
    """Far from 64; without `own_groups` they were 6,671 calls at TP4, 17 of them of the rank's own groups."""
    overrides = [f"parallel.tensor_model_parallel_size={tp}", "training.pad_global_batch=true"]
    count = count_groups(resolve_layout(load_config(preset, overrides), 1024))
    assert count.on_a_rank <= 9
    numbers = {rank: number for rank, (number, _) in made[1024, tp, pp, 1].items()}
    assert numbers == {rank: count.on_a_rank - 1 - (pp > 2 and rank == 511) for rank in _RANKS}


def _meet(rank: int, arguments: list[str]) -> None:
    import torch
    import torch.distributed as dist

    with runtime(load_config("tiny", arguments)):
        from megatron.core import parallel_state as state

        for group, size in (
            (state.get_intra_distributed_optimizer_instance_group(), 6),
            (state.get_data_parallel_group(with_context_parallel=True), 2),
            (state.get_model_parallel_group(), 3),
        ):
            count = torch.ones(1)
            dist.all_reduce(count, group=group)
            assert count.item() == size


def test_ranks_of_three_stages_find_each_other() -> None:
    """The first and the last stage make a group more than the one between, before a group of all of them."""
    overrides = ["parallel.pipeline_model_parallel_size=3", "model.num_layers=3", "runtime.device=cpu"]
    run_ranks(_meet, 6, overrides)


def test_the_dry_run_prints_them(illada: Illada) -> None:
    done = illada(
        *("train", "--config", "illada-8b", "--dry-run", "--nproc", "8", "--nnodes", "128"),
        *("parallel.tensor_model_parallel_size=4", "parallel.sequence_parallel=true"),
    )
    assert done.code == 0, done.err
    assert "in the whole run" in done.out
    assert "1,286" in done.out
    assert "5 at most" in done.out
