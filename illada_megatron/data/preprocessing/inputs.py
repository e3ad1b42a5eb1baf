"""Which files a preprocessing job reads, and what they hold."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from illada_megatron.data.errors import DataError

Format = Literal["jsonl", "text", "parquet"]
Compression = Literal["none", "gzip", "zstd"]

_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".parquet": "parquet",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
KNOWN_SUFFIXES = ".jsonl, .ndjson, .json or .txt, each also with .gz or .zst behind it, or .parquet"
_GLOB_CHARACTERS = frozenset("*?[")


class InputFile(BaseModel):
    """A file to read; `modified_ns` tells a file from another of the same name and size."""

    model_config = ConfigDict(frozen=True)
    path: str
    """Absolute."""
    format: Format
    compression: Compression
    size_bytes: int
    modified_ns: int


def find_inputs(paths: Sequence[str | Path], input_format: Format | Literal["auto"] = "auto") -> list[InputFile]:
    """The files of `paths` in the order given: a file, a glob (what it matches, by name) or a directory (its files of
    a known suffix, however deep, by name).

    input_format: what the files hold whatever they are called; "auto" goes by the suffix. Compression always does.
    Raises DataError for a path that is not there or matches nothing, and for an unknown suffix."""
    if not paths:
        raise DataError("no input was given, expected at least one file, glob or directory")
    return [_described(found, input_format) for path in paths for found in _expand(Path(path), input_format)]


def _expand(path: Path, input_format: str) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file() and not found.name.startswith("."))
        known = [file for file in files if input_format != "auto" or _format(file) is not None]
        if not known:
            raise DataError(f"{path}: no file to read in this directory, expected {KNOWN_SUFFIXES}")
        return known
    if _GLOB_CHARACTERS & set(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute too)
        files = [match for match in matches if match.is_file()]
        if files:
            return files
        raise DataError(f"{path}: no file matches this glob (current directory: {Path.cwd()})")
    raise DataError(f"{path}: no such file, expected {KNOWN_SUFFIXES}, a glob of such files or a directory")


def _format(path: Path) -> Format | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes = suffixes[:-1]
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _described(path: Path, input_format: Format | Literal["auto"]) -> InputFile:
    found = _format(path) if input_format == "auto" else input_format
    if found is None:
        raise DataError(
            f"{path}: the name ends in {path.suffix!r}, expected {KNOWN_SUFFIXES}; rename it or say what it holds: "
            "--input-format jsonl, text or parquet"
        )
    compression = _COMPRESSIONS.get(path.suffix, "none")
    if found == "parquet" and compression != "none":
        raise DataError(f"{path}: a Parquet file compresses its own columns: decompress this one first")
    status = path.stat()
    return InputFile(
        path=str(path.absolute()),
        format=found,
        compression=compression,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
    )
