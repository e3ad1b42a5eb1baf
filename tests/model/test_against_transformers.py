"""The model is transformers' Llama without the causal mask: hidden states, logits and every gradient."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from illada_megatron.config import RunConfig
from illada_megatron.runtime import Runtime

SEGMENTS = {"one segment": [0, 40], "packed segments": [0, 1, 14, 40], "equal segments": [0, 20, 40]}


def _llama(config: RunConfig) -> LlamaForCausalLM:
    model = config.model
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            vocab_size=model.vocab_size,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            max_position_embeddings=model.max_sequence_length,
            tie_word_embeddings=model.tie_word_embeddings,
            initializer_range=0.1,
            attn_implementation="eager",
        )
    )


def _to_ours(config: RunConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's tensors (weights or gradients) under our names: q, k, v of each group side by side, gate over up."""
    model = config.model
    ours = {"decoder.final_layernorm.weight": tensors["model.norm.weight"]}
    padding = model.padded_vocab_size - model.vocab_size
    embedding = tensors["model.embed_tokens.weight"]
    ours["embedding.word_embeddings.weight"] = torch.nn.functional.pad(embedding, (0, 0, 0, padding))
    for layer in range(model.num_layers):
        theirs, name = f"model.layers.{layer}", f"decoder.layers.{layer}"
        groups = [
            tensors[f"{theirs}.self_attn.{part}_proj.weight"].view(model.num_query_groups, -1, model.hidden_size)
            for part in "qkv"
        ]
        ours[f"{name}.self_attention.linear_qkv.weight"] = torch.cat(groups, dim=1).reshape(-1, model.hidden_size)
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
def test_hidden_states_logits_and_gradients_equal_llama(
    segments: str, tiny_config: RunConfig, single_process: Runtime
) -> None:
    from illada_megatron.model import build_model_chunks, pack

    cu_seqlens = SEGMENTS[segments]
    llama = _llama(tiny_config)
    (ours,) = build_model_chunks(tiny_config, single_process.device)
    ours.load_state_dict(_to_ours(tiny_config, dict(llama.named_parameters())), strict=False)

    tokens = torch.randint(0, tiny_config.model.vocab_size, (1, cu_seqlens[-1]))
    labels = torch.randint(0, tiny_config.model.vocab_size, tokens.shape)
    weight = torch.rand(tokens.shape[1]) * (torch.rand(tokens.shape[1]) < 0.5)
    longest = max(end - start for start, end in pairwise(cu_seqlens))
    packed = pack(torch.tensor(cu_seqlens, dtype=torch.int32), longest)
    mask, positions = _bidirectional_inputs(cu_seqlens)

    theirs = llama.model(input_ids=tokens, attention_mask=mask, position_ids=positions).last_hidden_state
    hidden = ours(tokens, packed)
    torch.testing.assert_close(hidden.squeeze(1), theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.logits(hidden), llama.lm_head(theirs)[0], rtol=1e-5, atol=1e-5)

    ce = torch.nn.functional.cross_entropy(llama.lm_head(theirs)[0], labels[0], reduction="none")
    (ce * weight).sum().backward()
    loss = ours(tokens, packed, labels=labels[0], loss_weight=weight)
    loss.loss_sum.backward()
    torch.testing.assert_close(loss.loss_sum, (ce * weight).sum(), rtol=1e-5, atol=1e-5)
    expected = _to_ours(tiny_config, {name: p.grad for name, p in llama.named_parameters()})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
