"""A model of Transformer Engine's layers, and one of the local ones, in bf16 against the local one in fp32: what a step
computes (logits, loss, gradients by their canonical names), on a GPU where there is one."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerator import DEVICE, ON_GPU, need_layers
from corpus import write_corpus
from torch import Tensor

from illada_megatron.config import load_config
from illada_megatron.config.parameters import canonical_name
from illada_megatron.runtime import runtime

pytestmark = pytest.mark.gpu
HIDDEN, LENGTH = (512, 512) if ON_GPU else (64, 64)
SEGMENTS = (LENGTH, 37, LENGTH - 37)  # of two sequences, the second split


class Computed(NamedTuple):
    """Of one step, in fp32 on the CPU."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def _compute(implementation: str, precision: str, corpus: Path) -> Computed:
    from illada_megatron.model import pack
    from illada_megatron.training.setup import setup

    config = load_config(
        "tiny",
        [
            *("model.num_layers=2", f"model.hidden_size={HIDDEN}", f"model.ffn_hidden_size={2 * HIDDEN}"),
            *("model.num_attention_heads=4", "model.num_query_groups=2", "model.vocab_size=250"),
            *(f"data.sequence_length={LENGTH}", f"data.train_paths=[{corpus}]", "training.micro_batch_size=2"),
            *("training.global_batch_size=2", f"training.precision={precision}"),
            *("runtime.num_threads=1", f"runtime.transformer_impl={implementation}"),
        ],
    )
    with runtime(config) as run:
        state = setup(config, run)
        state.close()
        (chunk,) = state.chunks
        chunk.zero_grad_buffer()
        segments = pack(torch.tensor([0, *SEGMENTS]).cumsum(0).int().to(DEVICE), LENGTH, SEGMENTS)
        torch.manual_seed(2)
        tokens, labels = (torch.randint(6, 250, (2 * LENGTH,)).to(DEVICE) for _ in range(2))
        loss_weight = (torch.rand(2 * LENGTH) < 0.5).float().to(DEVICE)
        with torch.no_grad():
            logits = chunk.module.logits(chunk.module(tokens.view(1, -1), segments))
        loss = chunk(tokens.view(1, -1), segments, labels=labels, loss_weight=loss_weight).loss_sum
        loss.backward()
        tied = config.model.tie_word_embeddings
        gradients = {
            canonical_name(name, 0, tied): parameter.main_grad.float().cpu()
            for name, parameter in chunk.module.named_parameters()
        }
        return Computed(logits.float().cpu(), loss.detach().float().cpu(), gradients)


def _errors(found: Computed, exact: Computed) -> dict[str, float]:
    assert found.gradients.keys() == exact.gradients.keys()
    pairs = {"logits": (found.logits, exact.logits), "loss": (found.loss, exact.loss)}
    pairs |= {name: (found.gradients[name], exact.gradients[name]) for name in exact.gradients}
    return {name: float((one - other).norm() / other.norm()) for name, (one, other) in pairs.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "shard")


@pytest.fixture(scope="module")
def exact(corpus: Path) -> Computed:
    return _compute("local", "fp32", corpus)


@pytest.fixture(scope="module")
def local_errors(corpus: Path, exact: Computed) -> dict[str, float]:
    return _errors(_compute("local", "bf16", corpus), exact)


def test_local_layers_in_bf16(local_errors: dict[str, float]) -> None:
    assert max(local_errors.values()) < 0.05, local_errors


def test_transformer_engine_is_as_near(corpus: Path, exact: Computed, local_errors: dict[str, float]) -> None:
    """A wrong mask, scale, order of heads or of gate and up, or rotation would be off by tens of percent."""
    need_layers("transformer_engine")
    for name, error in _errors(_compute("transformer_engine", "bf16", corpus), exact).items():
        assert error <= 2 * local_errors[name] + 0.005, (
            f"{name}: {error:.4f}, the local layers {local_errors[name]:.4f}"
        )
