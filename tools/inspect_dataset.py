"""Shows what shards hold and verifies them; see illada_megatron.data.shards.inspect."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from illada_megatron.cli.main import run_tool
from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.indexed_dataset import IndexedDataset
from illada_megatron.data.shards.inspect import (
    LengthStatistics,
    count_lengths,
    expected_bytes,
    sample_texts,
    verify_shard,
)
from illada_megatron.data.shards.shard_list import FoundShard, find_shards
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer
from illada_megatron.system.console import made_console
from illada_megatron.system.terminal import counted

SHOWN_SHARDS = 20


def main(
    paths: Annotated[
        list[str], typer.Argument(help="prefixes, quoted globs of prefixes, folders or manifests (.json)")
    ],
    verify: Annotated[bool, typer.Option("--verify", help="check all of index, tokens and checksums")] = False,
    vocab_size: Annotated[int | None, typer.Option(help="ids must be below it; default: the manifest's")] = None,
    tokenizer_model: Annotated[
        str | None, typer.Option(help="shows documents' first tokens as text: a file, a directory or org/name")
    ] = None,
    samples: Annotated[int, typer.Option(help="how many documents of the first shard to show")] = 3,
) -> None:
    """Statistics of shards. Exit status 1 with a list of all problems if there are any, 2 where nothing could be
    looked at."""
    screen, problems = made_console(), []
    shards = find_shards(paths)
    tokenizer = load_tokenizer(tokenizer_model, option="--tokenizer-model") if tokenizer_model else None
    statistics, opened = LengthStatistics(), []
    for shard in shards:
        try:
            dataset = IndexedDataset(shard.prefix)
            count_lengths(dataset, statistics)
            opened.append(dataset)
        except (DataError, OSError) as error:
            problems.append(str(error))
    if opened:
        print_shards(screen, opened)
        print_lengths(screen, statistics)
    if verify:
        problems = verify_all(screen, shards, vocab_size)
    try:
        if tokenizer and opened:
            for document, text in sample_texts(opened[0], tokenizer, samples):
                screen.print(Text(f"document {document}: {text}"))
    except (DataError, IndexError) as error:
        problems.append(f"{opened[0].prefix}: {tokenizer_model} does not read its ids: {error}")
    for problem in problems:
        screen.print(Text(f"problem: {problem}"), soft_wrap=True)
    if problems:
        raise SystemExit(1)
    if verify:
        screen.print(f"verified: {counted(len(shards), 'shard')}, no problems")


def print_shards(screen: Console, opened: list[IndexedDataset]) -> None:
    table = Table("shard", "ids", "documents", "tokens", ".bin bytes", ".idx bytes", title="MMIDIDX version 1")
    for column in table.columns[2:]:
        column.justify = "right"

    def row(name: str, of: list[IndexedDataset]) -> None:
        dtypes = ", ".join(sorted({str(dataset.dtype) for dataset in of}))
        bin_bytes = sum(dataset.num_tokens * dataset.dtype.itemsize for dataset in of)
        idx_bytes = sum(dataset.verified_bytes for dataset in of) - bin_bytes
        documents, tokens = sum(d.num_documents for d in of), sum(d.num_tokens for d in of)
        table.add_row(
            Text(name, overflow="fold"), dtypes, *(f"{n:,}" for n in (documents, tokens, bin_bytes, idx_bytes))
        )

    for dataset in opened[:SHOWN_SHARDS]:
        row(dataset.prefix, [dataset])
    if len(opened) > SHOWN_SHARDS:
        row(f"... and {len(opened) - SHOWN_SHARDS} more", opened[SHOWN_SHARDS:])
    if len(opened) > 1:
        row(f"all {len(opened)}", opened)
    screen.print(table)


def print_lengths(screen: Console, statistics: LengthStatistics) -> None:
    least, greatest = statistics.median_bucket()
    screen.print(
        f"tokens in a document: shortest {statistics.shortest:,}, median {least:,} to {greatest:,}, "
        f"mean {statistics.tokens / statistics.documents:,.1f}, longest {statistics.longest:,}"
    )
    table = Table("tokens", "documents", "share", "")
    table.columns[0].justify = table.columns[1].justify = table.columns[2].justify = "right"
    most = int(statistics.histogram.max())
    for low, high, count in statistics.buckets():
        share = f"{count / statistics.documents:.1%}"
        table.add_row(f"{low:,} to {high:,}", f"{count:,}", share, "#" * round(40 * count / most))
    screen.print(table)


def verify_all(screen: Console, shards: list[FoundShard], vocab_size: int | None) -> list[str]:
    problems: list[str] = []
    columns = (TextColumn("verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        task = bar.add_task("verify", total=expected_bytes(shards))
        for shard in shards:
            problems += verify_shard(shard, vocab_size, lambda count: bar.advance(task, count))
    return problems


if __name__ == "__main__":
    run_tool(main, "inspect_dataset")
