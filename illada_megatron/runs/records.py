"""A run's folder, or its step log alone, read."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from illada_megatron.config.places import PLACES

STEP_LOG = PLACES["logging", "jsonl_path"]
START_FILES = "start_*.yaml"
_START = re.compile(r"start_(\d+)\.yaml")


class RunError(ValueError):
    """No run that could be read; the message names the path."""


@dataclass(frozen=True)
class Curve:
    """A figure over the steps of a run, ascending."""

    steps: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """Consumed until then."""
    values: list[float] = field(default_factory=list)

    def add(self, step: int, tokens: int, value: Any) -> None:
        if isinstance(value, int | float) and math.isfinite(value):
            self.steps.append(step)
            self.tokens.append(tokens)
            self.values.append(float(value))


@dataclass(frozen=True)
class RunRecord:
    """A run as its files tell."""

    name: str
    configuration: dict[str, Any] | None
    """Of its last start; None: nothing says it."""
    last_step: int
    consumed_tokens: int
    starts: int
    """As far as the log tells them."""
    loss: Curve
    """nats/token, a step."""
    held_out: Curve
    """nats/token, the bound."""
    throughput: Curve
    """tokens/s."""


def read_run(place: str | Path) -> RunRecord:
    """Read a run's folder (run_dir) or its step log (logging.jsonl_path). Raises RunError."""
    path = Path(place)
    configuration = _configuration(path if path.is_dir() else path.parent)
    log = path
    if path.is_dir():
        log = path / STEP_LOG
        if not log.exists() and configuration is not None:
            log = _log_of(configuration, path) or log
        if not log.exists():
            raise RunError(f"{path}: has no {STEP_LOG}: give the folder of a run (run_dir), or its logging.jsonl_path")
    loss, held_out, throughput = Curve(), Curve(), Curve()
    step = tokens = starts = 0
    for number, record in _lines(log):
        try:
            before = tokens
            starts += "start_seconds" in record
            if "loss" in record:  # else it stands for a save that failed at the end
                step, tokens = record["step"], record["consumed_tokens"]
                loss.add(step, tokens, record["loss"])
                throughput.add(step, tokens, record["tokens_per_second"])
            for one in record.get("held_out", ()):  # of the step before, or of the run's last
                if not one["ema"]:
                    bound = one["mean"]["nats_per_token"]["value"]
                    held_out.add(one["step"], tokens if one["step"] == step else before, bound)
        except (TypeError, KeyError, AttributeError) as error:
            raise RunError(f"{log}:{number}: not a line of logging.jsonl_path: {error!r:.200}") from error
    if not step:
        raise RunError(f"{log}: has no steps yet")
    return RunRecord(str(place).rstrip("/"), configuration, step, tokens, starts, loss, held_out, throughput)


def newest_start(folder: Path) -> Path | None:
    """The configuration of a run's last start; None: there is none."""
    return max((path for path in folder.glob(START_FILES) if start_number(path)), key=start_number, default=None)


def start_number(path: Path) -> int:
    """Of a start's configuration, from 1; 0: it is another file, as a copy that somebody has made."""
    found = _START.fullmatch(path.name)
    return int(found[1]) if found else 0


def _configuration(folder: Path) -> dict[str, Any] | None:
    path = newest_start(folder)
    if path is None:
        return None
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: expected sections with fields, found {type(values).__name__}")
    return values


def _log_of(configuration: dict[str, Any], folder: Path) -> Path | None:
    logging = configuration.get("logging")
    text = logging.get("jsonl_path") if isinstance(logging, dict) else None
    return Path(text.replace("${run_dir}", str(folder))) if isinstance(text, str) else None


def _lines(log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """With their numbers; a last line that was cut short is left out."""
    try:
        with log.open() as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    yield number, json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{log}: cannot be read: {error}") from error
