"""The manifest of a corpus: a JSON file that lists its shards, so that thousands of them are opened by reading one.

    {"format": "illada-corpus", "version": 1, "vocab_size": 32000, "tokenizer_sha256": "…",
     "shards": [{"path": "web_00000", "dtype": "uint16", "tokens": 250112034, "documents": 201455,
                 "bin_xxh3_128": "…", "idx_xxh3_128": "…"}, …]}

A shard's path is the prefix of its `.bin` and `.idx`, relative to the manifest's folder; absolute paths and `s3://`
URLs stay what they are. Checksums are what `inspect_dataset.py --verify` compares; opening a corpus reads no shard."""

import os
from pathlib import Path
from typing import Annotated, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from illada_megatron.data.errors import DataError
from illada_megatron.data.shards.durable import write_whole

Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_HASHED_AT_A_TIME = 8 << 20


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ShardEntry(_Entry):
    """One shard: `path`.bin holds `tokens` ids of type `dtype`, `path`.idx its documents."""

    path: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
    dtype: Literal["uint16", "int16", "int32", "int64"]
    tokens: PositiveInt
    documents: PositiveInt
    bin_xxh3_128: Checksum | None = None
    idx_xxh3_128: Checksum | None = None


class Manifest(_Entry):
    """The shards of a corpus in the order of its token stream."""

    format: Literal["illada-corpus"] = "illada-corpus"
    version: Literal[1] = 1
    vocab_size: PositiveInt
    """Of the tokenizer; every id is below it."""
    tokenizer_sha256: str | None = None
    """Fingerprint of the tokenizer's file."""
    shards: Annotated[tuple[ShardEntry, ...], Field(min_length=1, strict=False)]

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def read_manifest(path: str | Path) -> Manifest:
    """Raises DataError naming the file, the field, what was found and what was expected."""
    try:
        return parse_manifest(Path(path).read_bytes(), str(path))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such manifest: correct the path, or write it with `illada preprocess`") from error


def parse_manifest(text: bytes, name: str) -> Manifest:
    """The manifest in `text`; `name` is for messages. Raises DataError."""
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{name}: {field}: {first['msg']}, found {str(first['input'])[:60]!r}: "
            "expected a manifest of format illada-corpus, version 1, as `illada preprocess` writes it"
        ) from error


def write_manifest(manifest: Manifest, path: str | Path, replace: bool = True) -> None:
    """Whole or not at all, see `durable.write_whole`: readers see the old one or the new one. replace False: raises
    DataError where there is another."""
    write_whole(Path(path), manifest.model_dump_json(indent=1, exclude_none=True).encode() + b"\n", replace)


def file_checksum(path: str | Path) -> str:
    """XXH3-128 of a file, 32 hexadecimal digits: an error check at memory speed, not a signature."""
    state = xxhash.xxh3_128()
    with Path(path).open("rb", buffering=0) as stream:
        buffer = bytearray(_HASHED_AT_A_TIME)
        view = memoryview(buffer)
        while count := stream.readinto(buffer):
            state.update(view[:count])
        if (size := os.fstat(stream.fileno()).st_size) != stream.tell():
            raise OSError(
                f"{path}: reading ended at byte {stream.tell()} of {size}: the disk has given less than it holds"
            )
    return state.hexdigest()
