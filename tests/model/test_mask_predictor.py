"""What makes the model a mask predictor: sight in both directions, isolation of segments, sizes, initial weights."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from illada_megatron.config import RunConfig, load_config
from illada_megatron.runtime import Runtime


@pytest.fixture
def logits_of(tiny_config: RunConfig, single_process: Runtime) -> Callable[[Tensor, list[int]], Tensor]:
    from illada_megatron.model import build_model_chunks, fill_initial_weights, pack

    (model,) = build_model_chunks(tiny_config, single_process.device)
    fill_initial_weights([model], tiny_config.model, seed=3)

    def logits(tokens: Tensor, cu_seqlens: list[int]) -> Tensor:
        longest = max(end - start for start, end in pairwise(cu_seqlens))
        with torch.no_grad():
            return model.logits(model(tokens, pack(torch.tensor(cu_seqlens, dtype=torch.int32), longest)))

    return logits


def test_a_late_token_changes_an_early_position(logits_of: Callable[[Tensor, list[int]], Tensor]) -> None:
    tokens = torch.arange(40).view(1, -1)
    changed = tokens.clone()
    changed[0, 39] = 200
    difference = (logits_of(tokens, [0, 40]) - logits_of(changed, [0, 40])).abs().amax(dim=-1)
    assert (difference > 0).all()


def test_a_token_changes_nothing_in_another_segment(logits_of: Callable[[Tensor, list[int]], Tensor]) -> None:
    tokens = torch.arange(40).view(1, -1)
    changed = tokens.clone()
    changed[0, 30] = 200
    difference = (logits_of(tokens, [0, 25, 40]) - logits_of(changed, [0, 25, 40])).abs().amax(dim=-1)
    assert (difference[:25] == 0).all()
    assert (difference[25:] > 0).all()


def test_positions_restart_in_each_segment(logits_of: Callable[[Tensor, list[int]], Tensor]) -> None:
    first, second = torch.arange(25).view(1, -1), torch.arange(100, 115).view(1, -1)
    packed = logits_of(torch.cat([first, second], dim=1), [0, 25, 40])
    torch.testing.assert_close(packed[:25], logits_of(first, [0, 25]))
    torch.testing.assert_close(packed[25:], logits_of(second, [0, 15]))


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("illada-1b", 1_290_864_640),
        ("illada-8b", 7_615_025_152),
        ("llada-8b", 8_015_581_184),
        ("illada-70b", None),
    ],
)
def test_presets_have_the_published_number_of_parameters(
    preset: str, parameters: int | None, single_process: Runtime
) -> None:
    from illada_megatron.model.mask_predictor import count_parameters

    single_rank = [f"parallel.{name}=1" for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")]
    single_rank += ["parallel.virtual_pipeline_model_parallel_size=null", "parallel.sequence_parallel=false"]
    config = load_config(preset, single_rank)
    assert count_parameters(config) == config.model.num_parameters
    if parameters is not None:
        assert config.model.num_parameters == parameters


def test_parameters_of_qwen2(single_process: Runtime) -> None:
    """Of Qwen2.5-7B's shape, published as 7.61B, all biases counted."""
    from illada_megatron.model.mask_predictor import count_parameters

    shape = ("num_layers=28", "hidden_size=3584", "ffn_hidden_size=18944", "num_attention_heads=28")
    more = ("num_query_groups=4", "vocab_size=152064", "tie_word_embeddings=false", "add_qkv_bias=true")
    config = load_config(None, [f"model.{field}" for field in (*shape, *more)])
    assert count_parameters(config) == config.model.num_parameters == 7_615_616_512


def test_parameters_of_qwen3(single_process: Runtime) -> None:
    """Of Qwen3-8B's shape, published as 8.2B, the norms of queries and keys counted."""
    from illada_megatron.model.mask_predictor import count_parameters

    shape = ("num_layers=36", "hidden_size=4096", "ffn_hidden_size=12288", "num_attention_heads=32")
    more = ("num_query_groups=8", "vocab_size=151936", "tie_word_embeddings=false", "qk_layernorm=true")
    config = load_config(None, [f"model.{field}" for field in (*shape, *more)])
    assert count_parameters(config) == config.model.num_parameters == 8_190_735_360


def test_biases_begin_at_zero(tiny_config: RunConfig, single_process: Runtime) -> None:
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    model = tiny_config.model.model_copy(update={"add_qkv_bias": True, "qk_layernorm": True})
    (chunk,) = build_model_chunks(tiny_config.model_copy(update={"model": model}), single_process.device)
    for parameter in chunk.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    fill_initial_weights([chunk], model, seed=3)
    vectors = {name: set(values.tolist()) for name, values in chunk.named_parameters() if values.dim() == 1}
    assert sum(name.endswith("linear_qkv.bias") for name in vectors) == model.num_layers
    assert vectors == {name: {0.0 if name.endswith(".bias") else 1.0} for name in vectors}


def test_mitchells_initial_weights(tiny_config: RunConfig, single_process: Runtime) -> None:
    """As torch's trunc_normal_ at 3 standard deviations makes them, of OLMo's numbers."""
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    model = tiny_config.model.model_copy(update={"init_method": "mitchell", "tie_word_embeddings": False})
    (chunk,) = build_model_chunks(tiny_config.model_copy(update={"model": model}), single_process.device)
    fill_initial_weights([chunk], model, seed=3)
    weights = dict(chunk.named_parameters())
    torch.manual_seed(0)
    like = torch.nn.init.trunc_normal_(torch.empty(1_000_000), a=-3.0, b=3.0)
    for name, std in {
        "embedding.word_embeddings.weight": 1 / math.sqrt(64),
        "output_layer.weight": 1 / math.sqrt(64),
        "decoder.layers.0.self_attention.linear_qkv.weight": 1 / math.sqrt(64),
        "decoder.layers.1.mlp.linear_fc1.weight": 1 / math.sqrt(64),
        "decoder.layers.0.self_attention.linear_proj.weight": 1 / math.sqrt(2 * 64),
        "decoder.layers.1.self_attention.linear_proj.weight": 1 / math.sqrt(2 * 2 * 64),
        "decoder.layers.1.mlp.linear_fc2.weight": 1 / math.sqrt(2 * 2 * 96),
    }.items():
        has_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
        values = weights[name][: model.vocab_size] if has_vocabulary else weights[name]
        assert values.std().item() == pytest.approx(std * like.std().item(), rel=0.03), name
        assert 2.8 * std < values.abs().max().item() <= 3.0 * std, name


def test_initial_weights_have_the_documented_spread(tiny_config: RunConfig, single_process: Runtime) -> None:
    from illada_megatron.model import build_model_chunks, fill_initial_weights

    (model,) = build_model_chunks(tiny_config, single_process.device)
    fill_initial_weights([model], tiny_config.model, seed=3)
    weights = dict(model.named_parameters())
    std, hidden, layers = 0.02, tiny_config.model.hidden_size, tiny_config.model.num_layers
    expected = {
        "embedding.word_embeddings.weight": math.sqrt(1 / (2 * hidden)),
        "decoder.layers.0.self_attention.linear_qkv.weight": std,
        "decoder.layers.1.mlp.linear_fc1.weight": std,
        "decoder.layers.0.self_attention.linear_proj.weight": std / math.sqrt(2 * layers),
        "decoder.layers.1.mlp.linear_fc2.weight": std / math.sqrt(2 * layers),
    }
    for name, spread in expected.items():
        values = weights[name][: tiny_config.model.vocab_size] if "embedding" in name else weights[name]
        assert values.std().item() == pytest.approx(spread, rel=0.05), name
        assert values.abs().max() > 3.1 * spread, name  # nothing is cut off
        assert abs(values.mean().item()) < 5 * spread / math.sqrt(values.numel()), name
    assert (weights["embedding.word_embeddings.weight"][tiny_config.model.vocab_size :] == 0).all()
    first, second = (weights[f"decoder.layers.{layer}.mlp.linear_fc1.weight"] for layer in (0, 1))
    assert not torch.equal(first, second)


def test_layers_accumulate_weight_gradients_in_fp32_with_transformer_engine_alone(
    tiny_config: RunConfig, single_process: Runtime
) -> None:
    """TE's linears add to main_grad without Apex; the head, a layer of megatron-core's, is built without it as well."""
    from illada_megatron.model import transformer_config
    from illada_megatron.model.head import Head
    from illada_megatron.runtime import Device

    cuda = Device(torch.device("cuda", 0), "H100", None)
    assert transformer_config(tiny_config, cuda, "transformer_engine").gradient_accumulation_fusion
    assert not transformer_config(tiny_config, cuda, "local").gradient_accumulation_fusion
    on_cpu = transformer_config(tiny_config, single_process.device, "local")
    on_cpu.gradient_accumulation_fusion = True
    head = Head(on_cpu, tiny_config.model, tiny_config.loss, tied_here=False)
    assert not head.gradient_accumulation_fusion
    assert on_cpu.gradient_accumulation_fusion
