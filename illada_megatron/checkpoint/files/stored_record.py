"""What a checkpoint.json has to look like, whoever wrote it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt

from illada_megatron.checkpoint.files.names import is_file_name


def _inside(name: str) -> str:
    if not all(map(is_file_name, name.split("/"))):
        raise ValueError("expected the name of a file within the checkpoint")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _File(_Strict):
    bytes: NonNegativeInt
    xxh3_128: str


class _Record(_Strict):
    step: NonNegativeInt
    config: dict[str, Any]
    progress: dict[str, Any] | None
    fingerprints: dict[str, Any]
    versions: dict[str, str]
    files: dict[Annotated[str, AfterValidator(_inside)], _File]


def check_record(record: Mapping[str, Any]) -> None:
    """Raises ValueError where a field of a record, without its version and checksum, is of another type, or a file is
    not within the checkpoint: its existence, size and checksum would be told to whoever sees the message."""
    _Record.model_validate(dict(record))
