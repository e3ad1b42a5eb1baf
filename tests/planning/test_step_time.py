"""What a step takes and sends, by hand."""

from dataclasses import replace

import pytest

from illada_megatron.config import load_config
from illada_megatron.planning import Candidate, load_device, step_time, workload
from illada_megatron.planning.layer_time import (
    attention_seconds,
    context_seconds,
    exposed_context,
    head_passes,
    layer_passes,
)
from illada_megatron.planning.memory import buffers, gradients
from illada_megatron.planning.step_time import buckets, exposed, gradient_rate, group_rate, stage_passes
from illada_megatron.planning.workload import stage_elements

H100 = load_device("h100")
WORK = workload(load_config("illada-8b"))
SENT = ("tensor", "context")


def layout(gpus: int, tensor: int = 1, context: int = 1, precision: str = "bf16") -> Candidate:
    return Candidate(gpus, tensor, 1, 1, context, 1, "none", precision, ((32,),))


def test_each_stage_takes_its_own_time() -> None:
    """An FP8 run whose first and last layer stay bf16, and whose last stage has the head."""
    one = Candidate(8, 1, 4, 1, 1, 1, "none", "fp8", ((7,), (9,), (9,), (7,)), "auto")
    fp8, bf16 = (layer_passes(WORK, one, H100, precision).total for precision in ("fp8", "bf16"))
    head = head_passes(WORK, one, H100).total
    found = [passes.total for passes in stage_passes(WORK, one, H100)]
    assert found == pytest.approx([6 * fp8 + bf16, 9 * fp8, 9 * fp8, 6 * fp8 + bf16 + head])
    parts = step_time(WORK, one, H100).parts
    assert parts["compute"].value == pytest.approx(one.microbatches(WORK.global_batch_size) * max(found))
    assert parts["bubble"].value == pytest.approx(sum(found) - max(found))


def test_gradients_that_ranks_add_up_themselves() -> None:
    """grad_reduce_in_bf16: each to each through a rank's own network card, and twice their bf16 besides the fp32."""
    summed, two, one = replace(WORK, sent_gradient_bytes=2), layout(16), layout(8)
    card = H100.network_bytes_per_second.value
    assert group_rate(two, H100) == gradient_rate(WORK, two, H100) == H100.node_bytes_per_second.value  # 8 cards
    assert gradient_rate(summed, two, H100) == pytest.approx(card * 15 / 8)
    assert gradient_rate(summed, one, H100) == H100.node_bytes_per_second.value
    held = stage_elements(WORK, two, 0).total
    assert [gradients(work, two, 0).value for work in (WORK, summed)] == [4 * held, 8 * held]
    assert gradients(summed, layout(1), 0).value == 4 * held  # nobody to exchange them with


def test_what_adding_gradients_up_takes() -> None:
    """Each read in fp32, written in bf16 beside the backward pass; then 16 ranks' bf16 read, and their sum written."""
    summed, one = replace(WORK, sent_gradient_bytes=2), layout(16)
    held, rate = stage_elements(WORK, one, 0).total, H100.memory_rate
    parts = step_time(summed, one, H100).parts
    assert parts["gradient sums"].value == pytest.approx(held * (4 + 2 + 2 + 4 / 16) / rate)
    longer = stage_passes(summed, one, H100)[0].backward.total + held * 6 / rate
    exchange = exposed(2 * held * 15 / 16, gradient_rate(summed, one, H100), longer, buckets(summed, one))
    assert parts["gradient exchange"].value == pytest.approx(exchange.value)
    assert step_time(WORK, one, H100).parts["gradient sums"].value == 0
    assert step_time(summed, layout(1), H100).parts["gradient sums"].value == 0


@pytest.mark.parametrize(("context", "size"), [(1, 64e6), (2, 40e6), (8, 40e6)])
def test_buckets_grow_with_data_parallel_ranks_alone(context: int, size: float) -> None:
    """Gradients are exchanged among all 64."""
    one = layout(64, context=context)
    assert buckets(WORK, one) == round(stage_elements(WORK, one, 0).total / size)


@pytest.mark.parametrize(
    ("precision", "ends", "bytes_"), [("bf16", None, 24), ("fp8", 0, 8 + 8), ("fp8", None, 8 + 8 + 24)]
)
def test_userbuffers_of_each_number_format(precision: str, ends: int | None, bytes_: int) -> None:
    """12 of a micro-batch, in FP8 8 of them of 1 byte; besides those of the layers that stay bf16, tensorwise's by
    default. And two communicators of 192 MiB, by which ranks find each other's."""
    layers = {"num_layers_at_start_in_bf16": ends, "num_layers_at_end_in_bf16": ends}
    one, plain = layout(8, tensor=2, precision=precision), replace(WORK, fp8=WORK.fp8.model_copy(update=layers))
    more = buffers(replace(plain, tp_comm_overlap=True), one).value - buffers(plain, one).value
    assert more == bytes_ * 8192 * WORK.model.hidden_size + 2 * 192 * 2**20


def test_userbuffers_are_counted_where_they_can_be() -> None:
    one = layout(8, tensor=2)
    asked = replace(WORK, tp_comm_overlap=True)
    assert buffers(asked, layout(8)).value == buffers(WORK, layout(8)).value
    blockwise = replace(asked, fp8=asked.fp8.model_copy(update={"recipe": "blockwise"}))
    assert buffers(blockwise, one._replace(precision="fp8")).value == buffers(WORK, one).value


def test_recomputation_sends_again_what_it_repeats() -> None:
    """Full: a forward pass of 4 exchanges beside 4 and 6, a ring beside 3. Selective: the ring."""
    one = layout(16, tensor=2, context=2)
    none, selective, full = (
        step_time(WORK, one._replace(recompute=way), H100).sent for way in ("none", "selective", "full")
    )
    assert [selective[name] / none[name] for name in SENT] == pytest.approx([1.0, 4 / 3])
    assert [full[name] / none[name] for name in SENT] == pytest.approx([1.4, 4 / 3])


@pytest.mark.parametrize("way", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_tensor_parallel_communication_never_hides(way: str, precision: str) -> None:
    step = step_time(WORK, layout(8, tensor=8, precision=precision)._replace(recompute=way), H100)
    assert step.hidden == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("way", "forwards"), [("none", 1), ("selective", 2), ("full", 2)])
def test_what_hides_of_a_ring_between_machines(way: str, forwards: int) -> None:
    one = layout(16, context=16)._replace(recompute=way)
    attend, ring = attention_seconds(WORK, one, H100), context_seconds(WORK, one, H100)
    exposed = forwards * exposed_context(attend, ring, 16) + exposed_context(2.5 * attend, 2 * ring, 16)
    assert exposed > 0
    step = step_time(WORK, one, H100)
    rings = 32 * one.microbatches(WORK.global_batch_size)
    seen = rings * exposed + step.parts["gradient exchange"].value + step.parts["weight exchange"].value
    rate = group_rate(one, H100)
    all_ = rings * (forwards + 2) * ring + (step.sent["gradients"] + step.sent["weights"]) / rate
    assert step.hidden == pytest.approx(1 - seen / all_)
