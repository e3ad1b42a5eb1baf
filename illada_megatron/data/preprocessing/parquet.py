"""Rows of Parquet files. pyarrow is optional: `pip install illada-megatron[parquet]`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing.chunks import CHUNK_BYTES

_MOST_ROWS = 16384


@dataclass
class Rows:
    """Rows of one column that follow one another."""

    values: list[Any]
    source_bytes: int
    first: int
    """Number of the first row: exact for each unless one before it in its batch was too long."""
    too_long: int
    count: int
    total: int
    """Rows of all the row groups that are read."""


def count_row_groups(path: Path) -> int:
    """Raises DataError where the file is not Parquet."""
    with _open(path) as file:
        return max(1, file.num_row_groups)


def read_rows(path: Path, start: int, end: int | None, column: str, limit_bytes: int) -> Iterator[Rows]:
    """`column` of row groups [start, end), about `CHUNK_BYTES` at a time; values longer than `limit_bytes` are counted
    and left out before they become Python objects.

    Raises DataError for a damaged file and a missing column."""
    pyarrow = _library(path)
    with _open(path) as file:
        groups = range(start, file.num_row_groups if end is None else end)
        if column not in file.schema_arrow.names:
            names = ", ".join(map(repr, file.schema_arrow.names[:10]))
            raise DataError(f"{path}: the column {column!r} is missing, found {names}: correct --json-keys")
        metadata = [file.metadata.row_group(group) for group in groups]
        total = sum(group.num_rows for group in metadata)
        row_bytes = sum(group.total_byte_size for group in metadata) // max(1, total)
        batch_rows = min(_MOST_ROWS, max(1, CHUNK_BYTES // max(1, row_bytes)))
        first = sum(file.metadata.row_group(group).num_rows for group in range(start))
        try:
            for batch in file.iter_batches(batch_rows, row_groups=list(groups), columns=[column], use_threads=False):
                yield _rows(path, batch.column(0), first, limit_bytes, total)
                first += batch.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error


def _rows(path: Path, column: Any, first: int, limit_bytes: int, total: int) -> Rows:
    source_bytes = column.nbytes
    count = len(column)
    column = _without_views(_library(path), column)
    is_short = _is_short(_library(path), column, limit_bytes) if source_bytes > limit_bytes or _shares(column) else None
    if is_short is not None:
        column = column.filter(is_short)
    return Rows(_values(column), source_bytes, first, count - len(column), count, total)


def _without_views(pyarrow: Any, column: Any) -> Any:
    """Views as plain columns: pyarrow has neither their lengths nor a filter for them."""
    if pyarrow.types.is_string_view(column.type):
        return column.cast("large_binary").view("large_string")  # a cast to text would refuse what is not UTF-8
    return column.cast("large_binary") if pyarrow.types.is_binary_view(column.type) else column


def _shares(column: Any) -> bool:
    """Rows of the same value hold it once: what a row stands for may be larger than the column."""
    return hasattr(column, "dictionary")


def _is_short(pyarrow: Any, column: Any, limit_bytes: int) -> Any:
    """Which rows are no longer than the limit, a null being short; None for a column that holds no text."""
    if _shares(column):
        is_short = _is_short(pyarrow, column.dictionary, limit_bytes)
        return None if is_short is None else is_short.take(column.indices).fill_null(True)
    if not any(is_type(column.type) for is_type in _text_types(pyarrow.types)):
        return None
    return pyarrow.compute.less_equal(pyarrow.compute.binary_length(column), limit_bytes).fill_null(True)


def _text_types(types: Any) -> tuple[Callable[[Any], bool], ...]:
    return types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary


def _values(column: Any) -> list[Any]:
    if _shares(column):
        values = _values(column.dictionary)
        return [None if index is None else values[index] for index in column.indices.to_pylist()]
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        # what is not UTF-8 stays bytes, for a message about its row
        return [_text_if_valid(value) for value in column.cast("large_binary").to_pylist()]


def _text_if_valid(value: bytes | None) -> Any:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def _open(path: Path) -> Any:
    pyarrow = _library(path)
    try:
        return pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK_BYTES, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _library(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet is read with pyarrow, which is not installed: pip install 'illada-megatron[parquet]'"
        ) from error
    return pyarrow


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: expected a whole Parquet file, pyarrow says: {error}; copy or write it again")
