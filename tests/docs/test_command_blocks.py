"""The commands of README.md and docs/ run as they are written, in order, from the root of a fresh clone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launch import ROOT
from pages import Page, read_page

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# What a fresh clone does not have.
_NOT_CLONED = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "__pycache__", "build", "*.egg-info")
_MADE_BY_COMMANDS = ("demo", "runs", "corpus")


def _with_commands() -> dict[str, Page]:
    pages = {name: read_page(ROOT / name) for name in PAGES if name != "docs/log.md"}
    return {name: page for name, page in pages.items() if any(block.commands for block in page.blocks)}


WITH_COMMANDS = _with_commands()


def _runnable(page: Page, slow: bool) -> list[str]:
    """What a shell does for a page, a block each."""
    scripts = []
    for block in page.blocks:
        if block.mark == "slow" and not slow:
            continue
        if block.file is not None:
            scripts.append(
                f"mkdir -p $(dirname {block.file})\ncat > {block.file} <<'END OF FILE'\n{block.text}\nEND OF FILE"
            )
        elif block.commands and not block.mark.startswith("not run"):
            scripts.append(block.commands)
    return scripts


Done = Callable[[str, bool], Path]


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """done(page, slow) -> a clone in which the page's commands have been run; each page once."""
    clones: dict[tuple[str, bool], Path] = {}

    def run(name: str, slow: bool) -> Path:
        page = WITH_COMMANDS[name]
        slow &= any(block.mark == "slow" for block in page.blocks)
        if (name, slow) in clones:
            return clones[name, slow]
        clone = tmp_path_factory.mktemp("page") / "clone"
        if page.after is not None:
            shutil.copytree(run(page.after, slow), clone, symlinks=True)
        else:
            shutil.copytree(ROOT, clone, ignore=_NOT_CLONED)
            for place in _MADE_BY_COMMANDS:
                shutil.rmtree(clone / place, ignore_errors=True)
            (clone / ".venv").symlink_to(sys.prefix)
        for script in _runnable(page, slow):
            _run(script, clone, name)
        clones[name, slow] = clone
        return clone

    return run


def _run(script: str, clone: Path, name: str) -> None:
    environment = {
        **os.environ,
        "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}",  # as `source .venv/bin/activate`
        "PYTHONPATH": str(clone),  # the environment's own may be installed from elsewhere
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "-euo", "pipefail", "-c", script]
    ended = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{name}: exit code {ended.returncode} of\n{script}\n{ended.stdout}\n{ended.stderr}"


def test_a_page_is_read() -> None:
    """What the convention says, on this folder's own page."""
    page = read_page(Path(__file__).parent / "page.md")
    assert page.after == "docs/training.md"
    assert [(block.commands, block.mark) for block in page.blocks] == [
        ("illada doctor\npython -V", ""),
        ("illada evaluate \\\n    --checkpoint runs/a", "slow"),
        ("", "file: my.yaml"),
        ("illada checkpoint inspect runs/a", ""),
        ("", ""),
        ("sbatch x.sh", "not run: needs Slurm"),
    ]
    assert page.blocks[2].text == "base: tiny\nmodel: {num_layers: 2}"


@pytest.mark.parametrize("name", [name for name in WITH_COMMANDS if _runnable(WITH_COMMANDS[name], slow=False)])
def test_commands_of_a_page(name: str, done: Done) -> None:
    done(name, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, page in WITH_COMMANDS.items() if "slow" in {b.mark for b in page.blocks}]
)
def test_all_commands_of_a_page(name: str, done: Done) -> None:
    done(name, True)
