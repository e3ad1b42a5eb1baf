"""Wheels for a machine without a network: what is there is left out, what wheels need is followed, too much refused."""

import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu import collect_wheels

NEEDS = {
    "megatron-core": ["numpy", "ninja>=1.0", 'torch>=2; python_version < "3.11"', 'pytest; extra == "dev"'],
    "ninja": ["platformdirs"],
    "platformdirs": [],
}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Wheels with their metadata instead of a registry's; the names that were asked for."""
    asked: list[str] = []

    def download(requirement: Requirement, python: str, folder: Path) -> Path:
        asked.append(requirement.name)
        wheel = folder / f"{requirement.name.replace('-', '_')}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            lines = [f"Requires-Dist: {one}" for one in NEEDS[requirement.name]]
            archive.writestr(f"{wheel.name[:-16]}.dist-info/METADATA", "\n".join(["Name: x", *lines, ""]))
            archive.writestr("content", b"x" * 1000)
        return wheel

    monkeypatch.setattr(collect_wheels, "_download", download)
    return asked


def test_what_is_missing_and_what_it_needs(
    registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect_wheels, "WANTED", ("megatron-core", "numpy"))
    (tmp_path / "have.txt").write_text("NumPy 2.5.2\ntorch==2.11.0, typing_extensions.\n")
    collect_wheels.main(tmp_path / "whl", have=tmp_path / "have.txt")
    assert registry == ["megatron-core", "ninja", "platformdirs"]


def test_too_much_is_an_error(registry: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect_wheels, "WANTED", ("platformdirs",))
    with pytest.raises(SystemExit, match=r"MB are more than --limit-mb 0\.0001: name in --have what is there"):
        collect_wheels.main(tmp_path, limit_mb=0.0001)


def test_everything_wanted_is_pinned_for_that_python() -> None:
    """With the megatron-core of Python 3.12, whatever this one is."""
    pinned = {one.name: str(one.specifier) for one in collect_wheels.pinned(collect_wheels._environment("3.12"))}
    assert set(collect_wheels.WANTED) <= pinned.keys()
    assert pinned["megatron-core"].startswith("==0.19")
