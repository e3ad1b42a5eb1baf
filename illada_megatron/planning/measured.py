"""What a run has measured of itself, from its log."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median


class PlanError(ValueError):
    """The inputs of a plan do not do; the message names them."""


@dataclass(frozen=True)
class Measured:
    """Medians over a log, in seconds; None: the log has no such figure."""

    save_stall_seconds: float | None
    save_seconds: float | None
    restart_seconds: float | None
    step_seconds: float | None


# Of a line of logging.jsonl_path; the first step after a start has start_seconds.
_KEYS = {
    "save_stall_seconds": "save_stall_seconds",
    "save_seconds": "save_seconds",
    "restart_seconds": "start_seconds",
    "step_seconds": "seconds",
}


def measured_in(log: Path) -> Measured:
    """Read a run's logging.jsonl_path. A last line that was cut short is left out. Raises PlanError."""
    found: dict[str, list[float]] = {name: [] for name in _KEYS}
    try:
        lines = log.read_text().splitlines(keepends=True)
    except OSError as error:
        raise PlanError(f"{log}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            continue
        try:
            record = json.loads(line)
            for name, key in _KEYS.items():
                if record.get(key) is not None:
                    found[name].append(float(record[key]))
        except (ValueError, TypeError, AttributeError) as error:
            raise PlanError(f"{log}:{number}: not a line of logging.jsonl_path: {error}") from error
    if not lines:
        raise PlanError(f"{log}: empty, expected the lines of a run's logging.jsonl_path")
    return Measured(**{name: median(values) if values else None for name, values in found.items()})
