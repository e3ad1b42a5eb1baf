"""Which files a preprocessing job reads, and what they hold."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
# what preprocessing writes beside its shards: read as JSON Lines, the next job would be made of the last one
_WRITTEN_HERE = (".manifest.json", ".job.json", ".done.json", ".lock", ".lock.json", ".tmp")

# of what is left out of a directory for a reason that nobody expects
_NAMED = 3


class InputFile(BaseModel):
    """A file to read; `modified_ns` tells a file from another of the same name and size."""

    model_config = ConfigDict(frozen=True)
    path: str
    """Absolute."""
    format: Format
    compression: Compression
    size_bytes: int
    modified_ns: int


@dataclass
class Inputs:
    """What was found, in order, and what directories and globs held besides."""

    files: list[InputFile]
    left_out: Counter[str] = field(default_factory=Counter)
    """How a name ends (or "hidden") -> number of files that are not read."""


def find_inputs(paths: Sequence[str | Path], input_format: Format | Literal["auto"] = "auto") -> Inputs:
    """The files of `paths` in the order given: a file, a glob (what it matches, by name) or a directory (its files of
    a known suffix, however deep, by name; through links that stay within it, for an archive of others may hold links to
    anywhere). Shards, and what lies beside them, are no input: directories and globs leave them out. Of several links
    to one file, a directory or glob reads one.

    input_format: what the files hold whatever they are called; "auto" goes by the suffix, in capitals too. Compression
    always does. Raises DataError for a path that is not there or matches nothing, for an unknown suffix, and for a file
    that two of `paths` reach, unless both name it."""
    if not paths:
        raise DataError("no input was given, expected at least one file, glob or directory")
    inputs = Inputs([])
    reached_by: dict[str, Path] = {}
    for path in map(Path, paths):
        for found in _expand(path, input_format, inputs.left_out):
            place = os.path.realpath(found)
            other = reached_by.get(place)
            if other is path:
                inputs.left_out["links to files that are read already"] += 1
                continue
            if other is not None and not (other.is_file() and path.is_file()):
                raise DataError(
                    f"{found}: is reached by {other} and by {path}, expected once: two of the given paths overlap; "
                    "give each file by one of them"
                )
            reached_by[place] = path
            inputs.files.append(_described(found, input_format))
    return inputs


def require_unchanged(file: InputFile) -> None:
    """Raise DataError unless `file` is still what it was when the job was planned. Asked before and after it is read:
    what was read in between is then of that file."""
    try:
        status = Path(file.path).stat()
    except FileNotFoundError as error:
        raise DataError(f"{file.path}: is gone, though the job was planned with it: bring it back") from error
    found = (status.st_size, status.st_mtime_ns)
    if found != (file.size_bytes, file.modified_ns):
        raise DataError(
            f"{file.path}: has changed since the job was planned: {found[0]} bytes, modified at {found[1]} ns, "
            f"expected {file.size_bytes} and {file.modified_ns}: wait until the file is complete and run again"
        )


def _expand(path: Path, input_format: str, left_out: Counter[str]) -> list[Path]:
    if path.is_file():
        return [path]
    if path.is_dir():
        known = [file for file in _walk(path, left_out) if _is_input(file, input_format, left_out)]
        if not known:
            raise DataError(f"{path}: no file to read in this directory, expected {KNOWN_SUFFIXES}{_told(left_out)}")
        return known
    if _GLOB_CHARACTERS & set(str(path)):
        matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207 (absolute too)
        files = [match for match in _regular(matches, left_out) if not _is_of_a_shard(match, left_out)]
        if files:
            return files
        raise DataError(f"{path}: no file matches this glob (current directory: {Path.cwd()}){_told(left_out)}")
    raise DataError(f"{path}: no such file, expected {KNOWN_SUFFIXES}, a glob of such files or a directory")


def _walk(directory: Path, left_out: Counter[str]) -> list[Path]:
    """All files, by name. Links are followed where they do not lead out; a folder that is reached twice is read
    once."""
    root = Path(os.path.realpath(directory))
    files: list[Path] = []
    outside: list[Path] = []
    closed: list[Path] = []
    seen: set[str] = set()

    def is_inside(path: Path) -> bool:
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
            outside.append(path)
            return False
        return True

    def pass_over(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error
        closed.append(Path(error.filename))

    for folder, folders, names in os.walk(directory, followlinks=True, onerror=pass_over):
        if (place := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(place)
        if not os.access(folder, os.X_OK):
            closed.append(Path(folder))
            folders.clear()
            continue
        left_out["hidden"] += sum(name.startswith(".") for name in (*folders, *names))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and is_inside(Path(folder, name)))
        files += [path for name in names if not name.startswith(".") and is_inside(path := Path(folder, name))]
    for paths, what in ((outside, "links that lead out of the directory"), (closed, "folders without permission")):
        if paths:
            left_out[f"{what} ({', '.join(map(str, paths[:_NAMED]))}{', ...' * (len(paths) > _NAMED)})"] += len(paths)
    return _regular(sorted(files), left_out)


def _regular(paths: Sequence[Path], left_out: Counter[str]) -> list[Path]:
    files = [path for path in paths if path.is_file()]
    left_out["folders"] += (folders := sum(map(Path.is_dir, paths)))
    left_out["no regular files (broken links, pipes)"] += len(paths) - len(files) - folders
    return files


def _is_input(file: Path, input_format: str, left_out: Counter[str]) -> bool:
    if _is_of_a_shard(file, left_out):
        return False
    if input_format == "auto" and _format(file) is None:
        left_out[file.suffix or "no suffix"] += 1
        return False
    return True


def _is_of_a_shard(file: Path, left_out: Counter[str]) -> bool:
    """Written by this package, by its name: a shard's two files, or what lies beside them."""
    end = next(filter(file.name.endswith, _WRITTEN_HERE), None)
    if (
        end is None
        and file.suffix in (".bin", ".idx")
        and all(map(Path.is_file, map(file.with_suffix, (".bin", ".idx"))))
    ):
        end = file.suffix
    if end is not None:
        left_out[end] += 1
    return end is not None


def _told(left_out: Counter[str]) -> str:
    return f"; left out: {described(left_out)}" if +left_out else ""


def described(left_out: Counter[str]) -> str:
    """As "2 .md, 1 hidden"."""
    return ", ".join(f"{count} {name}" for name, count in sorted((+left_out).items()))


def _format(path: Path) -> Format | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
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
    compression = _COMPRESSIONS.get(path.suffix.lower(), "none")
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
