"""`illada` as a process: how it ends."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

_ENDINGS = {"pass": 0, "sys.exit()": 0, "sys.exit(3)": 3, "sys.exit('words')": 1, "1 / 0": 1}


def _run(does: str) -> "subprocess.CompletedProcess[str]":
    """A process of `illada` whose command does that, with something that tells when it is taken apart."""
    code = f"""
        import atexit, os, sys, illada_megatron.cli.main as cli
        from illada_megatron.__main__ import program
        class Told:
            def __del__(self, write=os.write):
                write(2, b"taken apart")
        told = Told()
        def main():
            atexit.register(print, "what was registered is done")
            {does}
        cli.main = main
        program()
    """
    line = [sys.executable, "-c", textwrap.dedent(code)]
    # with it C's output would not wait in a buffer
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("does", _ENDINGS)
def test_it_ends_at_once_and_with_its_code(does: str) -> None:
    """A thread of gloo's that lets go of a tensor while the interpreter is being taken apart would abort it."""
    ended = _run(does)
    assert ended.returncode == _ENDINGS[does], ended.stderr
    assert ended.stdout == "what was registered is done\n"
    assert "taken apart" not in ended.stderr
    assert ("words" in ended.stderr) == ("words" in does)
    assert ("ZeroDivisionError" in ended.stderr) == ("/" in does)


def test_an_interrupt() -> None:
    ended = _run("os.kill(os.getpid(), 2)")
    assert ended.returncode == 130
    assert "KeyboardInterrupt" in ended.stderr


def test_what_c_libraries_have_printed_is_said() -> None:
    ended = _run("import ctypes; ctypes.CDLL(None).printf(b'from C')")
    assert ended.returncode == 0
    assert "from C" in ended.stdout


def test_without_a_place_to_speak_to() -> None:
    line = f"exec {sys.executable} -m illada_megatron --help >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], check=False).returncode in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    code = "import illada_megatron.cli.main as cli\nfrom illada_megatron.__main__ import program\n"
    code += "cli.main = lambda: print('unsaid')\nprogram()"
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.DEVNULL, check=False)
    assert ended.returncode == 1
