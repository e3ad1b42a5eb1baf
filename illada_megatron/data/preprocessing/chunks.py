"""Bytes of input files in pieces of bounded size, whatever the size of the file and of its lines."""

import codecs
import gzip
import itertools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from illada_megatron.data.errors import DataError

CHUNK_BYTES = 1 << 20
"""Also about the size of a batch for the tokenizer, which may take 50 times as much memory."""

# a few bytes of zstd can stand for 128 kB, so that this much can become 32 MB
_ZSTD_INPUT_BYTES = 1024

# from here on copying a line costs more than making a view of it
_LONG_LINE_BYTES = 1000
_LINES_LOOKED_AT = 16

Line = bytes | bytearray | memoryview

Progress = Callable[[int], None]
"""Told how many bytes of the file, as it is stored, were read since it was last called."""


def line_range(path: Path, start: int, end: int, progress: Progress) -> Iterator[bytes]:
    """The lines of `path` that begin in bytes [start, end): their bytes, in chunks cut anywhere.

    Ranges that follow one another give every line exactly once, wherever they meet. Raises DataError where the file
    ends before `end`."""
    with path.open("rb", buffering=0) as stream:
        position = start
        if start > 0:
            first = _skip_line(stream, start - 1, end)
            if first is None:
                return
            progress(first - start)
            position = first
        last = b"\n"
        while position < end:
            chunk = stream.read(min(CHUNK_BYTES, end - position))
            if not chunk:
                raise DataError(f"{path}: ends at byte {position}, expected {end} or more: it was truncated meanwhile")
            position += len(chunk)
            last = chunk[-1:]
            progress(len(chunk))
            yield chunk
        while last != b"\n" and (chunk := stream.read(CHUNK_BYTES)):
            tail = chunk[: chunk.find(b"\n") + 1] or chunk
            last = tail[-1:]
            yield tail


def _skip_line(stream: BinaryIO, position: int, end: int) -> int | None:
    """Place `stream` behind the first newline at or after `position` and return that offset; None if none of its
    lines begins before `end`."""
    stream.seek(position)
    while chunk := stream.read(CHUNK_BYTES):
        newline = chunk.find(b"\n")
        if newline >= 0:
            first = position + newline + 1
            stream.seek(first)
            return first if first < end else None
        position += len(chunk)
        if position >= end:
            return None
    return None


def gzip_chunks(path: Path, progress: Progress) -> Iterator[bytes]:
    """The decompressed bytes, always the same chunks. Raises DataError for a damaged or truncated file."""
    _check_not_empty(path, "gzip")
    with path.open("rb") as raw:
        told = 0
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    progress(raw.tell() - told)
                    told = raw.tell()
                    yield chunk
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(path, "gzip", error) from error
        progress(raw.tell() - told)
        _require_end(path, raw)


def zstd_chunks(path: Path, progress: Progress) -> Iterator[bytes]:
    """As `gzip_chunks`. One frame or many; frames that announce a window above 128 MB are refused by the library."""
    _check_not_empty(path, "zstd")
    pieces: list[bytes] = []
    size = 0
    for piece in _zstd_pieces(path, progress):
        pieces.append(piece)
        size += len(piece)
        if size >= CHUNK_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


def _zstd_pieces(path: Path, progress: Progress) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    with path.open("rb") as raw:
        try:
            while data := raw.read(_ZSTD_INPUT_BYTES):
                progress(len(data))
                while data:
                    frame = frame or decompressor.decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
        except zstandard.ZstdError as error:
            raise _damaged(path, "zstd", error) from error
        _require_end(path, raw)
    # the library itself takes the end of the file for the end of the data
    if frame is not None:
        raise _damaged(path, "zstd", "the file ends in the middle of a frame")


def _check_not_empty(path: Path, name: str) -> None:
    """The libraries take an empty file for empty data; a compressor writes a header even for that."""
    if path.stat().st_size == 0:
        raise _damaged(path, name, "an empty file")


def _require_end(path: Path, stream: BinaryIO) -> None:
    """Else what is missing would be a smaller corpus, without a word. Raises OSError."""
    if (size := os.fstat(stream.fileno()).st_size) != stream.tell():
        raise OSError(f"{path}: reading ended at byte {stream.tell()} of {size}: the disk has given less than it holds")


def _damaged(path: Path, name: str, found: object) -> DataError:
    return DataError(f"{path}: expected a whole {name} file, found: {found}; copy or compress it again")


def without_byte_order_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """A file's bytes without the mark (UTF-8's) that some programs put in front: it is not text, and not JSON."""
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= len(codecs.BOM_UTF8):
            break
    yield first.removeprefix(codecs.BOM_UTF8)
    yield from chunks


def split_lines(chunks: Iterator[bytes], limit_bytes: int) -> Iterator[tuple[list[Line], int]]:
    """Lines without their newlines, those that end in one chunk at a time, and how many of them were longer than
    `limit_bytes`: such a line is never held, and an empty one stands in its place."""
    pending = bytearray()  # grows where it lies: pieces to be joined would take a long line's memory twice
    pending_bytes = 0
    for chunk in chunks:
        lines, rest = _lines(chunk)
        too_long = 0
        if lines:
            if pending_bytes:
                pending += lines[0]
                too_long = int(pending_bytes + len(lines[0]) > limit_bytes)
                lines[0] = b"" if too_long else pending
            if max(map(len, lines)) > limit_bytes:
                too_long += sum(len(line) > limit_bytes for line in lines)
                lines = [line if len(line) <= limit_bytes else b"" for line in lines]
            pending, pending_bytes = bytearray(), 0
            yield lines, too_long
        pending_bytes += len(rest)
        if pending_bytes <= limit_bytes:
            pending += rest
        else:
            pending = bytearray()
    if pending_bytes:
        yield ([pending], 0) if pending_bytes <= limit_bytes else ([b""], 1)


def _lines(chunk: bytes) -> tuple[list[Line], bytes]:
    """The lines that end in `chunk`, and what is behind its last newline."""
    if not _has_long_lines(chunk):
        lines: list[Line] = [*chunk.split(b"\n")]
        return lines, bytes(lines.pop())
    view, start = memoryview(chunk), 0
    found: list[Line] = []
    while (end := chunk.find(b"\n", start)) >= 0:
        found.append(view[start:end])
        start = end + 1
    return found, chunk[start:]


def _has_long_lines(chunk: bytes) -> bool:
    """By its first ones."""
    place = 0
    for _ in range(_LINES_LOOKED_AT):
        place = chunk.find(b"\n", place) + 1
        if place == 0:
            return True
    return place >= _LINES_LOOKED_AT * _LONG_LINE_BYTES


def split_text(chunks: Iterator[bytes], limit_bytes: int) -> Iterator[bytes | None]:
    """A text as documents of at most `limit_bytes`, cut behind newlines only where it is longer than that; None for
    each line that is longer by itself, which is never held."""
    pending = bytearray()
    skipping = False
    for chunk in itertools.chain(chunks, (b"",)):
        if skipping:
            newline = chunk.find(b"\n")
            if newline < 0:
                continue
            chunk, skipping = chunk[newline + 1 :], False
        pending += chunk
        while len(pending) > limit_bytes:
            cut = pending.rfind(b"\n", 0, limit_bytes) + 1
            if cut:
                yield bytes(pending[:cut])
                del pending[:cut]
                continue
            yield None
            newline = pending.find(b"\n")
            skipping = newline < 0
            del pending[: len(pending) if skipping else newline + 1]
    if pending:
        yield bytes(pending)


def count_newlines(path: Path, end: int, start: int = 0) -> int:
    """In bytes [start, end), to give a line its number."""
    count, left = 0, end - start
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while left > 0 and (chunk := stream.read(min(CHUNK_BYTES, left))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count
