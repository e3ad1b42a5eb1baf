"""Training steps against a loop that anyone would write: torch's AdamW and clipping over the formula of the loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from illada_megatron.config import RunConfig, load_config
from illada_megatron.data.corpus.corpus import Corpus
from illada_megatron.diffusion import make_masked_batch
from illada_megatron.runtime import runtime

STEPS, BATCH, LENGTH = 4, 4, 32
LR, BETAS, EPS, DECAY, CLIP = 1e-2, (0.8, 0.9), 1e-5, 0.5, 0.7


def _plain_loop(config: RunConfig, model: torch.nn.Module) -> list[tuple[float, float, float]]:
    """(loss, masked CE, gradient norm) of each step; trains `model`."""
    from illada_megatron.model import pack

    corpus = Corpus(config.data.train_paths, LENGTH, seed=11, shuffle=True, vocab_size=250)
    decayed = [weight for weight in model.parameters() if weight.dim() > 1]
    kept = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": DECAY}, {"params": kept, "weight_decay": 0.0}], betas=BETAS, eps=EPS
    )
    figures = []
    for step in range(STEPS):
        samples = range(BATCH * step, BATCH * (step + 1))
        batch = make_masked_batch(corpus, samples, config.diffusion, config.model.mask_token_id, seed=11)
        logits = model.logits(model(batch.tokens.view(1, -1), pack(batch.cu_seqlens, batch.max_seqlen)))
        ce = F.cross_entropy(logits, batch.labels.view(-1), reduction="none")
        loss = (ce * batch.loss_weight.view(-1)).sum() / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 2)
        optimizer.step()
        figures.append((loss.item(), ce[batch.loss_weight.view(-1) > 0].mean().item(), norm.item()))
    return figures


def test_steps_equal_a_plain_loop(tiny_run: tuple[str, ...]) -> None:
    """What every layout could get wrong alike: the loss's denominator, a factor on the gradient, gradients kept from
    the step before, which weights decay, clipping, warm-up, settings that never reach the optimizer."""
    from illada_megatron.model import build_model_chunks, fill_initial_weights
    from illada_megatron.training import train_step
    from illada_megatron.training.setup import setup

    settings = (
        *(f"training.lr={LR}", "schedule.warmup_steps=2", "schedule.decay_start=never", "training.seed=11"),
        *(f"optimizer.adam_beta1={BETAS[0]}", f"optimizer.adam_beta2={BETAS[1]}", f"optimizer.adam_eps={EPS}"),
        *(f"optimizer.weight_decay={DECAY}", f"optimizer.clip_grad={CLIP}", "training.micro_batch_size=1"),
    )
    config = load_config(None, [*tiny_run, *settings])
    with runtime(config) as run:
        (plain,) = build_model_chunks(config, run.device)
        fill_initial_weights([plain], config.model, seed=11)
        before = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
        expected = _plain_loop(config, plain)
        state = setup(config, run)
        records = [train_step(state)[0] for _ in range(STEPS)]
        ours: dict[str, Tensor] = dict(state.chunks[0].module.named_parameters())

    figures = [(record.loss, record.masked_cross_entropy, record.grad_norm) for record in records]
    for found, wanted in zip(figures, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert min(norm for _, _, norm in expected) > CLIP
    assert ours.keys() == before.keys()
    for name, weight in plain.named_parameters():
        # Adam divides by the gradient's size: rounding of a near-zero one moves a weight by a part of the rate
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=LR / 50, msg=lambda m, n=name: f"{n}: {m}")
        assert (weight - before[name]).abs().max() > LR / 2, name
