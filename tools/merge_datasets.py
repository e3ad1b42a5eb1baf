"""Several shards -> one, under Megatron's option names; see illada_megatron.data.shards.merge."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from illada_megatron.cli.main import run_tool
from illada_megatron.data.shards.merge import merge, progress_bytes
from illada_megatron.data.shards.shard_list import find_shards
from illada_megatron.system.terminal import counted, say


def main(
    input: Annotated[
        list[str], typer.Option(help="folders, prefixes, quoted globs of prefixes or manifests, in this order")
    ],
    output_prefix: Annotated[Path, typer.Option(help="PREFIX of the PREFIX.bin and PREFIX.idx to write")],
) -> None:
    """Concatenate shards of one token type. Inputs from manifests give the output a manifest, PREFIX.manifest.json."""
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    shards = find_shards(input)
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("merge", total=progress_bytes(shards))
        summary = merge(shards, output_prefix, lambda count: bar.advance(task, count))
    say(
        f"{output_prefix}: {counted(len(shards), 'shard')}, {counted(summary.documents, 'document')}, "
        f"{counted(summary.tokens, 'token')}, "
        f"{summary.bin_bytes} bytes; {summary.seconds:.1f} s ({summary.bin_bytes / summary.seconds / 1e6:.0f} MB/s)"
    )
    if summary.manifest_path:
        say(f"{summary.manifest_path}: verified, with checksums")


if __name__ == "__main__":
    run_tool(main, "merge_datasets")
