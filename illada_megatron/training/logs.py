"""The files and the terminal that a run tells its progress to. None of them ends a run: what goes wrong with one is
said once, in the terminal, and it is tried again; a run of a thousand GPUs is worth more than its log. Only a path that
can never be written is an error, where a run begins: there is nothing to lose yet, and somebody to correct it.

    StepLog    one JSON object a step, in a file that belongs to one run
    Board      TensorBoard
    Terminal   standard output
"""

import json
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from illada_megatron.system.console import Printable
from illada_megatron.training.run_places import is_own

Tell = Callable[[str], None]
_BOARD_RETRY_SECONDS = 60.0
# By what TensorBoard's HPARAMS compares runs, and which curves share a chart in its CUSTOM SCALARS.
_METRICS = ("validation/bound_nats_per_token", "loss/nats_per_token", "speed/tokens_per_second")
_CHARTS = {
    "loss": {
        "training and held-out, nats/token": ["Multiline", ["loss/nats_per_token", "validation/bound_nats_per_token"]],
        "masked cross-entropy, nats/masked token": [
            "Multiline",
            ["loss/masked_cross_entropy_nats", "validation/masked_cross_entropy_nats"],
        ],
        "masked cross-entropy at small, middle and large t": [
            "Multiline",
            [f"masked_cross_entropy_by_t_nats/{interval}" for interval in ("0.1-0.2", "0.5-0.6", "0.9-1.0")],
        ],
    },
    "speed": {
        "tokens/s": ["Multiline", ["speed/tokens_per_second"]],
        "seconds of a step, and of the slowest rank's compute": [
            "Multiline",
            ["speed/step_seconds", "stragglers/compute_seconds_max"],
        ],
    },
}
_WRONG_PATH = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
# No line of a log is longer; what a power loss has left may be, and is not read whole.
_MOST_LINE_BYTES = 1 << 26


class StepLog:
    """A JSONL log, one line a step, each step once: what an interrupted run wrote after the step it goes on from is
    cut off, for it comes again, and with it whatever follows the first line that is damaged.

    A log that is not this run's is not touched: it is renamed to the first free of PATH.1, PATH.2, …
    """

    def __init__(self, path: Path, first_step: int, save_dir: str | None, continues: bool, tell: Tell) -> None:
        """Go on after `first_step`.

        save_dir: by which the run knows its own log again (each start writes it with its first step); None: it never
        continues. continues: it goes on from a checkpoint of save_dir, and not from elsewhere or step 0; else a path
        that can never be written raises OSError.
        """
        self._path, self._first_step, self._tell = path, first_step, tell
        self._save_dir = save_dir if continues else None
        self._file: FileIO | None = None
        self._end: int | None = None
        """Where the next line goes; None: not a regular file, it goes where it goes."""
        self._last: tuple[int, dict[str, Any]] | None = None
        """Where the last line begins, and what it says."""
        self._missing: list[int] = []
        self._said = False
        try:
            self._open()
        except OSError as error:
            if not continues and isinstance(error, _WRONG_PATH):
                raise
            self._failed(error)

    def write(self, record: dict[str, Any]) -> None:
        """Add the line of a step, for whoever reads along."""
        line = _line(record)
        try:
            if self._file is None:
                self._open()
            begin = self._end
            self._write(line)
            self._last = None if begin is None else (begin, record)
        except OSError as error:
            self._failed(error, record["step"])
            return
        if self._missing:
            steps = f"{self._missing[0]}" if len(self._missing) == 1 else f"{self._missing[0]} to {self._missing[-1]}"
            self._tell(f"logging.jsonl_path {self._path}: written again; the steps {steps} are not in it")
            self._missing = []
        self._said = False

    def amend(self, more: dict[str, Any]) -> None:
        """Add to the last line what has become known since (to a list that it has, its items): a step stays one line.
        Nothing where that cannot be."""
        if self._file is None or self._last is None or self._missing:
            return
        begin, record = self._last
        longer = {**record, **{name: _added(record.get(name), value) for name, value in more.items()}}
        try:
            self._end = begin
            self._write(_line(longer))
            self._last = begin, longer
        except OSError as error:
            self._failed(error)
            self._write_back(begin, record)

    def _write_back(self, begin: int, record: dict[str, Any]) -> None:
        """A last line that had no room to grow: what it was had."""
        try:
            self._end = begin
            self._write(_line(record))
            self._cut(self._end)
        except OSError as error:
            self._failed(error, record["step"])

    def make_durable(self) -> None:
        """Return when all lines have reached the disk: a checkpoint that survives a power loss has its steps there."""
        try:
            if self._file is not None and self._end is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._failed(error)

    def go_back(self, step: int) -> None:
        """The run goes on after `step`: the steps behind it come again."""
        self._first_step, self._last = step, None
        try:
            if self._file is not None and self._end is not None:
                self._cut(_good_lines(self._path, step)[0])
        except OSError as error:
            self._failed(error)

    def close(self) -> None:
        if self._file is not None:
            try:
                if self._end is not None and self._missing:  # what a full disk has left of the last line
                    self._cut(self._end)
                self._file.close()
            except OSError as error:
                self._failed(error)
            self._file = None

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        end, found = 0, self._path.stat() if self._path.exists() else None
        if found is not None and stat.S_ISREG(found.st_mode) and found.st_size:
            end, written_by = _good_lines(self._path, self._first_step)
            others = written_by is not None and not is_own(self._path, written_by, self._save_dir or "")
            if end == 0 or self._save_dir is None or others:
                self._put_aside()
                end = 0
        # not for appending: a line that a full disk has cut short is written over
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._file = FileIO(descriptor, "r+")
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            self._cut(end)

    def _cut(self, end: int) -> None:
        assert self._file is not None
        self._file.truncate(end)
        self._end = end

    def _put_aside(self) -> None:
        number = 1
        while (place := self._path.with_name(f"{self._path.name}.{number}")).exists():
            number += 1
        self._path.rename(place)
        self._tell(
            f"warning: logging.jsonl_path {self._path} held the steps of another run, or of a start of this one that "
            f"left no checkpoint: they are in {place} now"
        )

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        if self._end is not None:
            self._file.seek(self._end)
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        if self._end is not None:
            self._end += len(line)

    def _failed(self, error: OSError, step: int | None = None) -> None:
        if not self._said:
            self._tell(f"warning: logging.jsonl_path {self._path}: {error}; the run goes on, each step tries again")
        self._said = True
        if step is not None:
            self._missing.append(step)


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, allow_nan=False) + "\n").encode()


def _added(there: Any, more: Any) -> Any:
    return [*there, *more] if isinstance(there, list) and isinstance(more, list) else more


def _good_lines(path: Path, last_step: int) -> tuple[int, str | None]:
    """The length in bytes of a log's lines up to `last_step` or to the first that is damaged, and the save_dir of the
    run that wrote the last of them; None: it does not say."""
    end, written_by = 0, None
    with path.open("rb") as file:
        while (line := file.readline(_MOST_LINE_BYTES)).endswith(b"\n"):
            try:
                record = orjson.loads(line)
                if not isinstance(record["step"], int) or record["step"] > last_step:
                    break
                written_by = record.get("save_dir", written_by)
            except (orjson.JSONDecodeError, KeyError, TypeError):
                break
            end += len(line)
    return end, written_by


class Board:
    """TensorBoard's writer, opened again a minute after it failed: its thread does not live on."""

    def __init__(self, directory: str, first_step: int, continues: bool, tell: Tell) -> None:
        """What an interrupted run logged after `first_step` is hidden: those steps come again. continues: as of
        `StepLog`."""
        self._directory, self._tell = directory, tell
        self._writer: SummaryWriter | None = None
        self._retry_at = 0.0
        self._open(first_step, () if continues else _WRONG_PATH)

    def begin(self, configuration: str, hyperparameters: dict[str, Any], step: int) -> None:
        """The configuration as YAML, and what of it (numbers, texts) runs are compared by."""
        # as add_hparams has it, which would make a second run for it
        experiment, session, _ = hparams(hyperparameters, dict.fromkeys(_METRICS, 0.0))
        self._do(step, lambda writer: [writer._get_file_writer().add_summary(one) for one in (experiment, session)])
        self._do(step, lambda writer: writer.add_custom_scalars(_CHARTS))
        code = "".join(f"    {line}\n" for line in configuration.splitlines())
        self.add_text("run/configuration", code, step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._do(step, lambda writer: writer.add_scalar(name, value, step))

    def add_text(self, name: str, text: str, step: int) -> None:
        self._do(step, lambda writer: writer.add_text(name, text, step))

    def go_back(self, step: int) -> None:
        """The run goes on after `step`: the steps behind it come again."""
        self.close()
        self._open(step)

    def close(self) -> None:
        self._do(None, SummaryWriter.close)
        self._writer = None

    def _open(self, first_step: int, raised: tuple[type[OSError], ...] = ()) -> None:
        try:
            self._writer = SummaryWriter(self._directory, purge_step=first_step + 1)
        except Exception as error:
            if isinstance(error, raised):
                raise
            self._failed(error)

    def _do(self, step: int | None, action: Callable[[SummaryWriter], Any]) -> None:
        """step: from which on a new file would count; None: no new file for this."""
        if self._writer is None and step is not None and time.monotonic() >= self._retry_at:
            self._open(step - 1)
        if self._writer is None:
            return
        try:
            action(self._writer)
        except Exception as error:  # its thread hands on whatever the file, the disk or a remote storage raised
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        writer, self._writer = self._writer, None
        self._retry_at = time.monotonic() + _BOARD_RETRY_SECONDS
        self._tell(
            f"warning: logging.tensorboard_dir {self._directory}: {error}; the run goes on, and tries again in "
            f"{_BOARD_RETRY_SECONDS:.0f} s"
        )
        if writer is not None:
            with suppress(Exception):  # it says the same once more
                writer.close()


class Terminal(Console):
    """Standard output; what cannot be written there is lost without a word, for there is nobody to tell."""

    def __init__(self) -> None:
        # a path in brackets is no markup
        super().__init__(file=sys.stdout, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.push_render_hook(Printable())

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            del self._buffer[:]

    def on_broken_pipe(self) -> None:
        """Nobody reads any more. rich would end the program here."""
        self._nobody_reads()

    def close(self) -> None:
        """What is left in Python's own buffer would fail again when the program ends, and change its exit code."""
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            self._nobody_reads()

    def _nobody_reads(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
