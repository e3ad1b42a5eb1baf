"""Where the ranks of one machine find each other: at an address that no other machine reaches.

torch's own store listens at every address of the machine and asks nobody who he is, and torch unpickles what it holds:
who reaches it runs code in the run (docs/security.md).
"""

import contextlib
import os
import random
import socket
import sys
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

ADDRESS = "127.0.0.1"
_LEAST_PORT, _FIRST_PORT, _TRIES = 1024, 10_000, 100


def quiet_port(address: str = ADDRESS) -> int:
    """A port that is free at `address` ("": at all), for a rank that is yet to start: none that the system gives to
    connections, one of which would have it by then; unless it gives all."""
    lowest = 32768
    with contextlib.suppress(OSError, ValueError, IndexError):
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    quiet = range(min(_FIRST_PORT, max(_LEAST_PORT, lowest - _FIRST_PORT // 2)), max(_LEAST_PORT, lowest))
    for port in [*random.SystemRandom().sample(quiet, min(_TRIES, len(quiet))), 0]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            return int(probe.getsockname()[1])
    raise OSError(f"no port of {address or 'this machine'} is free")


def hosted_store(port: int, timeout: timedelta) -> TCPStore:
    """A new store at a port of this machine (0: any that is free). Raises OSError where it is taken."""
    listener = socket.create_server((ADDRESS, port))
    port = listener.getsockname()[1]
    return TCPStore(
        ADDRESS, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def store_of_one_machine(timeout: timedelta) -> TCPStore | None:
    """The store of the run that this process is a rank of; None: its ranks are on several machines, or torchrun holds
    it for them."""
    environment = os.environ
    if environment.get("LOCAL_WORLD_SIZE") != environment["WORLD_SIZE"]:
        return None
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    port = int(environment["MASTER_PORT"])
    return hosted_store(port, timeout) if environment["RANK"] == "0" else TCPStore(ADDRESS, port, timeout=timeout)


def keep_gloo_on_this_machine() -> None:
    """gloo's connections, likewise, unless the user has said where they go."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
