"""The files under a prefix, by name, and whose they are: `web` and `web_00001` may both be corpora, and shard 1 of the
first is called like the second."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from illada_megatron.data.errors import DataError
from illada_megatron.data.preprocessing import records
from illada_megatron.data.preprocessing.records import JobRecord
from illada_megatron.data.shards.manifest import read_manifest
from illada_megatron.system.whole_file import TEMPORARY

# behind a prefix: a shard's numbers (task, and part of a streamed task), what the file is, and that it is being
# written; of the lock's note only what is being written: the note itself may be another machine's
_BEHIND = re.compile(
    rf"((?:_(\d{{5,}})(?:_\d{{3,}})?)?)"
    rf"\.(bin|idx|done\.json|job\.json|manifest\.json|lock\.json(?={TEMPORARY}))({TEMPORARY})?"
)
_NUMBERS = re.compile(r"_(\d{5,})(_\d{3,})?")


@dataclass(frozen=True)
class Output:
    """A file named as this package names what it writes."""

    path: Path
    stem: str
    """The prefix's name with the shard's numbers."""
    task: int | None
    """Number in the name; None: of the prefix itself."""
    is_temporary: bool

    @property
    def is_record(self) -> bool:
        """Of a finished task."""
        return self.path.name.endswith(".done.json")


class Outputs:
    """What lies under a prefix, as it was when this was made."""

    def __init__(self, prefix: str) -> None:
        self._prefix = Path(prefix)
        folder = self._prefix.parent
        self._names = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else frozenset[str]()

    @cached_property
    def own(self) -> list[Output]:
        """Files that are called like the prefix, and those that its record and its manifest name; none of a corpus
        whose prefix is this one's with a number."""
        corpus = _Corpus(self._prefix)
        return [
            output
            for output in self._named
            if output.task is None or (corpus.holds(output.stem) and self._other_corpus(output.stem) is None)
        ]

    def in_the_way(self, numbered_tasks: int) -> str | None:
        """What keeps a job of so many tasks with a number from this prefix, whether it overwrites or not: the message
        says what is there already and whose it is."""
        name = shorter = self._prefix.name
        for _ in ("part", "task"):
            shorter = shorter.rpartition("_")[0]
            if shorter and _Corpus(self._prefix.parent / shorter).holds(name):
                return f"{self._prefix}: is the name of a shard of the corpus {self._prefix.parent / shorter}"
        own = set(self.own)
        for output in self._named:
            if output.task is not None and output.task < numbered_tasks:
                if (other := self._other_corpus(output.stem)) is not None:
                    return f"{output.path}: there already, of the corpus {self._prefix.with_name(other)}"
                if output not in own and not output.is_temporary:
                    job = records.job_path(str(self._prefix))
                    return f"{output.path}: there already, and no {job.name} says that it is of this corpus"
        return None

    @cached_property
    def _named(self) -> list[Output]:
        name = self._prefix.name
        found = []
        for file in sorted(self._names):
            behind = _BEHIND.fullmatch(file, len(name)) if file.startswith(name) else None
            if behind is not None:
                numbers, task, _, temporary = behind.groups()
                path = self._prefix.with_name(file)
                found.append(Output(path, name + numbers, int(task) if task else None, temporary is not None))
        return found

    def _other_corpus(self, stem: str) -> str | None:
        """The corpus that has this name, or this name without its last number, as its own prefix."""
        for name in (stem, stem[: stem.rindex("_")]):
            if len(name) > len(self._prefix.name) and not self._names.isdisjoint(
                (f"{name}.job.json", f"{name}.manifest.json")
            ):
                return name
        return None


class _Corpus:
    """The names that a corpus has given to shards, by its record and its manifest."""

    def __init__(self, prefix: Path) -> None:
        self._name = prefix.name
        self._numbered_tasks = 0
        self._listed = frozenset[str]()
        try:
            record = records.read_record(records.job_path(str(prefix)), JobRecord)
            self._numbered_tasks = record.numbered_tasks if record else 0
            if records.manifest_path(str(prefix)).exists():
                self._listed = frozenset(
                    shard.path for shard in read_manifest(records.manifest_path(str(prefix))).shards
                )
        except DataError:
            return  # another program's: it names no shards of ours

    def holds(self, stem: str) -> bool:
        numbers = _NUMBERS.fullmatch(stem, len(self._name)) if stem.startswith(self._name) else None
        return stem in self._listed or (numbers is not None and int(numbers[1]) < self._numbered_tasks)
