"""Process groups: torch.distributed and megatron-core's model-parallel state, on gloo (CPU) or NCCL (CUDA)."""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from illada_megatron.config import ConfigError, RunConfig
from illada_megatron.config.layout import Layout, choose_layout, resolve_layout
from illada_megatron.runtime import cpu_adaptor, loopback
from illada_megatron.runtime.determinism import make_deterministic
from illada_megatron.runtime.device import Device, select_device, set_threads
from illada_megatron.runtime.megatron import import_megatron
from illada_megatron.runtime.process_groups import own_groups

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LEFT = "illada/ranks that have left"
_LEAVE_SECONDS = 30.0


@dataclass(frozen=True)
class Runtime:
    """This rank's place in the run."""

    device: Device
    layout: Layout
    rank: int
    data_parallel_rank: int
    context_parallel_rank: int
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """The rank that talks."""
        return self.rank == 0

    @property
    def world_size(self) -> int:
        return self.layout.world_size


def world_size_from_environment() -> int:
    """World size that torchrun or Slurm's launcher announced; 1 outside of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """This process's rank that torchrun or Slurm's launcher announced; 0 outside of them."""
    return int(os.environ.get("RANK", "0"))


def is_rank() -> bool:
    """Whether a launcher started this process as one rank of a run."""
    return "RANK" in os.environ


def end_with_launcher() -> None:
    """Where torch's agent started this rank: die with it. A rank that outlives its agent would train beside the one
    that takes its place (Linux; elsewhere nothing is done)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def configured_for(config: RunConfig, world_size: int) -> RunConfig:
    """The configuration with the first of parallel.layouts that fits. Raises ConfigError, with the reason for each,
    where none does."""
    try:
        return choose_layout(config, world_size).config
    except ValueError as error:
        raise ConfigError(str(error)) from error


@contextmanager
def runtime(config: RunConfig) -> Iterator[Runtime]:
    """Join the run: device, process groups, megatron-core's state. Leaves them when the block ends; not where it ends
    with an error and there are other ranks: these would fail at once, and the launcher might end this one before it has
    said why. The connections end with the process.

    Raises ConfigError where the layout does not fit the world.
    """
    try:
        layout = resolve_layout(config, world_size_from_environment())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.training.deterministic:
        make_deterministic()
    import_megatron()
    device = select_device(config)
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)
    else:
        cpu_adaptor.install()
        set_threads(config.runtime)
    _init_torch_distributed(config, device)
    try:
        yield _init_megatron(config, layout, device)
    except BaseException:
        if layout.world_size == 1:
            _leave()
        raise
    _leave()


def _leave() -> None:
    from megatron.core import parallel_state

    store, rank, size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    if size > 1:
        _let_the_others_go_first(store, rank, size)


def _let_the_others_go_first(store: dist.Store, rank: int, size: int) -> None:
    """Rank 0 holds the store, unless an agent does: where it ended first, a rank that still hears from it what became
    of the last save, or NCCL's monitor, would find the connection lost. Nobody waits long for a rank, or a store, that
    does not answer."""

    def leave() -> None:
        with contextlib.suppress(dist.DistError):  # whoever held it has ended: nobody has to be waited for
            until = time.monotonic() + _LEAVE_SECONDS
            while store.add(_LEFT, int(rank != 0)) < size - 1 and rank == 0 and time.monotonic() < until:
                time.sleep(0.02)

    # the store's own timeout does not end a call whose answer does not come
    thread = threading.Thread(target=leave, name="leaving", daemon=True)
    thread.start()
    thread.join(_LEAVE_SECONDS)


def allow_many_files() -> None:
    """Raise this process's limit of open files to what it may have at most: gloo's group of a whole run connects every
    rank to every other, a socket each, and the usual limit of 1,024 is reached at 1,024 ranks."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError):  # macOS says "unlimited" and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _init_torch_distributed(config: RunConfig, device: Device) -> None:
    allow_many_files()
    backend = "nccl" if device.is_cuda else "gloo"
    timeout = timedelta(minutes=config.runtime.distributed_timeout_minutes)
    if config.faults.watchdog_seconds is not None:
        # torch keeps so many collectives for the watchdog's report; read when the first process group is made
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        if device.is_cuda and config.run_dir is not None:
            # where NCCL's own watchdog leaves the same when a collective takes longer than its timeout
            os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{config.run_dir}/traces/nccl_rank_")
            with contextlib.suppress(OSError):
                Path(config.run_dir, "traces").mkdir(parents=True, exist_ok=True)
    if is_rank():
        store = loopback.store_of_one_machine(timeout)  # None: torch makes it, of the same variables
        if store is not None:
            loopback.keep_gloo_on_this_machine()
        dist.init_process_group(
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=world_size_from_environment(),
            timeout=timeout,
            # no device_id: NCCL would make every group at once, and all ranks would take part in each
        )
    else:
        loopback.keep_gloo_on_this_machine()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _init_megatron(config: RunConfig, layout: Layout, device: Device) -> Runtime:
    # Imported here: the CPU adaptor has to be in place before megatron-core binds names of torch.cuda.
    from megatron.core import parallel_state, tensor_parallel

    with own_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
            context_parallel_size=layout.context,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=config.runtime.distributed_timeout_minutes,
        )
    # No layer draws random numbers (no dropout, weights from `initial_weights`); megatron-core wants its states set.
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.seed)
    return Runtime(
        device=device,
        layout=layout,
        rank=dist.get_rank(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        is_first_stage=parallel_state.get_pipeline_model_parallel_rank() == 0,
        is_last_stage=parallel_state.get_pipeline_model_parallel_rank() == layout.pipeline - 1,
    )
