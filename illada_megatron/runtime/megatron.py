"""How megatron-core is imported: it takes what is installed for usable, and what is not needed for needed."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from illada_megatron.runtime.device import apex_problem, has_transformer_engine, transformer_engine_problem
from illada_megatron.system.process import search_garbage_as_usual

# What torch and megatron-core 0.19 advise each process's user of, who can do nothing about it: by logger, its beginning
_NOT_FOR_USERS = {
    "torch.utils.cpp_extension": "No CUDA runtime is found",
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}


def import_megatron() -> None:
    """Import megatron-core for the first time. A Transformer Engine or an Apex that does not load would end its import
    (it catches ImportError alone, and asks what it imported for its version): it is hidden from all of this process.

    Without the compiler where there is no GPU: megatron-core's fusions are applied to functions while they are
    imported, no CPU run uses them, and the compiler's import is a fifth of a process's start. megatron-core's own
    switch is in a module whose package has applied it already when it is imported. Without wandb too, which
    megatron-core imports for timers and an inference engine that are not used here: a tenth of a start.
    """
    for name, beginning in _NOT_FOR_USERS.items():
        logging.getLogger(name).addFilter(partial(_is_for_users, beginning))
    for package, problem in (("transformer_engine", transformer_engine_problem()), ("apex", apex_problem())):
        if problem is not None:
            _hide(package)
    with _without_wandb():
        _import_core()
    search_garbage_as_usual()


@contextmanager
def _without_wandb() -> Iterator[None]:
    """A board that a run asks for imports it later."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["wandb"]


def _import_core() -> None:
    if torch.cuda.is_available():
        import megatron.core  # noqa: F401

        _bind_split()
        return
    compile_, torch.compile = torch.compile, _uncompiled  # type: ignore[assignment]
    try:
        from megatron.core.jit import disable_jit_fuser
    finally:
        torch.compile = compile_
    disable_jit_fuser()


def _bind_split() -> None:
    """Give megatron-core Transformer Engine's split into queries, keys and values, whose gradients need no copy: up to
    0.19 it looks for `_SplitAlongDim`, which Transformer Engine (2.11) has under another name."""
    if not has_transformer_engine():
        return
    from megatron.core.transformer import attention

    if attention.SplitAlongDim is None:
        with suppress(ImportError):  # it may move again; the split is done in torch then
            from transformer_engine.pytorch.utils import SplitAlongDim

            attention.SplitAlongDim = SplitAlongDim.apply


def _is_for_users(beginning: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(beginning)


def _hide(package: str) -> None:
    """From now on importing it is a ModuleNotFoundError, and it is not found by those who look for it."""
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]


def _uncompiled(function: Any = None, **_: Any) -> Any:
    """torch.compile, called or as a decorator with options, that leaves everything as it is."""
    return _uncompiled if function is None else function
