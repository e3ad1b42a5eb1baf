"""`illada checkpoint`: reshard, inspect, diff, average; tools/reshard_checkpoint.py is the first of them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Look into, compare and rewrite checkpoints.")

SourceArgument = Annotated[
    str, typer.Argument(help="A save_dir (its newest checkpoint), one step_... of it, or a directory of Megatron's.")
]
ProcessesOption = Annotated[int | None, typer.Option(min=1, help="Default: this machine's cores, 8 at most.")]
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
    import time

    from illada_megatron.checkpoint.reshard import LayoutChange
    from illada_megatron.checkpoint.reshard import reshard as run_reshard

    begin = time.perf_counter()
    done = run_reshard(
        source,
        target,
        LayoutChange(tensor=tp, pipeline=pp, virtual=vpp, data=dp),
        format_=format_,
        implementation=transformer_impl,
        memory_mb=memory_mb,
        processes=processes,
        verify=verify,
        overrides=overrides or (),
    )
    seconds = time.perf_counter() - begin
    print(
        f"{done.path}: step {done.step}, {done.tensors:,} tensors, {done.nbytes:,} bytes in {seconds:.1f} s "
        f"({done.nbytes / seconds / 1e9:.2f} GB/s)"
    )
