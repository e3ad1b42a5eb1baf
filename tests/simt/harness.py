"""Builds CUDA sources for the CPU machine of machine.h and calls them with memory that is guarded on one side."""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

HERE = Path(__file__).parent
CUDA_SOURCES = HERE.parents[1] / "csrc" / "masked_cross_entropy"
FLAGS = (
    *("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared"),
    # Undefined behaviour stops at a trap instruction, which the machine reports as a fault: no library is needed
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"),
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks, which is how the machine switches threads
)
# LogitType of cuda_kernels.h
LOGIT_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class FaultError(Exception):
    """What the machine found that a device would leave undefined, or the error that a launch function returned."""


class LogitMatrix(ctypes.Structure):
    """LogitMatrix of cuda_kernels.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Layout:
    """Where logits [m, v] lie: strides and the number of elements before the first of them, in elements."""

    row_stride: int
    column_stride: int = 1
    offset: int = 0
    guard_after: bool = True  # the inaccessible page follows the last element; else it precedes the first


@cache
def machine() -> "Machine":
    """Compiles once a session; skips the test where there is no C++ compiler."""
    return Machine()


class Machine:
    """The kernels, compiled for the host; `machine` has one that all tests share."""

    def __init__(self) -> None:
        compiler = shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("needs g++ or clang++ to compile the kernels for the host")
        self.directory = tempfile.TemporaryDirectory(prefix="simt-")
        library = Path(self.directory.name) / "libsimt.so"
        sources = [HERE / name for name in ("machine.cpp", "machine_abi.cpp", "masked_cross_entropy_abi.cpp")]
        includes = [f"-I{folder}" for folder in (HERE / "include", HERE, CUDA_SOURCES)]
        command = [compiler, *FLAGS, *includes, *map(str, sources), "-o", str(library)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{built.stderr}")
        self.library = ctypes.CDLL(str(library))
        self.library.simt_memory.restype = ctypes.c_void_p
        self.library.simt_memory_data.restype = ctypes.c_void_p

    def set_order(self, order: int) -> None:
        """0: threads run in order; 1: backwards; else the seed of a random order."""
        self.library.simt_set_order(ctypes.c_uint64(order))

    def call(self, name: str, *arguments: Any) -> None:
        """Calls simt_NAME; tensors become pointers. Raises FaultError."""
        function = getattr(self.library, f"simt_{name}")
        function.restype = ctypes.c_char_p
        pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
        if message := function(*pointers):
            raise FaultError(message.decode())

    @contextmanager
    def memory(self, size_bytes: int, guard_after: bool = True) -> Iterator[int]:
        """The address of that many bytes with an inaccessible page at one end."""
        memory = ctypes.c_void_p(self.library.simt_memory(ctypes.c_size_t(size_bytes), ctypes.c_bool(guard_after)))
        try:
            yield self.library.simt_memory_data(memory)
        finally:
            self.library.simt_memory_free(memory)

    @contextmanager
    def placed(self, logits: Tensor, layout: Layout) -> Iterator[tuple[LogitMatrix, np.ndarray]]:
        """`logits` at their layout, and a view of their bits there. What lies between them is NaN, and must stay it."""
        (m, v), item = logits.shape, logits.element_size()
        bits = logits.contiguous().view({2: torch.uint16, 4: torch.uint32}[item]).numpy()
        reach = [(n - 1) * s for n, s in ((m, layout.row_stride), (v, layout.column_stride)) if n > 0]
        lowest, highest = sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach)
        size = (layout.offset + highest - lowest + 1) * item if m * v else 0
        with self.memory(size, layout.guard_after) as address:
            first = address + (layout.offset - lowest) * item
            matrix = LogitMatrix(first, LOGIT_TYPES[logits.dtype], m, v, layout.row_stride, layout.column_stride)
            everything = np.frombuffer((ctypes.c_char * size).from_address(address), bits.dtype)
            inside = everything[layout.offset - lowest :] if m * v else everything
            view = as_strided(inside, (m, v), (layout.row_stride * item, layout.column_stride * item))
            if size < 1 << 30:  # larger ones are address space, of which only the logits' pages exist
                everything[:] = np.iinfo(bits.dtype).max
            view[:] = bits
            yield matrix, view
            if size < 1 << 30:
                view[:] = np.iinfo(bits.dtype).max
                assert (everything == np.iinfo(bits.dtype).max).all(), "something beside the logits was overwritten"

    def logit_statistics(self, logits: Tensor, targets: Tensor, softcap: float, layout: Layout) -> Tensor:
        """The operator illada::logit_statistics, on logits that lie as `layout` says."""
        statistics = torch.full((3, logits.shape[0]), 777.0)
        with self.placed(logits, layout) as (matrix, view):
            before = view.copy()
            self.call("logit_statistics", ctypes.byref(matrix), targets, ctypes.c_float(softcap), statistics)
            assert (view == before).all(), "the statistics changed the logits"
        return statistics

    def logits_to_gradient(
        self, logits: Tensor, targets: Tensor, row_values: Tensor, softcap: float, layout: Layout
    ) -> Tensor:
        """What illada::logits_to_gradient_ makes of the logits; row_values as there."""
        with self.placed(logits, layout) as (matrix, view):
            self.call("logits_to_gradient", ctypes.byref(matrix), targets, row_values, ctypes.c_float(softcap))
            return torch.from_numpy(view.copy()).view(logits.dtype)
