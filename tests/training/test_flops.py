"""FLOPs of a step against a count by hand and against what torch counts while a real model runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from illada_megatron.config import ModelConfig, RunConfig
from illada_megatron.runtime import Runtime
from illada_megatron.runtime.device import bf16_peak_tflops
from illada_megatron.training.flops import training_flops


def test_by_hand() -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=10,
        num_attention_heads=2,
        num_query_groups=1,
        vocab_size=30,
        make_vocab_size_divisible_by=32,
        mask_token_id=5,
    )
    q, k, v, o = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    gate, up, down = 8 * 10, 8 * 10, 10 * 8
    tokens, masked, lengths = 20, 7, [12, 5, 3]
    linear = 2 * tokens * (q + k + v + o + gate + up + down)
    attention = sum(2 * length * length * 8 * 2 for length in lengths)  # q k^T, then the weighted sum of v
    forward = 2 * (linear + attention) + 2 * masked * 8 * 30  # two layers; the head on masked tokens
    assert training_flops(model, tokens, sum(length**2 for length in lengths), masked) == 3 * forward


def test_equals_what_torch_counts(tiny_config: RunConfig, single_process: Runtime) -> None:
    """A term left out or counted for all tokens instead of the masked ones; MFU would be wrong by as much."""
    from illada_megatron.model import build_model_chunks, fill_initial_weights, pack

    (model,) = build_model_chunks(tiny_config, single_process.device)
    fill_initial_weights([model], tiny_config.model, seed=1)
    tokens = torch.arange(96).view(1, -1)
    weight = (torch.arange(96) % 3 == 0).float()
    segments = pack(torch.tensor([0, 48, 60, 96], dtype=torch.int32), 48)
    # the attention kernel as plain matrix products, which the counter knows on a CPU
    # no_grad: the loss makes its gradients in the forward pass
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens, segments, labels=tokens[0], loss_weight=weight)
    expected = training_flops(tiny_config.model, 96, 48**2 + 12**2 + 36**2, 32)
    assert 3 * counter.get_total_flops() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GB300", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_by_the_name_that_cuda_gives(name: str, peak: float | None) -> None:
    assert bf16_peak_tflops(name) == peak
