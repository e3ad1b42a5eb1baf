"""Collect the packages that a machine without a network lacks, as wheels for it, in a folder that can travel:

    python -m benchmarks.gpu.collect_wheels --have have.txt .whl

--have names the packages that are there, one a line, or separated by commas (`pip list` prints them, too); versions do
not matter. There:

    python3 -m pip install --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    export PYTHONPATH=/tmp/site:$PWD
    python3 setup.py build_ext --inplace
    python3 -m benchmarks.gpu

What is wanted is what training and tests import; the versions are requirements.txt's. Transformer Engine is not among
it: its library alone is a wheel of 276 MB (2.20.2), and the rest has to be compiled. Without it its tests say "no TE".
"""

import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Of requirements.txt and requirements-dev.txt; what else they name serves preprocessing, pictures, object storage or CI
WANTED = (
    *("megatron-core", "pydantic", "omegaconf", "typer", "rich", "psutil", "xxhash", "orjson", "zstandard"),
    *("platformdirs", "jinja2", "numpy", "safetensors", "tokenizers", "sentencepiece", "tensorboard", "pybind11"),
    "pytest",
)
PEERS = ("liger-kernel", "cut-cross-entropy")
"""Of the benchmark of the masked loss; newest versions."""
_ROOT = Path(__file__).parents[2]
_GLIBC = (17, 24, 27, 28, 31, 34, 35)
"""manylinux_2_N: pip matches N exactly."""


def main(
    folder: Annotated[Path, typer.Argument(help="Takes the wheels.")],
    have: Annotated[Path | None, typer.Option(help="File with the packages that are there. Default: none.")] = None,
    python: Annotated[str, typer.Option(help="Of that machine.")] = "3.12",
    limit_mb: Annotated[float, typer.Option(help="More (10^6 bytes) is an error.")] = 64.0,
    peers: Annotated[bool, typer.Option("--peers", help=f"Also {', '.join(PEERS)}.")] = False,
) -> None:
    """Collect what a machine without a network lacks, as wheels.

    Example: python -m benchmarks.gpu.collect_wheels --have have.txt .whl
    """
    environment = _environment(python)
    there = set() if have is None else names(have.read_text())
    wanted = [one for one in pinned(environment) if one.name in WANTED]
    wanted += [Requirement(name) for name in PEERS if peers]
    folder.mkdir(parents=True, exist_ok=True)
    wheels = collect(wanted, there, environment, folder)
    total = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:7.2f} MB  {wheel.name}")
    print(f"{total:7.2f} MB  in all, in {folder}")
    if total > limit_mb:
        sys.exit(f"collect_wheels: {total:.2f} MB are more than --limit-mb {limit_mb:g}: name in --have what is there")


def names(text: str) -> set[str]:
    """The first word of each line or entry, in the form in which they are compared."""
    words = (entry.split() for entry in re.split(r"[,\n]", text))
    return {canonicalize_name(re.split(r"[=<>~!;\[]", word[0])[0].rstrip(".")) for word in words if word}


def pinned(environment: dict[str, str]) -> list[Requirement]:
    """What the requirements files ask for on that Python."""
    lines = [
        line.partition("#")[0].strip()
        for name in ("requirements.txt", "requirements-dev.txt")
        for line in (_ROOT / name).read_text().splitlines()
    ]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def collect(wanted: list[Requirement], have: set[str], environment: dict[str, str], folder: Path) -> list[Path]:
    """Wheels of `wanted` and of what they need, without what is there. Exits with 1 where one cannot be had."""
    waiting, done, wheels = list(wanted), set(have), list[Path]()
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in done:
            continue
        done.add(name)
        wheel = _download(requirement, environment["python_version"], folder)
        wheels.append(wheel)
        waiting += needed(wheel, environment)
    return wheels


def needed(wheel: Path, environment: dict[str, str]) -> list[Requirement]:
    """What a wheel says that it needs on that machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(one for one in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", one))
        metadata = Parser().parsestr(archive.read(name).decode())
    found = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    return [one for one in found if one.marker is None or one.marker.evaluate({**environment, "extra": ""})]


def _download(requirement: Requirement, python: str, folder: Path) -> Path:
    before = set(folder.iterdir())
    platforms = [f"--platform=manylinux_2_{number}_x86_64" for number in _GLIBC]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux1_x86_64", "--platform=any"]
    bare = f"{requirement.name}{requirement.specifier}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    if subprocess.run([*command, f"--dest={folder}", bare]).returncode:
        sys.exit(f"collect_wheels: no wheel of {bare} for Python {python}; pip has said why")
    new = set(folder.iterdir()) - before
    name = re.sub(r"[-_.]+", "_", requirement.name).lower()
    return next(iter(new or [one for one in folder.glob("*.whl") if one.name.lower().startswith(f"{name}-")]))


def _environment(python: str) -> dict[str, str]:
    """Of markers (PEP 508), on Linux."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
        "os_name": "posix",
    }


if __name__ == "__main__":
    typer.run(main)
