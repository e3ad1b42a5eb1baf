"""The result does not depend on the layout: losses, gradient norms and held-out figures of 20 steps, real ranks."""

import math
import re
from typing import Any

import pytest
from launch import Run, TrainOnce

RELATIVE = 1e-4
TP2 = "parallel.tensor_model_parallel_size=2"
PP2 = "parallel.pipeline_model_parallel_size=2"
PP4 = "parallel.pipeline_model_parallel_size=4"
INTERLEAVED = "parallel.virtual_pipeline_model_parallel_size=2"
SEQUENCE = "parallel.sequence_parallel=true"
PLAIN = "parallel.use_distributed_optimizer=false"
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
BUCKETS = "parallel.ddp_bucket_size=1000"  # nearly one a weight
UNEVEN = 'parallel.pipeline_layout="Ettt|tL"'
PADDED_BUCKETS = "parallel.ddp_pad_buckets_for_high_nccl_busbw=true"
DETERMINISTIC = "training.deterministic=true"
FULL, SELECTIVE = "training.recompute=full", "training.recompute=selective"
UNTIED = "model.tie_word_embeddings=false"
RAMP_UP = "training.rampup_batch_size=[4,2,24]"
CP2 = "parallel.context_parallel_size=2"
BF16 = "training.precision=bf16"
QKV_BIAS = "model.add_qkv_bias=true"
PAD = "training.pad_global_batch=true"  # batches of 8 in 9 or 12 places
# of the noise and the loss, together; the mask's row of the head is on the first tensor-parallel rank
PAIRS = (
    *("diffusion.complementary_masks=true", "diffusion.t_per=segment", "diffusion.split_probability=0.6"),
    *("diffusion.loss_weight=clipped", "diffusion.max_loss_weight=3.0", "model.exclude_mask_logit=true"),
    *("training.init_seed=1", "training.data_seed=2", "training.noise_seed=3"),
)
COSINE = (
    *("diffusion.noise_schedule=cosine", "diffusion.loss_weight=unweighted", "diffusion.mask_sampling=exact_count"),
    *("diffusion.t_min=0.1", "diffusion.attention_boundary=document", "diffusion.t_per=segment"),
    *("model.exclude_mask_logit=true", "model.mask_token_id=249", "model.logit_softcap=4.0"),
)

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DP1, plain optimizer": (1, (PLAIN,)),
    "DP1, micro-batches of 4": (1, ("training.micro_batch_size=4",)),
    "DP2": (2, ()),
    "DP2, overlapped": (2, OVERLAP),
    "PP2, overlapped": (2, (PP2, *OVERLAP)),
    "TP2, sequence parallel": (2, (TP2, SEQUENCE)),
    "PP2, interleaved, recomputed": (2, (PP2, INTERLEAVED, FULL)),
    "DP3, filled up": (3, (PAD,)),
    "PP2, uneven": (2, (PP2, UNEVEN)),
    "CP2": (2, (CP2,)),
    "TP2 PP2": (4, (TP2, PP2)),
}
MORE_LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "DP2, padded buckets, deterministic": (2, (*OVERLAP, PADDED_BUCKETS, DETERMINISTIC)),
    "CP2 TP2, sequence parallel": (4, (CP2, TP2, SEQUENCE)),
    "TP2": (2, (TP2,)),
    "PP2": (2, (PP2,)),
    "PP4": (4, (PP4,)),
    "PP4 DP2, overlapped": (8, (PP4, *OVERLAP)),
    "DP2, plain optimizer": (2, (PLAIN,)),
    "DP2, overlapped in small buckets": (2, (*OVERLAP, BUCKETS)),
    "PP2 DP2, overlapped in small buckets": (4, (PP2, *OVERLAP, BUCKETS)),
    "PP2, interleaved": (2, (PP2, INTERLEAVED)),
    "TP2 PP2 DP2": (8, (TP2, PP2)),
    "TP2 PP2, deterministic": (4, (TP2, PP2, SEQUENCE, DETERMINISTIC)),
    "PP2 DP3, interleaved, filled up": (6, (PP2, INTERLEAVED, PAD)),
    "CP2 PP2, overlapped": (4, (CP2, PP2, *OVERLAP)),
    "CP2 DP2": (4, (CP2,)),
    "CP4, plain optimizer": (4, ("parallel.context_parallel_size=4", PLAIN)),
    "CP2 PP2 DP2, interleaved, recomputed": (8, (CP2, PP2, INTERLEAVED, FULL)),
    "CP2, micro-batches of 4": (2, (CP2, "training.micro_batch_size=4")),
    "TP2, selective recomputation": (2, (TP2, SELECTIVE)),
    "TP2, sequence parallel, recomputed": (2, (TP2, SEQUENCE, FULL)),
    "TP2 PP2 DP2, plain optimizer": (8, (TP2, PP2, PLAIN)),
    "TP2 PP2 DP2, everything on": (8, (TP2, PP2, INTERLEAVED, SEQUENCE, SELECTIVE, *OVERLAP)),
}


def assert_same_training(found: list[dict[str, Any]], expected: list[dict[str, Any]], relative: float) -> None:
    """Every number of every step that a layout could change."""
    assert [step["step"] for step in found] == [step["step"] for step in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("loss", "masked_cross_entropy", "grad_norm", "lr"):
            assert ours[name] == pytest.approx(theirs[name], rel=relative), (ours["step"], name)
        assert ours["cross_entropy_by_t"] == [
            None if value is None else pytest.approx(value, rel=relative) for value in theirs["cross_entropy_by_t"]
        ], ours["step"]
        assert ours["bound"] == (None if theirs["bound"] is None else pytest.approx(theirs["bound"], rel=relative))
        for name in ("consumed_samples", "consumed_tokens", "epochs"):
            assert ours[name] == theirs[name], (ours["step"], name)


def _different(ours: list[float], theirs: list[float]) -> int:
    """How many pairs are farther apart than ten times what a layout may change."""
    return sum(abs(a / b - 1.0) > 10 * RELATIVE for a, b in zip(ours, theirs, strict=True))


def held_out(run: Run) -> list[tuple[float, float]]:
    """(bound, standard error) of each validation, at the four decimals of the terminal."""
    pattern = r"held-out bound (\S+) \+- (\S+) nats/token  \(160 tokens\)"
    return [(float(bound), float(error)) for bound, error in re.findall(pattern, run.process.stdout)]


def assert_same_held_out(found: Run, expected: Run) -> None:
    assert len(held_out(expected)) == 2
    for ours, theirs in zip(held_out(found), held_out(expected), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)  # the last decimal may round either way


def test_the_compared_numbers_move(train_once: TrainOnce) -> None:
    """The comparisons below mean something: the run learns, it clips, another step or seed has other numbers (in a few
    of 20 they may come near by chance)."""
    run, other = train_once(1), train_once(1, "training.seed=7")
    ce = [step["masked_cross_entropy"] for step in run.steps]
    assert len(ce) == 20
    assert sum(ce[-5:]) / 5 < ce[0] - 1.0
    assert ce[0] == pytest.approx(math.log(250), rel=0.2)  # untrained: nearly uniform over the unpadded vocabulary
    assert sum(step["grad_norm"] > 0.5 for step in run.steps) > 15  # optimizer.clip_grad
    for name in ("loss", "masked_cross_entropy", "grad_norm"):
        values = [step[name] for step in run.steps]
        assert _different(values, values[1:] + values[:1]) > 15, name
        assert _different(values, [step[name] for step in other.steps]) > 15, name
    buckets = [bucket for step in run.steps for bucket in step["cross_entropy_by_t"] if bucket is not None]
    assert len(buckets) > 80
    (bound, _), (later_bound, error) = held_out(run)
    assert later_bound < bound
    assert 0 < error < 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_in_every_layout(layout: str, train_once: TrainOnce) -> None:
    """A gradient reduced twice or not at all, a shard initialised otherwise, data or noise that depend on the rank, a
    stage that skips a micro-batch: each shows within 20 clipped steps."""
    run, reference = train_once(LAYOUTS[layout][0], *LAYOUTS[layout][1]), train_once(1)
    assert_same_training(run.steps, reference.steps, RELATIVE)
    assert_same_held_out(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE_LAYOUTS)
def test_same_losses_in_more_layouts(layout: str, train_once: TrainOnce) -> None:
    """Combinations whose parts the test above covers one by one."""
    run, reference = train_once(MORE_LAYOUTS[layout][0], *MORE_LAYOUTS[layout][1]), train_once(1)
    assert_same_training(run.steps, reference.steps, RELATIVE)
    assert_same_held_out(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, CP2), (4, CP2, PP2), (4, CP2, TP2, SEQUENCE)], ids=str)
def test_documents_over_context_parallel_ranks(layout: tuple[Any, ...], train_once: TrainOnce) -> None:
    """Rows of unlike length, which stages ask each other for; segments shorter than a rank's chunks."""
    reference = train_once(1, *COSINE)
    assert_same_training(train_once(*layout, *COSINE).steps, reference.steps, RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ['"Et|tt|tt|tL"', "auto"])
def test_uneven_and_interleaved_stages(layout: str, train_once: TrainOnce) -> None:
    """Layers under other numbers would begin with other weights. auto: the head of a narrow model is several layers."""
    reference = train_once(1, "model.num_layers=6")
    split = (PP2, INTERLEAVED, f"parallel.pipeline_layout={layout}", "model.num_layers=6")
    run = train_once(4, TP2, *split)
    assert_same_training(run.steps, reference.steps, RELATIVE)
    assert_same_held_out(run, reference)
    assert "0: 3 layers (1 + 2)" in run.process.stdout or layout == "auto"


def test_head_in_a_bucket_of_its_own(train_once: TrainOnce) -> None:
    """Its weights are gathered while the layers compute: the loss has to wait for them, or megatron-core's DDP ends the
    second step, where the next gather meets one that nobody has waited for."""
    reference = train_once(1, UNTIED)
    assert_same_training(train_once(2, *OVERLAP, BUCKETS, UNTIED).steps, reference.steps, RELATIVE)


@pytest.mark.slow
def test_untied_head(train_once: TrainOnce) -> None:
    """A head of its own: no embedding gradient to exchange between the first and the last stage. Overlapped: DDP waits
    for a gradient of the head, which is in main_grad already, and must not add what it is handed."""
    reference = train_once(1, UNTIED)
    for layout in ((PP2,), (PP2, *OVERLAP), OVERLAP):
        assert_same_training(train_once(2, *layout, UNTIED).steps, reference.steps, RELATIVE)
    untied, tied = ([step["loss"] for step in run.steps] for run in (reference, train_once(1)))
    assert _different(untied, tied) > 15


def test_implementations_of_the_loss(train_once: TrainOnce) -> None:
    """The reference in torch and the compiled passes train alike, on one rank and over a cut vocabulary."""
    run = train_once(2, TP2, "loss.implementation=reference")
    assert "cross-entropy, reference" in run.process.stdout
    assert "cross-entropy, fused" in train_once(1).process.stdout
    assert_same_training(run.steps, train_once(1).steps, RELATIVE)


def test_exchanges_beside_computing(train_once: TrainOnce) -> None:
    """What is sent must stay as it is until it has arrived, and what is received is waited for."""
    run = train_once(2, PP2, INTERLEAVED, "parallel.overlap_p2p_comm=true")
    assert_same_training(run.steps, train_once(1).steps, RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("overlapped", ["true", "false"])
def test_exchanges_of_interleaved_stages(overlapped: str, train_once: TrainOnce) -> None:
    """Four ranks with two chunks each: a chunk's neighbours are two ranks, and the last one's is the first."""
    deep = "model.num_layers=8"
    run = train_once(4, PP4, INTERLEAVED, deep, f"parallel.overlap_p2p_comm={overlapped}")
    assert_same_training(run.steps, train_once(1, deep).steps, RELATIVE)


@pytest.mark.slow
def test_z_loss_and_softcap(train_once: TrainOnce) -> None:
    """They change what is learned, alike in every layout."""
    options = ("loss.z_loss=0.1", "model.logit_softcap=2.0")
    reference = train_once(1, *options)
    assert_same_training(train_once(2, TP2, SEQUENCE, *options).steps, reference.steps, RELATIVE)
    changed, plain = ([step["loss"] for step in run.steps] for run in (reference, train_once(1)))
    assert _different(changed, plain) > 15


def test_noise_and_loss_of_another_kind(train_once: TrainOnce) -> None:
    """Pairs of samples, segments' times that the last stage's metrics need, weights beside those of the bound, a head
    whose mask row one rank leaves out. With a seed for each kind of draw training.seed plays no part."""
    reference, plain = train_once(1, *PAIRS), train_once(1)
    assert_same_training(train_once(4, TP2, PP2, *PAIRS, "training.seed=99").steps, reference.steps, RELATIVE)
    losses, others = ([step["loss"] for step in run.steps] for run in (reference, plain))
    assert _different(losses, others) > 15
    assert _different(losses, [step["bound"] for step in reference.steps]) > 10
    assert others == [step["bound"] for step in plain.steps]
    assert "weights clipped at 3" in reference.process.stdout
    assert "(reweighted)  bound" in reference.process.stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [PAIRS, COSINE], ids=["pairs", "cosine"])
@pytest.mark.parametrize("layout", [(2,), (4, PP4), (3, PAD), (8, TP2, PP2), (2, TP2, SEQUENCE)], ids=str)
def test_noise_and_loss_in_more_layouts(
    layout: tuple[Any, ...], options: tuple[str, ...], train_once: TrainOnce
) -> None:
    """Two ranks have a pair's samples; a middle stage draws the segments without the tokens; empty places count
    nowhere."""
    reference = train_once(1, *options)
    assert_same_training(train_once(*layout, *options).steps, reference.steps, RELATIVE)
    assert (reference.steps[0]["bound"] is None) == (options is COSINE)  # a part of the range of t


@pytest.mark.slow
def test_qkv_biases(train_once: TrainOnce) -> None:
    """They are learned, alike where each rank has its part of them and layers are computed again."""
    reference, plain = train_once(1, QKV_BIAS), train_once(1)
    assert_same_training(train_once(2, TP2, SEQUENCE, FULL, QKV_BIAS).steps, reference.steps, RELATIVE)
    assert reference.steps[0]["loss"] == plain.steps[0]["loss"]  # they begin at 0
    norms = ([step["grad_norm"] for step in run.steps] for run in (reference, plain))
    assert _different(*norms) > 10


@pytest.mark.slow
def test_batch_ramp_up(train_once: TrainOnce) -> None:
    """Batches of 4, 6, then 8 samples: the same samples in the same steps on one rank and on two."""
    reference = train_once(1, RAMP_UP)
    consumed = [step["consumed_samples"] for step in reference.steps]
    sizes = [end - start for start, end in zip([0, *consumed], consumed, strict=False)]
    assert sizes == [4] * 3 + [6] * 2 + [8] * 15
    assert_same_training(train_once(2, RAMP_UP).steps, reference.steps, RELATIVE)


def test_bf16_stays_near_fp32(train_once: TrainOnce) -> None:
    """bf16 with fp32 main weights learns the same, in a layout too, to the precision of its 8 bits."""
    run, reference = train_once(2, TP2, SEQUENCE, BF16), train_once(1)
    differences = [
        abs(ours["masked_cross_entropy"] / theirs["masked_cross_entropy"] - 1.0)
        for ours, theirs in zip(run.steps, reference.steps, strict=True)
    ]
    assert max(differences) < 0.02
    assert max(differences) > 1e-5  # else it was computed in fp32 after all
