"""The machine and the commit a figure belongs to, and the environment of measuring processes. No torch here."""

import os
import platform
import subprocess
from pathlib import Path


def cpu_model() -> str:
    """As the kernel names it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str | None:
    """The commit that is measured; None outside of git."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return found.stdout.strip() or None


def prepare_environment(huge_pages: bool) -> None:
    """Of the processes that this one starts from now on.

    Waiting OpenMP threads sleep, so that CPU seconds are seconds of work. Inductor's cache is off: it asks torch.cuda
    for the device it is told of, which is a CPU where the adaptor carries megatron-core. huge_pages: torch advises the
    kernel to back its buffers with them.
    """
    os.environ |= {"GOMP_SPINCOUNT": "0", "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(huge_pages))
