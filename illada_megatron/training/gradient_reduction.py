"""How the gradients of the data-parallel ranks are brought together: megatron-core's DDP, and what travels in it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    param_and_grad_buffer,
)
from torch import Tensor

from illada_megatron.config import ConfigError, ParallelConfig
from illada_megatron.model import MaskPredictor


def wrap_data_parallel(parallel: ParallelConfig, models: Sequence[MaskPredictor]) -> list[DistributedDataParallel]:
    """megatron-core's DDP around each chunk, and the hooks its schedules look for in the model's configuration.

    Raises ConfigError where the device has no collective for what is asked.
    """
    if parallel.ddp_average_in_collective and dist.get_backend() == "gloo":
        raise ConfigError(
            "parallel.ddp_average_in_collective true: gloo, which the ranks use on CPUs, adds up but does not average; "
            "set it to false"
        )
    # the gradients' buffer is fp32 in any case: megatron-core's own bf16 would round every micro-batch's sum
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        reduce_scatter_with_fp32_accumulation=parallel.grad_reduce_in_bf16,
        average_in_collective=parallel.ddp_average_in_collective,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        pad_buckets_for_high_nccl_busbw=parallel.ddp_pad_buckets_for_high_nccl_busbw,
        fp8_param_gather=models[0].config.fp8_param,
    )
    if parallel.grad_reduce_in_bf16:
        # by this name, bound at its import, DDP finds what its option asks for
        param_and_grad_buffer.reduce_scatter_with_fp32_accumulation = reduce_scatter_in_bf16
    core = models[0].config
    chunks = [
        DistributedDataParallel(core, ddp_config, model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    core.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        core.no_sync_func = no_sync[0] if len(no_sync) == 1 else no_sync
    return chunks


class _Summing:
    """A reduce-scatter under way. wait() ends it: the ranks' parts are added in fp32."""

    def __init__(self, work: Any, sent: Tensor, received: Tensor, output: Tensor) -> None:
        self._work, self._sent, self._received, self._output = work, sent, received, output

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        torch.sum(self._received, dim=0, dtype=torch.float32, out=self._output)


class _Done:
    """Of a group of one rank."""

    def wait(self) -> None: ...


def reduce_scatter_in_bf16(
    output: Tensor, source: Tensor, op: dist.ReduceOp, group: dist.ProcessGroup, async_op: bool
) -> _Summing | _Done | None:
    """Reduce-scatter of fp32 gradients that travel in bf16: half of the bytes, each part rounded once, the sum over the
    ranks in fp32 and not rounded again.

    output [n] fp32: this rank's part of source [ranks * n] fp32, of which it may be a view. In the place of megatron-
    core's function of the same signature, which takes bf16 gradients, and rounds their sum. async_op: returns what has
    to be waited for.
    """
    assert op == dist.ReduceOp.SUM, op
    ranks = group.size()
    if ranks == 1:  # output is source
        return _Done() if async_op else None
    sent = source.to(torch.bfloat16)
    received = torch.empty_like(sent)
    # each rank is sent its part by all: as many bytes a rank as a ring's reduce-scatter
    work = dist.all_to_all_single(received, sent, group=group, async_op=async_op)
    summing = _Summing(work, sent, received.view(ranks, -1), output)
    if async_op:
        return summing
    summing.wait()
    return None
