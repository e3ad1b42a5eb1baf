"""Lets megatron-core, which is written against CUDA, run on a CPU: the one place of this package that knows how.

megatron-core names the device as `torch.cuda.current_device()`, `device="cuda"` or `.cuda()`, keeps its random states
in `torch.cuda`, and recognises parameters by `Tensor.type()`. `install` redirects exactly these names to their CPU
meaning. Numbers are not touched: the same operators run, on CPU tensors. It is installed once, at start, and only
where no GPU is used; nothing else in the package asks whether it is.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")
_FACTORIES = (
    *("arange", "empty", "empty_like", "full", "full_like", "ones", "ones_like"),
    *("rand", "randint", "randn", "randperm", "tensor", "zeros", "zeros_like"),
)
_installed = False


def install() -> None:
    """Redirect the CUDA names that megatron-core uses. Calling it again does nothing."""
    global _installed
    if _installed:
        return
    _installed = True
    _redirect_devices()
    _redirect_random_states()
    _redirect_streams()
    _redirect_collectives()


def _redirect_devices() -> None:
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.set_device = _nothing()
    torch.cuda.empty_cache = _nothing()
    with torch.device("meta"):
        torch.empty(0)  # torch now lists the factories that obey a device context; wrapped ones it would not know
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)


def _redirect_random_states() -> None:
    redirected = {
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
        "manual_seed": torch.default_generator.manual_seed,  # torch.manual_seed calls this one in turn
        "manual_seed_all": torch.default_generator.manual_seed,
        "initial_seed": torch.initial_seed,
    }
    for name, function in redirected.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)
    torch.cuda.default_generators = _AnyDevice()
    _replace_lazy_call(torch.cuda)
    # The name is bound at import; megatron-core may have been imported before.
    if (module := sys.modules.get("megatron.core.tensor_parallel.random")) is not None:
        _replace_lazy_call(module)


def _redirect_streams() -> None:
    torch.cuda.synchronize = _nothing()
    torch.cuda.Stream = torch.cuda.Event = _Order
    torch.cuda.stream = _no_stream
    for name in ("current_stream", "default_stream"):
        setattr(torch.cuda, name, lambda *_, **__: _Order())
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _nothing())


def _redirect_collectives() -> None:
    """Of a distributed optimizer over one rank: its shard is the whole buffer."""
    names = {"reduce_scatter_tensor": "dist_reduce_scatter_func", "all_gather_into_tensor": "dist_all_gather_func"}
    # The names are bound at import; megatron-core may have been imported before.
    module = sys.modules.get("megatron.core.distributed.param_and_grad_buffer")
    for name, bound in names.items():
        redirected = _in_place(getattr(dist, name))
        setattr(dist, name, redirected)
        if module is not None:
            setattr(module, bound, redirected)


def _in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if output.data_ptr() != source.data_ptr() or output.numel() != source.numel():
            return collective(output, source, *args, **kwargs)
        # NCCL does nothing here; gloo copies the whole buffer, unless it is to all-reduce it, which means the same
        return dist.all_reduce(output, group=kwargs.get("group"), async_op=kwargs.get("async_op", False))

    return call


class _Order:
    """A stream or an event where everything already happens in order."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _noop(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = record_event = record = wait = synchronize = _noop

    def query(self) -> bool:
        return True


class _AnyDevice:
    """`torch.cuda.default_generators[any index]`: the CPU's generator."""

    def __getitem__(self, _: Any) -> torch.Generator:
        return torch.default_generator


def _replace_lazy_call(module: Any) -> None:
    module._lazy_call = lambda function, **_: function()
    module._lazy_init = _nothing()


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return call


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        # clip_grads and the optimizers compare with "torch.cuda.FloatTensor"
        return original(self).replace("torch.", "torch.cuda.", 1)

    return call


def _nothing() -> Callable[..., None]:
    # A new function each time: torch.compile, which megatron-core imports, refuses one object under two names.
    return lambda *_, **__: None


@contextlib.contextmanager
def _no_stream(*_: Any, **__: Any) -> Iterator[None]:
    yield
