"""`illada checkpoint`: reshard, inspect, diff, average; tools/reshard_checkpoint.py is the first of them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from illada_megatron.checkpoint.tools.processes import prepare
from illada_megatron.config import ConfigError
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import counted, say

if TYPE_CHECKING:
    from illada_megatron.checkpoint.tools.opening import OpenCheckpoint
    from illada_megatron.checkpoint.tools.rewriting import Rewritten

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look into, compare and rewrite checkpoints.")

SourceArgument = Annotated[
    str, typer.Argument(help="A save_dir (its newest checkpoint), one step_... of it, or a directory of Megatron's.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="`section.field=value` that Megatron's checkpoints do not say: model.mask_token_id=5."),
]
ProcessesOption = Annotated[
    int | None, typer.Option(min=1, help="Default: two for each core of this machine, 4 at most.")
]
MemoryOption = Annotated[
    int, typer.Option(min=1, help="MB of tensors that all processes together hold at a time; the model does not count.")
]
VerifyOption = Annotated[bool, typer.Option(help="Compare the checksums of all files that are read.")]


@app.command()
def reshard(
    source: SourceArgument,
    target: Annotated[Path, typer.Argument(help="A new directory, which is there as a whole or not at all.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Fields of the configuration to change: `section.field=value`.")
    ] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Tensor-parallel size; default: as SOURCE has it.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Pipeline-parallel size; default: as SOURCE has it.")] = None,
    vpp: Annotated[int | None, typer.Option(min=1, help="Model chunks on a pipeline rank; default: 1.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Data-parallel size; default: whatever the run has.")] = None,
    format_: Annotated[
        Literal["torch_dist", "legacy"],
        typer.Option("--format", help="This program's, or Megatron's mp_rank_XX_YYY directories."),
    ] = "torch_dist",
    transformer_impl: Annotated[
        Literal["transformer_engine", "local"],
        typer.Option(help="Names of the layers in the legacy format, as the Megatron that loads it has them."),
    ] = "transformer_engine",
    memory_mb: MemoryOption = 512,
    processes: ProcessesOption = None,
    verify: VerifyOption = True,
) -> None:
    """Rewrite a checkpoint for another layout, optimizer state included, on one machine without a GPU.

    `illada checkpoint reshard runs/8b/checkpoints resharded --tp 2 --pp 4 --dp 8`

    Out to Megatron: `illada checkpoint reshard runs/8b/checkpoints megatron --tp 4 --format legacy`

    In from Megatron: `illada checkpoint reshard megatron runs/new --tp 1 --pp 1 model.mask_token_id=5`
    """
    begin = time.perf_counter()
    prepare()
    from illada_megatron.checkpoint.tools.reshard import LayoutChange
    from illada_megatron.checkpoint.tools.reshard import reshard as run_reshard

    done = run_reshard(
        _opened(source, overrides or ()),
        target,
        LayoutChange(tensor=tp, pipeline=pp, virtual=vpp, data=dp),
        format_=format_,
        implementation=transformer_impl,
        memory_mb=memory_mb,
        processes=processes,
        verify=verify,
        overrides=overrides or (),
    )
    _say_written(done, time.perf_counter() - begin)


@app.command()
def inspect(
    path: SourceArgument,
    overrides: Overrides = None,
    optimizer: Annotated[bool, typer.Option("--optimizer", help="List the optimizer's tensors too.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="The L2 norm of each tensor listed; reads them all.")] = False,
    memory_mb: MemoryOption = 512,
    processes: ProcessesOption = None,
    verify: VerifyOption = True,
) -> None:
    """Show what a checkpoint holds and whether it is intact; exits with 1 where it is not.

    `illada checkpoint inspect runs/8b/checkpoints --norms`

    `illada checkpoint inspect runs/8b/checkpoints/step_00001000 --no-verify`
    """
    prepare()
    from illada_megatron.checkpoint.tools.inspection import inspect_checkpoint

    opened = _opened(path, overrides or ())
    found = inspect_checkpoint(opened, norms, verify, memory_mb, processes, optimizer)
    screen = _console()
    facts = Table(show_header=False)
    for row in found.facts:
        facts.add_row(*row)
    screen.print(facts)
    tensors = Table("tensor", "shape", "dtype", "bytes", *(["norm"] if norms else []))
    for tensor in found.tensors:
        shape = " x ".join(map(str, tensor.shape))
        norm = [f"{tensor.norm:.6g}"] if tensor.norm is not None else []
        tensors.add_row(tensor.name, shape, tensor.dtype, f"{tensor.nbytes:,}", *norm)
    for column in tensors.columns[3:]:
        column.justify = "right"
    screen.print(tensors)
    if found.left_out:
        say(f"{counted(found.left_out, 'tensor')} of the optimizer not listed: --optimizer lists them")
    damages = [*opened.refused, *found.damages]
    for damage in damages:
        say(f"damaged: {damage}")
    if damages:
        raise typer.Exit(1)


@app.command()
def diff(
    first: SourceArgument,
    second: SourceArgument,
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=0, help="How many tensors to show, the largest differences first.")] = 20,
    optimizer: Annotated[bool, typer.Option(help="Compare the optimizer's state too.")] = True,
    memory_mb: MemoryOption = 512,
    processes: ProcessesOption = None,
) -> None:
    """Compare two checkpoints tensor by tensor; exits with 0 where all are the same bit for bit, with 1 where not.

    Their layouts and formats may differ: `illada checkpoint diff runs/8b/checkpoints megatron/iter_0001000`
    """
    prepare()
    from illada_megatron.checkpoint.tools.compare import compare

    found = compare(_opened(first, overrides or ()), _opened(second, overrides or ()), optimizer, memory_mb, processes)
    for name in found.only_in_first:
        say(f"only in {first}: {name}")
    for name in found.only_in_second:
        say(f"only in {second}: {name}")
    for line in found.of_other_kind:
        say(line)
    if found.differences and top:
        table = Table("tensor", "elements", "of them different", "largest difference", "largest relative difference")
        for column in table.columns[1:]:
            column.justify = "right"
        for one in found.differences[:top]:
            values = (f"{one.largest:.6g}", f"{one.largest_relative:.6g}")
            table.add_row(one.name, f"{one.elements:,}", f"{one.different:,}", *values)
        _console().print(table)
    say(f"{found.same:,} tensors are the same, {len(found.differences):,} differ in their values")
    if not found.identical:
        raise typer.Exit(1)


@app.command()
def average(
    paths: Annotated[list[str], typer.Argument(help="Two checkpoints or more, and the new directory at the end.")],
    weights: Annotated[str | None, typer.Option(help="One number each, as 1,1,2; default: all alike.")] = None,
    overrides: Overrides = None,
    memory_mb: MemoryOption = 512,
    processes: ProcessesOption = None,
    verify: VerifyOption = True,
) -> None:
    """Average the weights of several checkpoints of one model, as after annealing. The result has no optimizer state:
    it can be evaluated, generate, and begin a run.

    `illada checkpoint average runs/8b/checkpoints/step_00009000 runs/8b/checkpoints/step_00010000 averaged`
    """
    if len(paths) < 3:
        raise ConfigError(f"average takes two checkpoints or more and a new directory, found {len(paths)} paths")
    try:
        numbers = None if weights is None else [float(text) for text in weights.split(",")]
    except ValueError as error:
        raise ConfigError(f"--weights is {weights}, expected numbers and commas, as 1,1,2") from error
    begin = time.perf_counter()
    prepare()
    from illada_megatron.checkpoint.tools.average import average as run_average

    *sources, target = paths
    opened = [_opened(path, overrides or ()) for path in sources]
    done = run_average(opened, Path(target), numbers, memory_mb, processes, verify)
    _say_written(done, time.perf_counter() - begin)


def _console() -> Console:
    """Names are long: where there is no terminal they are not cut to the width of one."""
    screen = made_console()
    return screen if screen.is_terminal else made_console(width=160)


def _opened(path: str, overrides: Sequence[str]) -> "OpenCheckpoint":
    from illada_megatron.checkpoint.tools.opening import open_checkpoint

    opened = open_checkpoint(path, overrides)
    for reason in opened.refused:
        say(f"refused {reason}", error=True)
    return opened


def _say_written(done: "Rewritten", seconds: float) -> None:
    say(
        f"{done.path}: step {done.step}, {counted(done.tensors, 'tensor')}, {done.nbytes:,} bytes in {seconds:.1f} s "
        f"({done.nbytes / seconds / 1e9:.2f} GB/s)"
    )
    if done.without_ema:
        say("the moving average of the weights is left out: Megatron's format has no place for it")
    if done.without_fp8_state:
        say("delayed scaling's state (fp8.*) is left out of Megatron's format: factors begin at 1 (docs/fp8.md)")
