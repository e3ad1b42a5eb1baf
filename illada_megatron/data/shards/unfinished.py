"""Shards of a job that has not ended: a glob or a folder would make a smaller corpus of them without a word."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from illada_megatron.data.errors import DataError

_NUMBERS = (re.compile(r"_\d{5,}$"), re.compile(r"_\d{5,}_\d{3,}$"))


def require_finished(prefixes: Iterable[str], given: str) -> None:
    """Raise DataError where one of `prefixes`, which `given` matched, is a shard of a job of `illada preprocess` that
    is at work or was stopped: its PREFIX.job.json says so."""
    corpora = {prefix[: found.start()] for prefix in prefixes for one in _NUMBERS if (found := one.search(prefix))}
    for corpus in sorted(corpora):
        path = Path(f"{corpus}.job.json")
        if path.exists() and not _has_finished(path):
            raise DataError(
                f"{given}: matches shards of {corpus}, whose job has not finished ({path}): there are more to come. "
                "Run `illada preprocess` to its end and give the manifest, or name the shards one by one"
            )


def _has_finished(job: Path) -> bool:
    try:
        record = json.loads(job.read_bytes())
    except (ValueError, RecursionError):
        return True  # of another program
    return not (isinstance(record, dict) and "fingerprint" in record and record.get("finished") is None)
