"""Input records -> texts for the tokenizer, in batches; what is dropped is counted by reason."""

import functools
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import chunks
from illada_megatron.data.preprocessing.bad_places import MOST_BAD_PLACES, BadPlace, told
from illada_megatron.data.preprocessing.chat_template import BadConversation
from illada_megatron.data.preprocessing.inputs import InputFile, require_unchanged
from illada_megatron.data.preprocessing.plan import Piece, Reading
from illada_megatron.system.process import return_free_memory

if TYPE_CHECKING:
    from illada_megatron.data.preprocessing.chat import ChatRenderer

TOO_LONG = "too long"
EMPTY = "empty"
_SHOWN_CHARACTERS = 60
_MOST_TEXT_BYTES = 64_000_000
_LARGE_BYTES = 16 << 20
_PART_CHARACTERS = 1 << 20


@dataclass
class Batch:
    """Documents that go to the tokenizer together: about `chunks.CHUNK_BYTES` of them, or one that is larger."""

    texts: list[str]
    text_bytes: int = 0
    """UTF-8 bytes of the texts."""
    read_bytes: int = 0
    """Of the input as stored, since the batch before."""
    source_bytes: int = 0
    """Of the decompressed input; where parts of a compressed file end is counted in these."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of documents."""
    bad: Counter[str] = field(default_factory=Counter)
    """Reason -> number of lines that could not be used; other than zero only with skip_bad_lines."""
    bad_places: list[BadPlace] = field(default_factory=list)
    """Where the first of those are."""

    def joined(self, after: "Batch") -> "Batch":
        return Batch(
            self.texts + after.texts,
            self.text_bytes + after.text_bytes,
            self.read_bytes + after.read_bytes,
            self.source_bytes + after.source_bytes,
            self.dropped + after.dropped,
            self.bad + after.bad,
            (self.bad_places + after.bad_places)[:MOST_BAD_PLACES],
        )


class BadRecordError(Exception):
    """A line or row that cannot be used: `reason` to count it by, and the message."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


Place = Callable[[int], BadPlace]
"""Number of a record in its batch -> where it stands."""


@dataclass
class _Records:
    """As read. Values are bytes to parse, or already parsed (Parquet)."""

    values: list[Any]
    source_bytes: int
    place: Place
    too_long: int = 0


def read_batches(job: Reading, piece: Piece, renderer: "ChatRenderer | None") -> Generator[Batch, None, None]:
    """The documents of `piece`, in order. A batch may hold no text, only counts.

    Raises DataError for a damaged file, and (file:line) for a bad line unless job.skip_bad_lines."""
    to_texts = _Texts(job, piece.file.format, renderer)
    read_bytes = 0

    def progress(count: int) -> None:
        nonlocal read_bytes
        read_bytes += count

    require_unchanged(piece.file)
    with closing(_read_records(job, piece, progress)) as records:
        for record in records:
            batch = to_texts(record)
            record.values.clear()  # the generators below still hold the list: a large line would stay
            batch.read_bytes, read_bytes = read_bytes, 0
            yield batch
    require_unchanged(piece.file)
    if read_bytes:
        yield Batch([], read_bytes=read_bytes)


def read_texts(files: Sequence[InputFile], text_key: str) -> Iterator[str]:
    """The documents of `files`; the first bad line raises DataError."""
    reading = Reading(text_key=text_key, skip_bad_lines=None, max_document_bytes=_MOST_TEXT_BYTES)
    for file in files:
        for batch in read_batches(reading, Piece(file=file, size_bytes=file.size_bytes), None):
            yield from batch.texts


def _read_records(job: Reading, piece: Piece, progress: chunks.Progress) -> Generator[_Records, None, None]:
    path = Path(piece.file.path)
    if piece.file.format == "parquet":
        from illada_megatron.data.preprocessing import parquet

        for rows in parquet.read_rows(path, piece.start, piece.end, job.text_key, job.max_document_bytes):
            progress(piece.size_bytes * rows.count // max(1, rows.total))
            place = functools.partial(_row_place, piece, rows.first)
            yield _Records(rows.values, rows.source_bytes, place, rows.too_long)
        return
    if piece.file.compression == "gzip":
        stream = chunks.gzip_chunks(path, progress)
    elif piece.file.compression == "zstd":
        stream = chunks.zstd_chunks(path, progress)
    else:
        end = piece.file.size_bytes if piece.end is None else piece.end
        stream = chunks.line_range(path, piece.start, end, progress)
    if piece.start == 0:
        stream = chunks.without_byte_order_mark(stream)
    read = _text_records if piece.file.format == "text" else _line_records
    yield from read(stream, piece, job.max_document_bytes)


def _line_records(stream: Iterator[bytes], piece: Piece, limit_bytes: int) -> Iterator[_Records]:
    before = 0
    for lines, too_long in chunks.split_lines(stream, limit_bytes):
        place = functools.partial(_line_place, piece, before)
        yield _Records(lines, sum(map(len, lines)) + len(lines), place, too_long)
        before += len(lines)


def _line_place(piece: Piece, before: int, line: int) -> BadPlace:
    """Of line before + `line`, from 0, of those that begin in `piece`."""
    return BadPlace(path=piece.file.path, behind_byte=piece.start, number=before + line + 1)


def _row_place(piece: Piece, first: int, row: int) -> BadPlace:
    return BadPlace(path=piece.file.path, row=first + row)


def _text_records(stream: Iterator[bytes], piece: Piece, limit_bytes: int) -> Iterator[_Records]:
    for document in chunks.split_text(stream, limit_bytes):
        values = [] if document is None else [document]
        yield _Records(values, len(document or b""), lambda _: BadPlace(path=piece.file.path), int(document is None))


class _Texts:
    """Records of one format -> Batch: all at once where all are good, one by one to name the bad ones."""

    def __init__(self, job: Reading, file_format: str, renderer: "ChatRenderer | None") -> None:
        self._key = job.text_key
        self._skip = job.skip_bad_lines
        self._format = file_format
        self._renderer = renderer

    def __call__(self, records: _Records) -> Batch:
        batch = Batch([], source_bytes=records.source_bytes)
        if records.source_bytes > _LARGE_BYTES:
            return_free_memory()  # a text may take four times its line, beside it
        texts = self._all(records.values) if self._renderer is None else None
        batch.texts = self._each(records, batch) if texts is None else texts
        batch.text_bytes = _utf8_bytes(batch.texts)
        if records.too_long:
            batch.dropped[TOO_LONG] += records.too_long
        return batch

    def _all(self, values: list[Any]) -> list[str] | None:
        """The texts, or None where one of the values is not as it should be."""
        key, loads = self._key, orjson.loads
        try:
            if self._format == "jsonl":
                texts = [loads(line)[key] for line in values if line]
            elif self._format == "text":
                texts = [value.decode() for value in values]
            else:
                texts = list(values)
        except (ValueError, LookupError, TypeError):
            return None
        return texts if set(map(type, texts)) <= {str} and all(texts) else None

    def _each(self, records: _Records, batch: Batch) -> list[str]:
        texts = []
        for i, value in enumerate(records.values):
            if self._format == "jsonl" and not bytes(value).strip():
                continue
            try:
                text = self._text(bytes(value) if self._format == "jsonl" else value)
            except BadRecordError as error:
                if not self._skip:
                    choice = "" if self._skip is None else ", or skip and count such documents: --skip-bad-lines"
                    raise DataError(f"{told([records.place(i)])[0]}: {error}. Correct it{choice}") from error
                batch.bad[error.reason] += 1
                if len(batch.bad_places) < MOST_BAD_PLACES:
                    batch.bad_places.append(records.place(i))
                continue
            except BadConversation as error:
                batch.dropped[str(error)] += 1
                continue
            if text:
                texts.append(text)
            else:
                batch.dropped[EMPTY] += 1
        return texts

    def _text(self, value: Any) -> str:
        if self._format != "jsonl" and isinstance(value, bytes):
            return _decoded(value)
        content = self._content(value) if self._format == "jsonl" else value
        if self._renderer is not None:
            try:
                return self._renderer.render(content)
            except ValueError as error:
                raise BadRecordError("not a conversation", f"the key {self._key!r} {error}") from error
        if not isinstance(content, str):
            raise BadRecordError("not a string", f"the key {self._key!r} holds {_named(content)}, expected a string")
        return content

    def _content(self, line: bytes) -> Any:
        try:
            value = orjson.loads(line)
        except ValueError as error:
            shown = repr(line[:_SHOWN_CHARACTERS].decode("utf-8", errors="replace"))
            raise BadRecordError("not JSON", f"not valid JSON ({error}); the line begins {shown}") from error
        if not isinstance(value, dict):
            raise BadRecordError(
                "not an object", f"found {_named(value)}, expected an object with the key {self._key!r}"
            )
        if self._key not in value:
            keys = ", ".join(map(repr, list(value)[:10])) or "no keys"
            raise BadRecordError("key missing", f"the key {self._key!r} is missing, found {keys}")
        return value[self._key]


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise BadRecordError("not UTF-8", f"the text is not valid UTF-8 ({error.reason} at {error.start})") from error


def _utf8_bytes(texts: list[str]) -> int:
    if all(map(str.isascii, texts)):
        return sum(map(len, texts))
    return sum(len(text) if text.isascii() else sum(len(part.encode()) for part in _parts(text)) for text in texts)


def _parts(text: str) -> Iterator[str]:
    """Of a bounded size."""
    return (text[start : start + _PART_CHARACTERS] for start in range(0, len(text), _PART_CHARACTERS))


def _named(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
