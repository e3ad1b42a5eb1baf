"""Processes as others may ask for them later: whether one that left its name in a file is still there."""

import os
import platform
from pathlib import Path


def machine() -> str:
    """Where a number of a process means the same one: the host's name, what the kernel drew when it started (two
    machines may have one name) and the namespace of its numbers (containers on one machine may share both). "" where
    the system does not say: then nothing follows from numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (leads to no file)
    except OSError:
        return ""


def started(pid: int) -> str:
    """When the process did, as the kernel counts: numbers are given again. "" where there is none, or only its exit
    status."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def has_ended(where: str, pid: int, since: str) -> bool:
    """Whether the process of number `pid`, which `started` `since` on the `machine` `where`, surely has."""
    return where != "" and where == machine() and started(pid) != since
