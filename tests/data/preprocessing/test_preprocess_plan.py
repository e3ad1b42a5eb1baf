"""Cutting the input: every line exactly once, wherever ranges, chunks and parts meet, and never more of it in memory
than the limit."""

import io
import itertools
import random
from pathlib import Path

import pytest

from illada_megatron.data.preprocessing import chunks
from illada_megatron.data.preprocessing.inputs import InputFile, find_inputs
from illada_megatron.data.preprocessing.plan import plan_tasks


def _ignore(_: int) -> None:
    pass


def _random_lines(generator: random.Random, longest: int) -> bytes:
    """Lines of random lengths, empty ones among them, the last with or without a newline."""
    lines = [bytes(generator.choices(b"abc", k=generator.choice([0, 1, 2, generator.randrange(longest)])))]
    lines *= generator.randrange(2)
    while len(lines) < generator.randrange(1, 30):
        lines.append(bytes(generator.choices(b"abc", k=generator.randrange(longest))))
    return b"\n".join(lines) + b"\n" * generator.randrange(2)


@pytest.mark.parametrize("seed", range(40))
def test_ranges_give_every_line_once(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For random lines, cuts and chunk sizes: the ranges' bytes, one after another, are the file, and each range
    begins where a line begins and ends where one ends."""
    generator = random.Random(seed)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", generator.choice([1, 2, 3, 7, 64]))
    data = _random_lines(generator, generator.choice([2, 10, 200]))
    path = tmp_path / "lines"
    path.write_bytes(data)
    cuts = sorted({0, len(data), *(generator.randrange(len(data) + 1) for _ in range(generator.randrange(12)))})
    starts = {0} | {i + 1 for i, byte in enumerate(data) if byte == ord("\n")}
    position = 0
    for start, end in itertools.pairwise(cuts):
        piece = b"".join(chunks.line_range(path, start, end, _ignore))
        if piece:
            assert position in starts
            assert start <= position < end
        position += len(piece)
        assert data[:position].endswith(piece)
    assert position == len(data)


@pytest.mark.parametrize("as_views", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_lines_and_texts_within_the_limit(seed: int, as_views: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As str.split gives them, but those above the limit: they are counted, wherever the chunks were cut."""
    monkeypatch.setattr(chunks, "_LONG_LINE_BYTES", 0 if as_views else 10**9)
    monkeypatch.setattr(chunks, "_LINES_LOOKED_AT", 1)
    generator = random.Random(seed)
    data = _random_lines(generator, 60)
    size, limit = generator.choice([1, 3, 10, 1000]), generator.choice([1, 10, 30, 1000])
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    found = list(chunks.split_lines(iter(pieces), limit))
    lines = data.split(b"\n")[: -1 if data.endswith(b"\n") or not data else None]
    assert [line for some, _ in found for line in some] == [line if len(line) <= limit else b"" for line in lines]
    assert sum(count for _, count in found) == sum(len(line) > limit for line in lines)

    texts = list(chunks.split_text(iter(pieces), limit))
    whole = io.BytesIO(data).readlines()
    assert b"".join(text for text in texts if text) == b"".join(line for line in whole if len(line) <= limit)
    assert texts.count(None) == sum(len(line) > limit for line in whole)
    assert all(len(text) <= limit for text in texts if text is not None)
    if 0 < len(data) <= limit:
        assert texts == [data]


def test_a_long_line_is_never_held() -> None:
    """What is pending stays below the limit and a chunk, over 1000 chunks of one line."""
    held = 0

    def endless() -> object:
        for _ in range(1000):
            yield b"x" * 1000
        yield b"\nshort\n"

    sizes = [sum(map(len, lines)) for lines, _ in chunks.split_lines(endless(), 5000)]  # type: ignore[arg-type]
    assert held + max(sizes) == len(b"short")
    assert list(chunks.split_text(endless(), 5000)) == [None, b"short\n"]  # type: ignore[arg-type]


def _file(path: str, size: int, compression: str = "none", file_format: str = "jsonl") -> InputFile:
    return InputFile.model_validate(
        {"path": path, "format": file_format, "compression": compression, "size_bytes": size, "modified_ns": 0}
    )


def test_large_files_are_cut_and_small_ones_share() -> None:
    tasks = plan_tasks([_file("a", 10), _file("b", 20), _file("c", 1050), _file("d", 90), _file("e", 11)], 100)
    described = [(task.name, [(p.file.path, p.start, p.end) for p in task.pieces]) for task in tasks]
    assert described[0] == ("_00000", [("a", 0, None), ("b", 0, None)])
    ranges = [pieces[0] for _, pieces in described[1:12]]
    assert [path for path, _, _ in ranges] == ["c"] * 11
    assert [start for _, start, _ in ranges] == [0, *(end for _, _, end in ranges[:-1])]
    assert ranges[-1][2] == 1050
    assert max(end - start for _, start, end in ranges) <= 100
    assert [name for name, _ in described] == [f"_{i:05d}" for i in range(14)]
    assert described[12:] == [("_00012", [("d", 0, None)]), ("_00013", [("e", 0, None)])]


def test_one_shard_has_the_prefix_as_its_name() -> None:
    (task,) = plan_tasks([_file("a", 10), _file("b", 20)], 100)
    assert task.part_name(0) == ""
    (streamed,) = plan_tasks([_file("a", 10, "gzip")], 100)
    assert streamed.part_name(3) == "_00000_003"
    kinds = [_file("a", 10), _file("b", 10, "zstd"), _file("c", 10, "gzip"), _file("d", 30, "gzip"), _file("e", 1)]
    assert [[p.file.path for p in task.pieces] for task in plan_tasks(kinds, 100)] == [["a"], ["b", "c"], ["d"], ["e"]]


def test_directories_and_globs_by_name(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.txt.gz", "sub/c.parquet", "sub/d.json.zst", "notes.md", ".hidden.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [(Path(file.path).name, file.format, file.compression) for file in find_inputs([tmp_path]).files]
    assert found == [
        ("a.txt.gz", "text", "gzip"),
        ("b.jsonl", "jsonl", "none"),
        ("c.parquet", "parquet", "none"),
        ("d.json.zst", "jsonl", "zstd"),
    ]
    assert [Path(file.path).name for file in find_inputs([tmp_path / "*.*l", tmp_path / "a.txt.gz"]).files] == [
        *("b.jsonl", "a.txt.gz")
    ]
