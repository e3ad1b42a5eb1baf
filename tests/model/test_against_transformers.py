"""The model is transformers' Llama, with biases its Qwen2, with norms of queries and keys its Qwen3, without the causal
mask: hidden states, logits and every gradient; with scaled rotary frequencies too."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from illada_megatron.config import RunConfig
from illada_megatron.runtime import Runtime

SEGMENTS = {"one segment": [0, 40], "packed segments": [0, 1, 14, 40], "equal segments": [0, 20, 40]}
MODELS = {
    "Llama": ({}, LlamaForCausalLM, LlamaConfig),
    "Qwen2": ({"add_qkv_bias": True}, Qwen2ForCausalLM, Qwen2Config),
    "Qwen3": ({"qk_layernorm": True}, Qwen3ForCausalLM, Qwen3Config),
    "Llama, llama3": (
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 24},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            }
        },
        LlamaForCausalLM,
        LlamaConfig,
    ),
    "Qwen3, yarn": (
        {
            "qk_layernorm": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        },
        Qwen3ForCausalLM,
        Qwen3Config,
    ),
}


def _transformers_model(config: RunConfig, name: str) -> LlamaForCausalLM | Qwen2ForCausalLM | Qwen3ForCausalLM:
    model = config.model
    torch.manual_seed(0)
    _, kind, settings = MODELS[name]
    rope = {"rope_type": "default"} if model.rope_scaling is None else model.rope_scaling.model_dump(exclude_none=True)
    theirs = kind(
        settings(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            vocab_size=model.vocab_size,
            rms_norm_eps=model.norm_epsilon,
            head_dim=model.head_dim,
            rope_parameters={**rope, "rope_theta": model.rotary_base},
            max_position_embeddings=model.max_sequence_length,
            tie_word_embeddings=model.tie_word_embeddings,
            initializer_range=0.1,
            attn_implementation="eager",
        )
    )
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    return theirs


def _to_ours(config: RunConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors (weights or gradients) under our names: q, k, v of each group side by side, gate over up."""
    model = config.model
    ours = {"decoder.final_layernorm.weight": tensors["model.norm.weight"]}
    padding = model.padded_vocab_size - model.vocab_size
    embedding = tensors["model.embed_tokens.weight"]
    ours["embedding.word_embeddings.weight"] = torch.nn.functional.pad(embedding, (0, 0, 0, padding))
    for layer in range(model.num_layers):
        theirs, name = f"model.layers.{layer}", f"decoder.layers.{layer}"
        for kind in ("weight", "bias") if model.add_qkv_bias else ("weight",):
            parts = [tensors[f"{theirs}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            groups = [part.unflatten(0, (model.num_query_groups, -1)) for part in parts]
            ours[f"{name}.self_attention.linear_qkv.{kind}"] = torch.cat(groups, dim=1).flatten(0, 1)
        for part in "qk" if model.qk_layernorm else "":
            ours[f"{name}.self_attention.{part}_layernorm.weight"] = tensors[f"{theirs}.self_attn.{part}_norm.weight"]
        ours[f"{name}.self_attention.linear_proj.weight"] = tensors[f"{theirs}.self_attn.o_proj.weight"]
        ours[f"{name}.input_layernorm.weight"] = tensors[f"{theirs}.input_layernorm.weight"]
        ours[f"{name}.pre_mlp_layernorm.weight"] = tensors[f"{theirs}.post_attention_layernorm.weight"]
        ours[f"{name}.mlp.linear_fc1.weight"] = torch.cat(
            [tensors[f"{theirs}.mlp.gate_proj.weight"], tensors[f"{theirs}.mlp.up_proj.weight"]]
        )
        ours[f"{name}.mlp.linear_fc2.weight"] = tensors[f"{theirs}.mlp.down_proj.weight"]
    return ours


def _bidirectional_inputs(cu_seqlens: list[int]) -> tuple[Tensor, Tensor]:
    """A mask that lets positions of a segment see each other (both ways), and positions that restart in each."""
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    visible = torch.block_diag(*[torch.ones(length, length) for length in lengths]).bool()
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    return mask, torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_logits_and_gradients_equal_theirs(
    name: str, segments: str, tiny_config: RunConfig, single_process: Runtime
) -> None:
    """The gradients also as DDP sums them in main_grad, over two micro-batches."""
    from illada_megatron.model import build_model_chunks, pack
    from illada_megatron.training.gradient_reduction import wrap_data_parallel

    model = tiny_config.model.model_validate({**tiny_config.model.model_dump(), **MODELS[name][0]})
    tiny_config = tiny_config.model_copy(update={"model": model})
    cu_seqlens = SEGMENTS[segments]
    theirs = _transformers_model(tiny_config, name)
    (ours,) = build_model_chunks(tiny_config, single_process.device)
    ours.load_state_dict(_to_ours(tiny_config, dict(theirs.named_parameters())), strict=False)

    tokens = torch.randint(0, tiny_config.model.vocab_size, (1, cu_seqlens[-1]))
    labels = torch.randint(0, tiny_config.model.vocab_size, tokens.shape)
    weight = torch.rand(tokens.shape[1]) * (torch.rand(tokens.shape[1]) < 0.5)
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    packed = pack(torch.tensor(cu_seqlens, dtype=torch.int32), longest)
    mask, positions = _bidirectional_inputs(cu_seqlens)

    their_hidden = theirs.model(input_ids=tokens, attention_mask=mask, position_ids=positions).last_hidden_state
    hidden = ours(tokens, packed)
    torch.testing.assert_close(hidden.squeeze(1), their_hidden[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits(hidden), theirs.lm_head(their_hidden)[0], rtol=1e-5, atol=1e-5)

    ce = torch.nn.functional.cross_entropy(theirs.lm_head(their_hidden)[0], labels[0], reduction="none")
    (ce * weight).sum().backward()
    loss = ours(tokens, packed, labels=labels[0], loss_weight=weight)
    loss.loss_sum.backward()
    torch.testing.assert_close(loss.loss_sum, (ce * weight).sum(), rtol=1e-5, atol=1e-5)
    expected = _to_ours(tiny_config, {name: p.grad for name, p in theirs.named_parameters()})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")

    ours.zero_grad()
    (wrapped,) = wrap_data_parallel(tiny_config.parallel, [ours])
    wrapped.zero_grad_buffer()
    for _ in range(2):
        wrapped(tokens, packed, labels=labels[0], loss_weight=weight).loss_sum.backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.main_grad, 2 * expected[name], rtol=1e-4, atol=2e-5)
