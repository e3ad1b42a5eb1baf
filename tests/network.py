"""Machines of a cluster, as Linux network namespaces on a bridge: own addresses, a cable that can be pulled."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from launch import HANG_SECONDS, ROOT


def missing() -> str | None:
    """Why there can be no namespaces here; None: they work."""
    if shutil.which("ip") is None:
        return "no `ip` command (package iproute2)"
    try:
        with cluster(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"`{' '.join(error.cmd)}` was refused: {error.stderr.strip()}"


@dataclass
class Machine:
    """A namespace, and what was started in it."""

    name: str
    address: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[str]:
        """Run `python COMMAND` here; its output is appended to `log`."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
        with log.open("a") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, sys.executable, *command],
                stdout=file,
                stderr=file,
                text=True,
                env=environment,
            )
        self.processes.append(process)
        return process

    def pull_the_cable(self) -> None:
        """Nothing comes or goes any more; no process here or elsewhere is told."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        _ip("-n", self.name, "link", "set", "eth0", "up")

    def reboot(self) -> None:
        """What ran here is gone."""
        for process in self.processes:
            if process.poll() is None:
                for child in (*psutil.Process(process.pid).children(recursive=True), process):
                    child.kill()
                process.wait()


@contextmanager
def cluster(size: int) -> Iterator[list[Machine]]:
    """Machines 10.77.0.1, 10.77.0.2, ... that reach each other; all of it is gone afterwards."""
    tag = f"{os.getpid()}"
    bridge = f"b{tag}"
    machines = [Machine(f"illada-{tag}-{number}", f"10.77.0.{number}") for number in range(1, size + 1)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for number, machine in enumerate(machines):
            _ip("netns", "add", machine.name)
            port = f"v{tag}-{number}"
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _ip("link", "set", port, "master", bridge, "up")
            _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
            # as docs/faults.md advises: else an agent that is cut off may wait for its store for 15 minutes
            _ip("netns", "exec", machine.name, "sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2")
            for device in ("lo", "eth0"):
                _ip("-n", machine.name, "link", "set", device, "up")
        yield machines
    finally:
        for number, machine in enumerate(machines):
            machine.reboot()
            # connections that were cut off keep a namespace, and the cable in it, for minutes
            subprocess.run(["ip", "link", "delete", f"v{tag}-{number}"], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "delete", machine.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True, check=False)


def wait_for(process: subprocess.Popen[str], log: Path) -> int:
    """The exit status; fails with the log where it does not end."""
    try:
        return process.wait(HANG_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"hangs: {log.read_text()}") from error


def wait_until(happened: Callable[[], bool], what: str) -> float:
    """Seconds until happened() is true."""
    begin = time.monotonic()
    while not happened():
        assert time.monotonic() - begin < HANG_SECONDS, f"hangs before {what}"
        time.sleep(0.05)
    return time.monotonic() - begin


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
