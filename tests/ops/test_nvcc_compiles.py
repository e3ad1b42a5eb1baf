"""nvcc makes machine code of the masked cross-entropy's kernels, without a warning and without spilled registers.

Needs a CUDA toolkit, no GPU. What the code does is checked by test_cuda_kernels_on_host.py and test_cuda_device.py.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "csrc" / "masked_cross_entropy" / "cuda_kernels.cu"
REGISTERS = 64  # two blocks of 512 threads share an SM's 65,536
# Of logits and of booleans, mangled: (unit stride, capped)
LOGITS = {"bf16": "13__nv_bfloat16", "fp16": "6__half", "fp32": "f"}
VARIANTS = list(product(("logit_statistics", "logits_to_gradient"), LOGITS, (0, 1), (0, 1)))


@dataclass(frozen=True)
class Compiled:
    object_file: Path
    ptx: dict[str, str]  # mangled kernel name -> PTX
    ptxas: dict[str, str]  # mangled kernel name -> what ptxas says of it

    def kernel(self, name: str, logits: str, unit_stride: int, capped: int) -> tuple[str, str]:
        """PTX and ptxas's report of one kernel."""
        wanted = re.compile(rf"{name}_kernelI{LOGITS[logits]}Lb{unit_stride}ELb{capped}EE")
        (mangled,) = filter(wanted.search, self.ptx)
        return self.ptx[mangled], self.ptxas[mangled]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{toolkit}/bin")
    if nvcc is None:
        pytest.skip(f"needs nvcc, found none on PATH nor in {toolkit}/bin (CUDA_HOME)")
    directory = tmp_path_factory.mktemp("nvcc")
    object_file = directory / "cuda_kernels.o"
    flags = ["-std=c++17", "-arch=sm_90", "-Werror", "all-warnings", "-Xptxas", "-v", "--keep", "--keep-dir", directory]
    built = subprocess.run([nvcc, *flags, "-c", SOURCE, "-o", object_file], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    entries = re.split(r"^\.visible \.entry |^\.entry ", (directory / "cuda_kernels.ptx").read_text(), flags=re.M)[1:]
    reports = re.split(r"Compiling entry function '", built.stderr)[1:]
    return Compiled(
        object_file,
        {entry[: entry.index("(")]: entry for entry in entries},
        {report[: report.index("'")]: report for report in reports},
    )


@pytest.mark.parametrize(("name", "logits", "unit_stride", "capped"), VARIANTS)
def test_kernel(compiled: Compiled, name: str, logits: str, unit_stride: int, capped: int) -> None:
    """Fits its registers; where columns are neighbours it moves 16 bytes at a time, four together."""
    ptx, report = compiled.kernel(name, logits, unit_stride, capped)
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
    (registers,) = re.findall(r"Used (\d+) registers", report)
    assert int(registers) <= REGISTERS
    loads, stores = (len(re.findall(rf"{op}\.global\.cg\.v4\.[ub]32", ptx)) for op in ("ld", "st"))
    assert loads == (5 if unit_stride else 0)  # a group, and one where fewer than four remain
    assert stores == (loads if name == "logits_to_gradient" else 0)


def test_no_kernel_is_missing_or_unknown(compiled: Compiled) -> None:
    assert len(compiled.ptx) == len(compiled.ptxas) == len(VARIANTS)


def test_launch_functions_are_exported(compiled: Compiled) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    symbols = subprocess.run(["nm", "-C", compiled.object_file], capture_output=True, text=True, check=True).stdout
    for name in ("launch_logit_statistics", "launch_logits_to_gradient"):
        assert re.search(rf" T illada::{name}\(illada::LogitMatrix const&, long const\*", symbols), symbols
