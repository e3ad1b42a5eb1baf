"""How many of the machines that are there a run works on, the others waiting as spares: a run that has lost some goes
on with what is left, as cheaply as it can."""

from dataclasses import dataclass
from itertools import groupby

from illada_megatron.config.layout import ChosenLayout, RunConfig, choose_layout, empty_places_text, layout_text


@dataclass(frozen=True)
class Work:
    """What a run does on the machines that are there."""

    nodes: int
    """Machines that work."""
    chosen: ChosenLayout


def choose_work(config: RunConfig, ranks_per_node: int, nodes: int) -> Work:
    """What a run does with `nodes` machines: all work where a layout fits them without empty places. Else it is the
    cheapest of all smaller numbers and, where training.pad_global_batch allows them, of layouts with empty places; of
    equal ones that with the fewest machines, which leaves most spares.

    Raises ValueError where no layout fits any number of them, with the reasons for all of them.
    """
    work = _by_nodes(config, ranks_per_node, nodes)[-1]
    if work is None:
        return Work(nodes, choose_layout(config, nodes * ranks_per_node))  # raises
    return work


def layouts_by_nodes(config: RunConfig, ranks_per_node: int, least: int, most: int) -> list[tuple[str, str]]:
    """What a run does on each number of machines from `most` down to `least`, as rows of a table; numbers of which the
    same is said share one."""
    works = _by_nodes(config, ranks_per_node, most)
    unpadded = _by_nodes(_padded(config, False), ranks_per_node, most)
    unit = next((work.chosen.cost for work in reversed(works) if work is not None), 1.0)
    rows = []
    for (work, other), group in groupby(range(most, least - 1, -1), lambda one: (works[one - 1], unpadded[one - 1])):
        numbers = list(group)
        name = f"{numbers[-1]} to {numbers[0]} nodes" if len(numbers) > 1 else f"{numbers[0]} nodes"
        rows.append((name, _text(work, other, numbers[0], unit, most)))
    return rows


def _by_nodes(config: RunConfig, ranks_per_node: int, most: int) -> list[Work | None]:
    """The work on 1, 2, ... `most` machines; None: no layout fits so few."""
    works: list[Work | None] = []
    cheapest: Work | None = None
    for nodes in range(1, most + 1):
        try:
            work = Work(nodes, choose_layout(config, nodes * ranks_per_node))
        except ValueError:
            works.append(cheapest)
            continue
        # equal but for rounding is no reason to wait for more machines
        if cheapest is None or work.chosen.cost < cheapest.chosen.cost * (1 - 1e-9):
            cheapest = work
        works.append(cheapest if work.chosen.empty_places else work)
    return works


def _padded(config: RunConfig, pad: bool) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"pad_global_batch": pad})})


def _text(work: Work | None, unpadded: Work | None, nodes: int, unit: float, most: int) -> str:
    """Of a row that goes up to `nodes` machines. unit: the cost on `most`; unpadded: the work without empty places."""
    if work is None:
        return "no layout fits: the run would end"
    chosen = work.chosen
    text = (
        f"{layout_text(chosen.layout, chosen.config.parallel.sequence_parallel)}; {chosen.layout.num_microbatches} "
        f"micro-batches of {chosen.config.training.micro_batch_size} a rank{empty_places_text(chosen)}"
    )
    if work.nodes < nodes:
        text = f"{work.nodes} work, the others wait as spares: {text}"
    if nodes < most:
        text += f"; a step takes {chosen.cost / unit:.2f} times as long as on {most}"
    if not chosen.empty_places:
        return text
    if unpadded is None:
        return f"{text} (without empty places the run would end)"
    return f"{text} (without empty places {unpadded.chosen.cost / unit:.2f}, on {unpadded.nodes})"
