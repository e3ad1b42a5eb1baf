"""A run of two ranks that saves at each step, to be disturbed; and what a directory of its checkpoints holds."""

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.injection import Call, Fault, Injection
from fork_server import ForkServer
from launch import SMALL

from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.store import newest_complete
from illada_megatron.runtime.loopback import quiet_port

MODULES = ("illada_megatron.training.trainer", "illada_megatron.checkpoint.saver")
# Far above what anything here takes on a loaded machine: who is not done by then hangs.
HANG_SECONDS = 1800.0
SAVE_DIR = "checkpoints"


def tiny(corpus: Path) -> tuple[str, ...]:
    """Arguments of `train`: one layer, a step of two samples, every step saved, one checkpoint kept."""
    return (
        *(*SMALL, "model.num_layers=1", "training.global_batch_size=2", "training.train_steps=100000"),
        *(f"data.train_paths=[{corpus}]", "checkpoint.interval_steps=1", "checkpoint.keep_last=1"),
        "logging.interval_steps=1",
    )


@dataclass(frozen=True)
class Ended:
    """What became of the two ranks."""

    codes: list[int | None]
    """Exit codes; below 0: the signal; None: it hung and was killed."""
    outputs: list[str]

    @property
    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{output}" for rank, output in enumerate(self.outputs))


class Ranks:
    """Two ranks of `illada train`, running, with the faults of `faults`; checkpoints and the log are below its root."""

    def __init__(self, server: ForkServer, faults: Injection, arguments: Sequence[str]) -> None:
        self._server, root = server, faults.root
        self._files = [faults.shared / f"rank_{rank}" for rank in range(2)]
        for file in self._files:
            file.unlink(missing_ok=True)
        port = str(quiet_port())
        line = ["train", *arguments, f"checkpoint.save_dir={root / SAVE_DIR}"]
        line.append(f"logging.jsonl_path={root / 'steps.jsonl'}")
        world = {**faults.environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        world["COLUMNS"] = "1000"  # lines that are not folded
        self.pids = [
            server.start(line, self._files[rank], {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        self._codes: list[int | None] = [None, None]

    def alive(self) -> bool:
        """Whether both are."""
        self._look()
        return self._codes == [None, None]

    def ended(self, except_for: int | None = None) -> bool:
        """Whether both have, or all but that rank."""
        self._look()
        return all(code is not None for rank, code in enumerate(self._codes) if rank != except_for)

    def _look(self) -> None:
        for rank, pid in enumerate(self.pids):
            if self._codes[rank] is None:
                self._codes[rank] = self._server.poll(pid)

    def wait(self, seconds: float = HANG_SECONDS) -> Ended:
        """Until both have ended; who runs for longer is killed."""
        left = [rank for rank in range(2) if self._codes[rank] is None]
        for rank, code in zip(left, self._server.wait([self.pids[rank] for rank in left], seconds), strict=True):
            self._codes[rank] = code
        return Ended(self._codes, [file.read_text() for file in self._files])


# The next saves that a run is stopped at: more than one, as a save may fail before it touches its directory.
AHEAD = 4


def breakpoints(step: int) -> list[Fault]:
    """Where rank 0 stands when it begins to save a step after `step`, and nobody writes a checkpoint."""
    return [Fault(path=f"{SAVE_DIR}/{directory(step + more)}*", action="hang", rank=0) for more in range(1, AHEAD + 1)]


def wait_for_save(faults: Injection, ranks: "Ranks", step: int, seconds: float = HANG_SECONDS) -> int | None:
    """The step that is about to be saved, with `breakpoints(step)` armed first; None where the ranks have ended, or
    hang, before."""
    end = time.monotonic() + seconds
    while True:
        alive = ranks.alive() and time.monotonic() < end
        for more in range(AHEAD):
            if faults.fired(more):
                return step + more + 1
        if not alive:
            return None
        time.sleep(0.005)


def directory(step: int) -> str:
    return f"step_{step:08d}"


def digest(checkpoint: Path) -> str:
    """Of all tensors of a checkpoint, to the bit."""
    found = hashlib.sha256()
    reader = TensorReader(checkpoint)
    for name in sorted(reader.tensors):
        found.update(name.encode())
        found.update(reader.read(name).numpy().tobytes())
    return found.hexdigest()


def newest(save_dir: Path) -> tuple[int, str] | None:
    """(step, digest) of the checkpoint that a run would continue from; None: there is none."""
    if not save_dir.exists():
        return None
    info, _ = newest_complete(save_dir)
    return None if info is None else (info.step, digest(save_dir / directory(info.step)))


class Problems(list[str]):
    """What was wrong, said at once: all trials take a while."""

    def add(self, problem: str) -> None:
        self.append(problem)
        print(f"problem: {problem}", flush=True)


def told(output: str) -> dict[int, list[str]]:
    """Step -> what rank 0 has said of its saves."""
    found: dict[int, list[str]] = {}
    for line in output.splitlines():
        if match := re.match(r"saved \S*step_(\d+):|step (\d+): could not be saved: .*", line):
            found.setdefault(int(match[1] or match[2]), []).append(line)
    return found


@dataclass(frozen=True)
class Place:
    """A call in the window from one save to the next: of a rank, by name, of a path whose steps are relative."""

    rank: int | None
    name: str
    path: str
    nth: int

    def fault(self, step: int, **how: object) -> Fault:
        """At this call of the save of `step`."""
        path = re.sub(r"step_\[([+-]\d+)\]", lambda match: directory(step + int(match[1])), self.path)
        return Fault(self.name, path, rank=self.rank, nth=self.nth, **how)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name} {self.nth} of {self.path} on rank {self.rank}"


def places(calls: Sequence[Call], step: int, most: int = 2) -> list[Place]:
    """The calls of the save of `step`; of those of one name and path the first `most`."""
    counts: dict[tuple[int | None, str, str], int] = {}
    found = []
    for call in calls:
        path = re.sub(r"step_(\d{8})", lambda match: f"step_[{int(match[1]) - step:+d}]", call.path)
        path = re.sub(r"(?<=[._-])[0-9a-f]{8,}(?=[._-]|$)", "*", path)  # an attempt's id, drawn at random
        key = (call.rank, call.name, path)
        counts[key] = counts.get(key, 0) + 1
        if counts[key] <= most:
            found.append(Place(*key, counts[key]))
    return found
