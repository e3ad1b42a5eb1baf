"""How a job is cut into shard tasks: a pure function of the inputs and the options, never of cores, engine or luck.

So any machine can do any task, a restarted run finds its finished shards under the same names, and the bytes are the
same whoever wrote them."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from illada_megatron.data.preprocessing.chat_template import ChatTemplate
from illada_megatron.data.preprocessing.inputs import InputFile

# of their decompressed size, roughly: so many small compressed files share a task
_USUAL_COMPRESSION = 4
# part of the fingerprint: raise it with any change to the bytes that a job gives (chunks.CHUNK_BYTES, the shuffle,
# tokenizers.long_texts)
_VERSION = 3
# what has no influence on the bytes of a shard that could be finished at all
_WITHOUT_INFLUENCE = {"prefix", "engine", "skip_bad_lines", "tokenizer_path", "fingerprint"}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reading(_Frozen):
    """What readers of documents have to know."""

    text_key: str
    chat: ChatTemplate | None = None
    skip_bad_lines: bool | None
    """None: the caller offers no such choice, so that it is not recommended."""
    max_document_bytes: int


class Job(Reading):
    """What all tasks of a corpus have in common."""

    prefix: str
    """Absolute; shards are PREFIX.bin/.idx or PREFIX_00012.bin/.idx."""
    tokenizer_path: str
    tokenizer_sha256: str
    vocab_size: int
    engine: str = "auto"
    """Of the tokenizer: the one asked for, then the one chosen."""
    append_eod: bool
    prepend_bos: bool = False
    shard_bytes: int
    shuffle_seed: int | None = None
    shuffle_buffer_bytes: int
    fingerprint: str = ""
    """SHA-256 over everything that decides the shards' bytes; see `fingerprinted`."""

    def options(self) -> dict[str, object]:
        """What decides the bytes of the shards, by name, for a message about what differs."""
        return self.model_dump(mode="json", exclude=_WITHOUT_INFLUENCE)


class Piece(_Frozen):
    """Part of a file. `start` and `end`: bytes (the lines that begin there) or, for Parquet, row groups; end None:
    to the end of the file."""

    file: InputFile
    start: int = 0
    end: int | None = None
    size_bytes: int
    """Of the file as stored, about; for progress and balance."""


class ShardTask(_Frozen):
    """What one worker does at a time. It gives one shard, or, where its size is not known before it is decompressed,
    as many as there are `shard_bytes` in it."""

    index: int
    name: str
    """Behind the job's prefix: "_00012", or "" where the job has no other task."""
    pieces: tuple[Piece, ...]
    streamed: bool

    @property
    def size_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.pieces)

    def part_name(self, part: int) -> str:
        """Of shard `part` of this task, behind the job's prefix."""
        return f"{self.name}_{part:03d}" if self.streamed else self.name


def plan_tasks(files: Sequence[InputFile], shard_bytes: int) -> list[ShardTask]:
    """Tasks in the order of the input. A large file is cut into equal ranges of at most `shard_bytes`; small ones
    that follow one another share a task up to that size."""
    groups = list(_groups([piece for file in files for piece in _cut(file, shard_bytes)], shard_bytes))
    digits = max(5, len(str(len(groups) - 1)))
    alone = len(groups) == 1 and not _is_streamed(groups[0][0])
    return [
        ShardTask(
            index=index,
            name="" if alone else f"_{index:0{digits}d}",
            pieces=tuple(pieces),
            streamed=_is_streamed(pieces[0]),
        )
        for index, pieces in enumerate(groups)
    ]


def _is_streamed(piece: Piece) -> bool:
    return piece.file.compression != "none"


def _cut(file: InputFile, shard_bytes: int) -> Iterator[Piece]:
    ranges = -(-file.size_bytes // shard_bytes)
    if file.compression != "none" or ranges <= 1:
        yield Piece(file=file, size_bytes=file.size_bytes)
        return
    total = file.size_bytes
    if file.format == "parquet":
        from illada_megatron.data.preprocessing.parquet import count_row_groups

        total = count_row_groups(Path(file.path))
        ranges = min(ranges, total)
    for i in range(ranges):
        start, end = total * i // ranges, total * (i + 1) // ranges
        yield Piece(file=file, start=start, end=end, size_bytes=file.size_bytes * (end - start) // total)


def _groups(pieces: Sequence[Piece], shard_bytes: int) -> Iterator[list[Piece]]:
    """Pieces that follow one another, together no larger than a shard, all compressed or none."""
    group: list[Piece] = []
    group_bytes = 0
    for piece in pieces:
        size = piece.size_bytes * (_USUAL_COMPRESSION if _is_streamed(piece) else 1)
        if group and (group_bytes + size > shard_bytes or _is_streamed(group[0]) != _is_streamed(piece)):
            yield group
            group, group_bytes = [], 0
        group.append(piece)
        group_bytes += size
    if group:
        yield group


def fingerprinted(job: Job, files: Sequence[InputFile]) -> Job:
    """`job` with its fingerprint: options, tokenizer, and the path, size and time of change of every input."""
    # a job that was begun before there was this choice goes on
    left_out = _WITHOUT_INFLUENCE if job.prepend_bos else _WITHOUT_INFLUENCE | {"prepend_bos"}
    digest = hashlib.sha256(f"{_VERSION} {job.model_dump_json(exclude=left_out)}".encode())
    for file in files:
        digest.update(file.model_dump_json().encode())
    return job.model_copy(update={"fingerprint": digest.hexdigest()})
