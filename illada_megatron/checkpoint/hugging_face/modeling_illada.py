"""iLLaDA for Hugging Face's transformers. Lies beside exported weights; needs torch and transformers only.

A masked-diffusion language model (arXiv 2606.25331): every position sees every other, and the logits at a position are
for the token at that position, not for the next one. There is no cache of keys, and `generate` of transformers, which
appends token after token, does not apply: a sampler fills masks over several calls of `forward`.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    logits = model(input_ids, attention_mask=attention_mask).logits
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_illada import ILLaDAConfig


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotation(config: Any, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2] in float32 of the angles of rotary embeddings (arXiv 2104.09864): made
    in each forward pass, which takes no time, so that no precision or device of the model changes them.

    Scaled frequencies are transformers' own, at a length that none of them looks at; yarn's factor of queries and keys
    is part of both tables."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies, factor = config.rope_theta**-exponents, 1.0
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default":
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, device)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequencies)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [b, heads, s, d]: element i of a head is turned together with element i + d / 2."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, head_dim: int, cos: Tensor, sin: Tensor, visible: Tensor | None
) -> Tensor:
    """Bidirectional attention. q [b, s, heads * d], k and v [b, s, groups * d] -> [b, s, heads * d].

    visible: [b, 1, 1, s] bool, the positions that are looked at; None: all.
    """
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    heads_per_group = q.shape[1] // k.shape[1]
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if heads_per_group > 1:
        k, v = (x.repeat_interleave(heads_per_group, dim=1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return out.transpose(1, 2).flatten(-2)


def visible_positions(attention_mask: Tensor | None) -> Tensor | None:
    """[b, s] with 0 at padding -> what `attention` takes. Raises ValueError for a mask of another kind."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected [batch, sequence] with 1 at tokens and "
            "0 at padding"
        )
    return attention_mask.bool()[:, None, None, :]


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap); 0: no cap."""
    return logits if not cap else cap * torch.tanh(logits / cap)


def without_mask(logits: Tensor, config: Any) -> Tensor:
    """Where the model was trained so, the mask's logit is minus infinity."""
    if not config.exclude_mask_logit:
        return logits
    return logits.index_fill(-1, torch.tensor(config.mask_token_id, device=logits.device), -torch.inf)


class ILLaDAAttention(nn.Module):
    def __init__(self, config: ILLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        groups = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, groups, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, groups, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        if config.qk_layernorm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.config.qk_layernorm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return self.o_proj(attention(q, k, v, self.head_dim, cos, sin, visible))


class ILLaDAMLP(nn.Module):
    def __init__(self, config: ILLaDAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ILLaDALayer(nn.Module):
    def __init__(self, config: ILLaDAConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ILLaDAAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = ILLaDAMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class ILLaDAPreTrainedModel(PreTrainedModel):
    config_class = ILLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["ILLaDALayer"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class ILLaDAModel(ILLaDAPreTrainedModel):
    """Tokens -> normalised hidden states."""

    def __init__(self, config: ILLaDAConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ILLaDALayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """input_ids [b, s] or inputs_embeds [b, s, h]; attention_mask [b, s], 0 at padding on either side."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = rotation(self.config, x.shape[1], x.device)
        visible = visible_positions(attention_mask)
        for layer in self.layers:
            x = layer(x, cos, sin, visible)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class ILLaDAForCausalLM(ILLaDAPreTrainedModel):
    """Named as in the released checkpoints; there is nothing causal about it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: ILLaDAConfig) -> None:
        super().__init__(config)
        self.model = ILLaDAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """As ILLaDAModel's -> logits [b, s, vocab_size], at each position for the token at this position."""
        hidden = self.model(input_ids, attention_mask, inputs_embeds).last_hidden_state
        logits = soft_cap(self.lm_head(hidden), self.config.logit_softcap)
        return MaskedLMOutput(logits=without_mask(logits, self.config))
