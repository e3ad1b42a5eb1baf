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
# decoder_rank_generator.get_ranks). Of size 1: left out.
_SPANS: tuple[tuple[str, ...], ...] = (
    *(("dp", "cp"), ("dp",), (), ("cp",), ("tp", "pp"), ("tp",), ("pp",)),
    *(("tp", "dp", "cp"), ("tp", "dp"), ("tp", "cp")),
)
# megatron-core's descriptions (0.16 to 0.19) of groups that work while another over the same ranks may
_AT_THE_SAME_TIME = ("CONTEXT_PARALLEL_GROUP", "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP")
_OF_THE_OPTIMIZER = "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP"  # the whole world


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
    embedding, replicas = layout.pipeline > 2, layout.data * layout.context
    ring = layout.context > 1 and layout.data == 1
    amax = layout.tensor * replicas > 1 and 1 in (layout.tensor, replicas)
    more = embedding * layout.world_size // layout.pipeline + ring * layout.world_size // layout.context
    more += amax * layout.pipeline
    return GroupCount(1 + in_the_world + more, 1 + len(spans) + embedding + ring + amax)


@contextmanager
def own_groups() -> Iterator[None]:
    """Within it megatron-core makes the groups that this rank is in, and hardly a set of ranks twice.

    All of its groups are made by one function, whose name is bound anew here: torch's `use_local_synchronization` lets
    a rank leave out what it is no member of. A communicator does one collective after the other, so two kinds have
    their own: Transformer Engine's ring sends keys and values, and delayed scaling's largest values are reduced, while
    DDP reduces gradients, over the same ranks where there is no data or no tensor parallelism. The others that become
    one are experts', which are not there.

    torch names such a group after its ranks and the number of groups that a rank has made: all members have to have
    made as many. The first and the last stage have their embeddings' group more than those between, so no group that
    spans the stages may come after it. megatron-core's last one does, the optimizer's over the whole world, for the
    norm alone: it is torch's own.
    """
    from megatron.core import parallel_state

    create, made = parallel_state.create_group, dict[tuple[Any, ...], Any]()

    def create_own(ranks: Sequence[int], **options: Any) -> Any:
        if dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        purpose, configured = options.get("group_desc"), options.get("pg_options") is not None
        key: tuple[Any, ...] = (tuple(sorted(ranks)), options.get("backend"))
        if purpose == _OF_THE_OPTIMIZER and key not in made:
            return dist.group.WORLD
        # a communicator that is configured is nobody else's
        if configured or (len(ranks) > 1 and purpose in _AT_THE_SAME_TIME and key in made):
            key = (*key, purpose)
        if key not in made:
            made[key] = create(list(ranks), **(options | {"use_local_synchronization": True}))
        return made[key]

    parallel_state.create_group = create_own
    try:
        yield
    finally:
        parallel_state.create_group = create
