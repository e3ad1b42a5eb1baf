"""Whether a process that left its number in a file is there still: wrong in the one direction, two write where one may;
in the other, the next one waits."""

import gc
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from illada_megatron.system import process
from illada_megatron.system.process import has_ended, machine, started

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def _child() -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)


def test_a_process_lives_ends_and_is_reaped() -> None:
    child = _child()
    since = started(child.pid)
    assert since
    assert not has_ended(machine(), child.pid, since)
    assert has_ended(machine(), child.pid, since + "0"), "another process has its number"
    assert not has_ended(machine() + "x", child.pid, since + "0"), "a number of another machine"
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(machine(), child.pid, since), "only its exit status is left"
    child.wait()
    assert has_ended(machine(), child.pid, since)
    assert has_ended(machine(), child.pid, "")


def test_what_is_not_known_is_not_taken_for_the_end() -> None:
    pid = os.getpid()
    assert not has_ended(machine(), pid, "")
    assert not has_ended("", pid, "7")
    assert not has_ended(machine(), 0, "7")
    assert not has_ended(machine(), 1 << 70, "7")


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, OSError])
def test_a_process_that_is_hidden(error: type[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid: another user's process has no entry, or one that cannot be read."""
    child = _child()
    since = started(child.pid) or ""

    def hidden(*_: object, **__: object) -> str:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(process, "machine", lambda: "here")
        patch.setattr(Path, "read_text", hidden)
        assert not has_ended("here", child.pid, since)
        child.communicate("")
        assert has_ended("here", child.pid, since)


_LEADER_ENDS = """
import ctypes, threading, time
threading.Thread(target=lambda: (print("there", flush=True), time.sleep(600)), daemon=True).start()
time.sleep(0.5)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[__import__("platform").machine()], 0)
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="knows the number of exit there")
def test_a_thread_that_is_left_is_the_process() -> None:
    """As of a rank that was killed while one of its threads waits in the kernel for a file server."""
    child = subprocess.Popen([sys.executable, "-c", _LEADER_ENDS], stdout=subprocess.PIPE, text=True)
    since = started(child.pid)
    assert since
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.05)
    assert not has_ended(machine(), child.pid, since)
    child.kill()
    child.wait()
    assert has_ended(machine(), child.pid, since)


def test_garbage_is_searched_as_usual_once_all_is_imported() -> None:
    usual = gc.get_threshold()
    process.search_garbage_as_usual()  # nothing was changed
    process.search_garbage_rarely()
    process.search_garbage_rarely()
    assert gc.get_threshold()[0] > 5 * usual[0]
    process.search_garbage_as_usual()
    assert gc.get_threshold() == usual
