"""Collects a small real corpus that every machine already has: the Python sources of its standard library.

    python examples/demo/collect_corpus.py demo/corpus

writes `train.jsonl` and `heldout.jsonl`, one {"text": ..., "path": ...} a line. Nothing is downloaded."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

MINIMUM_BYTES = 10_000_000
HELDOUT_FRACTION = 0.05
# Third-party code, compiled files and test suites (repetitive, and full of deliberately broken sources)
LEFT_OUT_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
# Read only where the standard library alone is too small: what a virtual environment has, then what this project needs
FURTHER_PACKAGES = ("pip", "setuptools", "wheel", "rich", "typer", "numpy", "torch")


@dataclass(frozen=True)
class CorpusSummary:
    """What was collected. `*_bytes` count the UTF-8 text, not the JSON around it."""

    train_path: Path
    heldout_path: Path
    train_files: int
    heldout_files: int
    train_bytes: int
    heldout_bytes: int
    undecodable_files: int
    duplicate_files: int
    packages: tuple[str, ...]


def collect(
    output_dir: str | Path,
    minimum_bytes: int = MINIMUM_BYTES,
    library: Path | None = None,
    further_packages: Sequence[str] = FURTHER_PACKAGES,
) -> CorpusSummary:
    """Write train.jsonl and heldout.jsonl under `output_dir` (made if missing).

    Whole files are held out, chosen by a hash of their path inside the library, so the split does not change from
    run to run. Files that are empty, not UTF-8 or copies of one already taken are left out.

    library: root of the standard library; None: this Python's.
    further_packages: installed packages whose sources are added, one package after another, while the text is short.

    Raises RuntimeError when everything found is less than `minimum_bytes` of text."""
    output_dir = Path(output_dir)
    collector = _Collector()
    library = library or Path(sysconfig.get_path("stdlib"))
    collector.add_tree(library, "stdlib")
    for package in further_packages:
        if collector.total_bytes >= minimum_bytes:
            break
        for directory in _package_directories(package):
            collector.add_tree(directory, package)
    if collector.total_bytes < minimum_bytes:
        raise RuntimeError(
            f"found {collector.total_bytes} bytes of Python source in {', '.join(collector.packages)}, expected at "
            f"least {minimum_bytes}: install the standard library's sources ({library} has too few .py files) or "
            "pip into this environment"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    paths = {split: output_dir / f"{split}.jsonl" for split in ("train", "heldout")}
    for split, path in paths.items():
        _write_jsonl(path, collector.documents[split])
    size = {split: sum(len(text.encode()) for _, text in documents) for split, documents in collector.documents.items()}
    return CorpusSummary(
        train_path=paths["train"],
        heldout_path=paths["heldout"],
        train_files=len(collector.documents["train"]),
        heldout_files=len(collector.documents["heldout"]),
        train_bytes=size["train"],
        heldout_bytes=size["heldout"],
        undecodable_files=collector.undecodable_files,
        duplicate_files=collector.duplicate_files,
        packages=tuple(collector.packages),
    )


class _Collector:
    """The (path, text) documents of both splits, gathered tree by tree."""

    def __init__(self) -> None:
        self.documents: dict[str, list[tuple[str, str]]] = {"train": [], "heldout": []}
        self.packages: list[str] = []
        self.total_bytes = 0
        self.undecodable_files = 0
        self.duplicate_files = 0
        self._seen: set[bytes] = set()

    def add_tree(self, root: Path, name: str) -> None:
        self.packages.append(name)
        for path in _python_files(root):
            content = path.read_bytes()
            digest = hashlib.sha256(content).digest()
            if not content.strip():
                continue
            # a copy in the training part of a held-out file would make the held-out loss a lie
            if digest in self._seen:
                self.duplicate_files += 1
                continue
            try:
                text = content.decode("utf-8")
            except UnicodeDecodeError:
                self.undecodable_files += 1
                continue
            self._seen.add(digest)
            label = f"{name}/{path.relative_to(root).as_posix()}"
            self.documents["heldout" if _is_held_out(label) else "train"].append((label, text))
            self.total_bytes += len(content)


def _python_files(root: Path) -> Iterator[Path]:
    """The .py files under `root` in a fixed order, links not followed."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = sorted(name for name in subdirectories if name not in LEFT_OUT_DIRECTORIES)
        yield from (Path(directory, name) for name in sorted(files) if name.endswith(".py"))


def _package_directories(package: str) -> list[Path]:
    """Where this environment has the package; not through the import system, which may run code to answer."""
    places = dict.fromkeys(Path(sysconfig.get_path(kind), package) for kind in ("purelib", "platlib"))
    return [place for place in places if place.is_dir()]


def _is_held_out(label: str) -> bool:
    draw = int.from_bytes(hashlib.sha256(label.encode()).digest()[:8], "big") / 2**64
    return draw < HELDOUT_FRACTION


def _write_jsonl(path: Path, documents: list[tuple[str, str]]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for label, text in documents:
            stream.write(json.dumps({"text": text, "path": label}, ensure_ascii=False) + "\n")
    temporary.replace(path)


def main(output_dir: Annotated[Path, typer.Argument(help="where train.jsonl and heldout.jsonl go")]) -> None:
    """Collect the standard library's sources into train.jsonl and heldout.jsonl."""
    summary = collect(output_dir)
    print(
        f"{summary.train_path}: {summary.train_files} files, {summary.train_bytes / 1e6:.2f} MB\n"
        f"{summary.heldout_path}: {summary.heldout_files} files, {summary.heldout_bytes / 1e6:.2f} MB\n"
        f"from {', '.join(summary.packages)}; left out: {summary.undecodable_files} not UTF-8, "
        f"{summary.duplicate_files} copies"
    )


if __name__ == "__main__":
    typer.run(main)
