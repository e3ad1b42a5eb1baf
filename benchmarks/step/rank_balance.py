"""How unequal the work of data-parallel ranks is, with samples in their order and divided by their work, and what the
division costs. See benchmarks/README.md.

python -m benchmarks.step.rank_balance"""

import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.measuring.machine import commit, cpu_model
from benchmarks.step.pipeline_time import one_forward_one_backward
from benchmarks.step.step_worker import run_config, silence_known_warnings
from benchmarks.step.workloads import Workload
from illada_megatron.config import RunConfig, load_config
from illada_megatron.config.layout import resolve_layout
from illada_megatron.diffusion import sample_boundary, sample_spans
from illada_megatron.diffusion.masking import sample_masks
from illada_megatron.diffusion.work import SampleWork, work_of_samples
from illada_megatron.runtime import runtime

_SHAPE = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4}
_CPU_STEP = Workload(
    "the demo's model",
    8_000,
    sequence_length=128,
    micro_batch_size=8,
    global_batch_size=16,
    num_query_groups=2,
    **_SHAPE,
)
_PIPELINES = (4, 8)


@dataclass(frozen=True)
class Spread:
    """Of the ranks' FLOPs in a step; means over steps."""

    max_over_mean: float
    range_over_mean: float
    """(max - min) / mean."""


@dataclass(frozen=True)
class _Windows:
    """A corpus's shape, which is all that the noise asks for where documents are no boundaries."""

    sequence_length: int

    def document_starts(self, _: int) -> NDArray[np.int64]:
        raise NotImplementedError("this benchmark reads no corpus")


def main(
    preset: Annotated[str, typer.Option(help="whose samples are drawn")] = "illada-8b",
    ranks: Annotated[int, typer.Option(min=2, help="data-parallel")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="global batches, each of other samples")] = 4,
    cpu_steps: Annotated[int, typer.Option(min=1, help="training steps whose CPU time is compared with")] = 5,
) -> None:
    """The last line of standard output is JSON. It holds where the spread falls at least threefold and dividing takes
    less than 1 % of a step."""
    silence_known_warnings()
    config, console = load_config(preset, ["training.pad_global_batch=true"]), Console(stderr=True)
    drawn = [_drawn(config, step) for step in range(steps)]
    before, after = (_spread(config, drawn, ranks, divided) for divided in (False, True))
    large = _dividing_seconds(config, ranks, config.training.global_batch_size)
    small_config, cpu_step = _cpu_step(cpu_steps)
    small = _dividing_seconds(small_config, 2, _CPU_STEP.global_batch_size)
    figures: dict[str, Any] = {
        **{"benchmark": "rank_balance", "commit": commit(), "cpu": cpu_model(), "load": os.getloadavg()[0]},
        **{"preset": preset, "samples": config.training.global_batch_size, "ranks": ranks, "steps": steps},
        **{"in_order": asdict(before), "divided": asdict(after)},
        "range_falls": before.range_over_mean / after.range_over_mean,
        "pipelines": {stages: _pipeline(config, drawn[0], ranks, stages) for stages in _PIPELINES},
        **{"dividing_cpu_seconds": large, "cpu_step_samples": _CPU_STEP.global_batch_size},
        **{"cpu_step_cpu_seconds": cpu_step, "cpu_step_dividing_cpu_seconds": small},
    }
    figures["holds"] = bool(figures["range_falls"] >= 3 and small < 0.01 * cpu_step / 2)  # a rank of two has half of it
    _show(console, figures)
    print(json.dumps(figures))


def _drawn(config: RunConfig, step: int) -> SampleWork:
    """What is really masked in a global batch, drawn as for training."""
    count, seed = config.training.global_batch_size, config.training.seeds.noise
    corpus, diffusion = _Windows(config.data.sequence_length), config.diffusion
    masked, squared = np.zeros(count), np.zeros(count)
    for number, sample in enumerate(range(step * count, (step + 1) * count)):
        boundary = sample_boundary(sample, corpus, diffusion, seed)
        lengths, times = sample_spans(sample, boundary, diffusion, seed)
        for span in sample_masks(sample, lengths, times, diffusion, seed):
            positions = span.positions
            masked[number] += positions.sum() if positions.dtype == bool else positions.size
        squared[number] = sum(length**2 for length in boundary.segment_tokens)
    return SampleWork(masked, squared)


def _order(config: RunConfig, step: int, ranks: int, pipeline: int, divided: bool) -> NDArray[np.int64]:
    """Samples of a step `[ranks, micro-batches]`, of one sample each."""
    from illada_megatron.training.division import divide, sample_costs

    count = config.training.global_batch_size
    if not divided:
        return np.arange(count).reshape(-1, ranks).T
    expected = _expected(config, step * count, count)
    return divide(sample_costs(expected, config.model, pipeline), ranks, count // ranks, 1, pipeline > 1)[..., 0]


def _expected(config: RunConfig, first: int, count: int) -> SampleWork:
    return work_of_samples(first, count, config.data.sequence_length, config.diffusion, config.training.seeds.noise)


def _flops(config: RunConfig, drawn: SampleWork, order: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each rank."""
    from illada_megatron.training.flops import training_flops

    tokens = order.shape[1] * config.data.sequence_length
    return np.array(
        [
            training_flops(
                config.model, tokens, int(drawn.squared_lengths[own].sum()), int(drawn.masked_tokens[own].sum())
            )
            for own in order
        ]
    )


def _spread(config: RunConfig, drawn: list[SampleWork], ranks: int, divided: bool) -> Spread:
    of_steps = []
    for step, one in enumerate(drawn):
        flops = _flops(config, one, _order(config, step, ranks, 1, divided))
        of_steps.append((flops.max() / flops.mean(), np.ptp(flops) / flops.mean()))
    return Spread(*np.mean(of_steps, axis=0).round(5).tolist())


def _pipeline(config: RunConfig, drawn: SampleWork, ranks: int, stages: int) -> dict[str, float]:
    """Time of the slowest rank's step over that of equal micro-batches without a bubble, followed through 1F1B with
    FLOPs as times: samples in their order, divided, and divided but with each rank's in their order."""
    from illada_megatron.training.flops import training_flops

    ranks = max(1, ranks // stages)
    ideal = _flops(config, drawn, np.arange(drawn.masked_tokens.size)[None])[0] / (ranks * stages)
    layers = training_flops(config.model, config.data.sequence_length, 0, 0)
    pair, head = training_flops(config.model, 0, 1, 0), training_flops(config.model, 0, 0, 1)

    def slowest(order: NDArray[np.int64]) -> float:
        times = []
        for own in order:
            work = np.tile((layers + pair * drawn.squared_lengths[own]) / stages, (stages, 1))
            work[-1] += head * drawn.masked_tokens[own]
            times.append(one_forward_one_backward(work))
        return max(times) / ideal

    divided = _order(config, 0, ranks, stages, divided=True)
    orders = {
        "in_order": _order(config, 0, ranks, stages, divided=False),
        "divided": divided,
        "divided_unordered": np.sort(divided, axis=1),
    }
    return {name: round(slowest(order), 4) for name, order in orders.items()}


def _dividing_seconds(config: RunConfig, ranks: int, count: int) -> float:
    """CPU time of dividing a step's samples, the median of 20."""
    from illada_megatron.training.division import Division

    layout, size = resolve_layout(config, ranks), config.training.micro_batch_size
    division = Division(lambda first, number: _expected(config, first, number), config.model, layout, size)
    seconds = []
    for step in range(20):
        begin = time.thread_time()
        division.places(step * count, count, 0, 0)
        seconds.append(time.thread_time() - begin)
    return statistics.median(seconds)


def _cpu_step(steps: int) -> tuple[RunConfig, float]:
    """CPU time of a training step of one process, the median."""
    with tempfile.TemporaryDirectory(prefix="illada-bench-") as folder:
        config = run_config(_CPU_STEP, "fp32", 1, Path(folder))
        with runtime(config) as run:
            from benchmarks.step.illada_step import IlladaStep

            subject, seconds = IlladaStep(config, run), []
            for _ in range(steps + 1):
                begin = time.process_time()
                subject.step()
                seconds.append(time.process_time() - begin)
            subject.state.close()
    return config, statistics.median(seconds[1:])


def _show(console: Console, figures: dict[str, Any]) -> None:
    title = f"{figures['preset']}, {figures['samples']} samples a step over {figures['ranks']} ranks"
    table = Table("samples", "max / mean", "(max - min) / mean", title=title)
    for name in ("in_order", "divided"):
        spread = figures[name]
        table.add_row(name, f"{spread['max_over_mean']:.4f}", f"{spread['range_over_mean']:.4f}")
    console.print(table)
    table = Table("pipeline", "in order", "divided", "divided, without an order", title="step over ideal, 1F1B")
    for stages, one in figures["pipelines"].items():
        table.add_row(str(stages), *(f"{one[name]:.4f}" for name in ("in_order", "divided", "divided_unordered")))
    console.print(table)
    console.print(
        f"dividing {figures['samples']} samples: {1e3 * figures['dividing_cpu_seconds']:.1f} ms of CPU; "
        f"{figures['cpu_step_samples']} samples: {1e3 * figures['cpu_step_dividing_cpu_seconds']:.2f} ms beside a step "
        f"of {1e3 * figures['cpu_step_cpu_seconds']:.0f} ms on one process"
    )


if __name__ == "__main__":
    typer.run(main)
