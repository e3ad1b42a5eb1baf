"""Gradients that travel in bf16: half of the bytes, summed in fp32, and the same training to bf16's 8 bits."""

import pytest
import torch
import torch.distributed as dist
from launch import TrainOnce
from ranks import run_ranks
from test_layouts import BF16, BUCKETS, OVERLAP

from illada_megatron.config import ConfigError, load_config
from illada_megatron.runtime import runtime

IN_BF16 = "parallel.grad_reduce_in_bf16=true"
_ELEMENTS = 1000


def _gradient(rank: int) -> torch.Tensor:
    return torch.randn(3 * _ELEMENTS, generator=torch.Generator().manual_seed(rank))


def _sums(rank: int, arguments: tuple[str, ...]) -> None:
    with runtime(load_config(None, [*arguments, "training.global_batch_size=6"])):
        from illada_megatron.training.gradient_reduction import reduce_scatter_in_bf16

        exact = sum(_gradient(one).bfloat16().double() for one in range(3))
        assert isinstance(exact, torch.Tensor)
        mine = slice(rank * _ELEMENTS, (rank + 1) * _ELEMENTS)
        for async_op in (False, True):
            source = _gradient(rank)
            output = source[mine]  # DDP's is a view of the buffer
            work = reduce_scatter_in_bf16(output, source, dist.ReduceOp.SUM, dist.group.WORLD, async_op)
            assert (work is not None) == async_op
            if work is not None:
                work.wait()
            # every part rounded once, as bf16 has it; their sum by no more than fp32 does
            torch.testing.assert_close(output.double(), exact[mine], rtol=1e-6, atol=1e-6)
            others = torch.ones(3 * _ELEMENTS, dtype=torch.bool)
            others[mine] = False
            assert torch.equal(source[others], _gradient(rank)[others])


def test_parts_are_rounded_and_their_sum_is_not(tiny_run: tuple[str, ...]) -> None:
    run_ranks(_sums, 3, tiny_run)


def test_trains_as_fp32_does(train_once: TrainOnce) -> None:
    """Overlapped with the backward pass, in a bucket nearly for each weight."""
    run, reference = train_once(2, IN_BF16, *OVERLAP, BUCKETS), train_once(1)
    differences = [
        abs(ours["masked_cross_entropy"] / theirs["masked_cross_entropy"] - 1.0)
        for ours, theirs in zip(run.steps, reference.steps, strict=True)
    ]
    assert max(differences) < 0.01
    assert max(differences) > 1e-6  # else they travelled in fp32
    norms = [step["grad_norm"] for step in run.steps]
    assert norms == pytest.approx([step["grad_norm"] for step in reference.steps], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1,), (2,), (4, "parallel.tensor_model_parallel_size=2", *OVERLAP)], ids=str)
def test_in_more_layouts(layout: tuple[int, *tuple[str, ...]], train_once: TrainOnce) -> None:
    """One data-parallel rank has nobody to send to, and rounds nothing."""
    run, reference = train_once(*layout, IN_BF16, BF16), train_once(1, BF16)
    for ours, theirs in zip(run.steps, reference.steps, strict=True):
        assert ours["masked_cross_entropy"] == pytest.approx(
            theirs["masked_cross_entropy"], rel=0.0 if layout == (1,) else 0.02
        )


def test_gloo_does_not_average() -> None:
    from illada_megatron.model import build_model_chunks

    config = load_config("tiny", ["runtime.device=cpu", "parallel.ddp_average_in_collective=true"])
    with runtime(config) as run:
        from illada_megatron.training.gradient_reduction import wrap_data_parallel

        with pytest.raises(ConfigError, match="gloo, which the ranks use on CPUs"):
            wrap_data_parallel(config.parallel, build_model_chunks(config, run.device))


def test_what_ddp_and_the_layers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fields that change no loss."""
    from illada_megatron.model import build_model_chunks

    fields = ["runtime.device=cpu", "training.deterministic=true", "parallel.ddp_average_in_collective=true"]
    config = load_config("tiny", [*fields, "parallel.ddp_pad_buckets_for_high_nccl_busbw=true"])
    with runtime(config) as run:
        from illada_megatron.training.gradient_reduction import wrap_data_parallel

        monkeypatch.setattr(dist, "get_backend", lambda *_: "nccl")
        (chunk,) = wrap_data_parallel(config.parallel, build_model_chunks(config, run.device))
        monkeypatch.undo()
        assert chunk.ddp_config.average_in_collective
        assert chunk.ddp_config.pad_buckets_for_high_nccl_busbw
        assert chunk.config.deterministic_mode
