"""A measuring process of the loss benchmark: one variant, one repetition at a time."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from benchmarks.loss.loss_cases import GEMMS, MEGATRON, LossCase, LossShape, Repetition
from benchmarks.measuring.processes import timed

if TYPE_CHECKING:
    import torch


def measure(connection: Connection, case: LossCase) -> None:
    """Answer with None, or with why the variant is missing; then "run" (with a masked share) with a Repetition, and
    "finish" with the environment."""
    import torch

    from benchmarks.loss.loss_variants import MissingError
    from benchmarks.measuring.arithmetic import environment

    torch.set_float32_matmul_precision(case.fp32_precision)
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    with _process_groups(case):
        try:
            repeat = _products(case) if case.variant == GEMMS else _loss(case)
        except MissingError as error:
            connection.send(str(error))
            return
        connection.send(None)
        while (command := connection.recv())[0] != "finish":
            connection.send(repeat(command[1]))
    name = torch.cuda.get_device_name() if case.device == "cuda" else "CPU"
    connection.send(environment(name))


@contextmanager
def _process_groups(case: LossCase) -> Iterator[None]:
    """megatron-core's state for a run of one rank, where it is asked for."""
    if not case.variant.startswith(MEGATRON):
        yield
        return
    warnings.filterwarnings("ignore", module=r"megatron\.")
    from illada_megatron.config import load_config
    from illada_megatron.runtime import runtime

    threads = [] if case.threads is None else [f"runtime.num_threads={case.threads}"]
    with runtime(load_config("tiny", [f"runtime.device={case.device}", *threads])):
        yield


def masked_rows(shape: LossShape, share: float) -> int:
    """How many of the rows are masked."""
    return round(share * shape.rows)


def _loss(case: LossCase) -> Callable[[float], Repetition]:
    """Forward and backward pass of a loss, with fresh gradients."""
    import torch

    from benchmarks.loss.loss_variants import make_loss
    from benchmarks.measuring.process_memory import PeakMemory

    on_cuda = case.device == "cuda"
    hidden, weight, labels, order = _tensors(case)
    loss = make_loss(case.variant, weight)

    def repeat(share: float) -> Repetition:
        loss_weight = torch.zeros(case.shape.rows, device=case.device)
        loss_weight[order[: masked_rows(case.shape, share)]] = 1 / share

        def run() -> float:
            hidden.grad = weight.grad = None
            total = loss(hidden, weight, labels, loss_weight)
            total.backward()
            return float(total.detach())  # waits for a GPU

        if on_cuda:  # its caching allocator was emptied for the others
            run()
        hidden.grad = weight.grad = None
        memory = PeakMemory(on_cuda)
        timing = timed(run)
        gradients = sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
        extra = memory.extra_bytes() - gradients
        hidden.grad = weight.grad = None
        if on_cuda:
            torch.cuda.empty_cache()
        return Repetition(timing, extra)

    return repeat


def _products(case: LossCase) -> Callable[[float], Repetition]:
    """The three matrix products of the masked rows."""
    import torch

    from benchmarks.measuring.arithmetic import DTYPES
    from benchmarks.measuring.products import LinearProducts

    shape = case.shape
    like = torch.empty(0, dtype=DTYPES[case.dtype], device=case.device)
    head = LinearProducts(1, shape.rows, shape.hidden_size, shape.vocab_size, like)

    def repeat(share: float) -> Repetition:
        def run() -> None:
            rows = masked_rows(shape, share)
            head.forward(rows=rows)
            head.backward(rows=rows)
            if case.device == "cuda":
                torch.cuda.synchronize()

        return Repetition(timed(run), None)

    return repeat


def _tensors(case: LossCase) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]":
    """hidden [n, h] as a norm leaves it, weight [v, h] as embeddings begin, labels [n], and an order of the rows [n]:
    the same numbers in every process."""
    import torch

    from benchmarks.measuring.arithmetic import DTYPES

    shape, dtype = case.shape, DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(1234)
    hidden = torch.randn(shape.rows, shape.hidden_size, generator=generator)
    labels = torch.randint(shape.vocab_size, (shape.rows,), generator=generator)
    order = torch.randperm(shape.rows, generator=generator)
    weight = torch.empty(shape.vocab_size, shape.hidden_size)
    weight.normal_(std=(2 * shape.hidden_size) ** -0.5, generator=generator)
    trained = [x.to(case.device, dtype).requires_grad_() for x in (hidden, weight)]
    return trained[0], trained[1], labels.to(case.device), order.to(case.device)
