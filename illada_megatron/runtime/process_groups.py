"""The process groups of a run, and how few of them a rank makes.

megatron-core's `initialize_model_parallel` has every rank call torch's `new_group` for every group of the world: 6,671
calls at TP4 on 1,024 ranks, of which 17 are this rank's, over no more than four different sets of ranks (experts'
groups, and context parallel ones of one rank, repeat them). Here a rank makes what it is in, each set of ranks once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist

from illada_megatron.config.layout import Layout

# The dimensions that each kind of group spans, as megatron-core makes them without experts (parallel_state.py:
# decoder_rank_generator.get_ranks, and the whole world for the distributed optimizer). Of size 1: left out. The context
# parallel group is counted apart.
_SPANS: tuple[tuple[str, ...], ...] = (
    *(("dp", "cp"), ("dp",), (), ("tp", "pp"), ("tp",), ("pp",)),
    *(("tp", "dp", "cp"), ("tp", "dp"), ("tp", "cp"), ("tp", "dp", "cp", "pp")),
)
_CONTEXT_PARALLEL = "CONTEXT_PARALLEL_GROUP"  # megatron-core's description of it (0.16 to 0.19)


@dataclass(frozen=True)
class GroupCount:
    """How many process groups there are, torch's own of the whole world included."""

    in_the_world: int
    on_a_rank: int
    """At most: the first and the last stage have one more than those between."""

    def rows(self) -> list[tuple[str, str]]:
        """For the dry run."""
        return [
            ("in the whole run", f"{self.in_the_world:,}"),
            ("made by a rank", f"{self.on_a_rank} at most: those that it is in, each set of ranks once"),
            ("communicators", "NCCL makes one when a group is first used, of its own ranks alone"),
        ]


def count_groups(layout: Layout) -> GroupCount:
    """What `initialize_model_parallel` makes within `own_groups`, and torch's first group."""
    sizes = {"tp": layout.tensor, "dp": layout.data, "cp": layout.context, "pp": layout.pipeline}
    spans = {tuple(one for one in span if sizes[one] > 1) for span in _SPANS}
    in_the_world = sum(layout.world_size // prod(sizes[one] for one in span) for span in spans)
    # embeddings: the first and the last stage together; with one or two stages that is a set that is there already
    embedding, context = layout.pipeline > 2, layout.context > 1
    more = embedding * layout.world_size // layout.pipeline + context * layout.world_size // layout.context
    return GroupCount(1 + in_the_world + more, 1 + len(spans) + embedding + context)


@contextmanager
def own_groups() -> Iterator[None]:
    """Within it megatron-core makes the groups that this rank is in, and no set of ranks twice but context parallel's.

    All of its groups are made by one function, whose name is bound anew here: torch's `use_local_synchronization` lets
    a rank leave out what it is no member of. Nothing overlaps on the groups that become one: they are those of experts,
    which are not there, or of the optimizer's norm, which waits for the gradients. Context parallel ranks keep their
    own: Transformer Engine's ring sends keys and values while DDP reduces gradients, without data parallelism over the
    same ranks, and a communicator does one after the other.
    """
    from megatron.core import parallel_state

    create, made = parallel_state.create_group, dict[tuple[Any, ...], Any]()

    def create_own(ranks: Sequence[int], **options: Any) -> Any:
        if dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        key: tuple[Any, ...] = (tuple(ranks), options.get("backend"))
        if options.get("pg_options") is not None:  # a communicator that is configured is nobody else's
            key = (*key, options.get("group_desc"))
        elif len(ranks) > 1 and options.get("group_desc") == _CONTEXT_PARALLEL:
            key = (*key, _CONTEXT_PARALLEL)
        if key not in made:
            made[key] = create(list(ranks), **(options | {"use_local_synchronization": True}))
        return made[key]

    parallel_state.create_group = create_own
    try:
        yield
    finally:
        parallel_state.create_group = create
