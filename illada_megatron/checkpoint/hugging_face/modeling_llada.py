"""A model in LLaDA's layout (arXiv 2502.09992; names as OLMo's) for Hugging Face's transformers. Lies beside exported
weights together with modeling_illada.py, whose parts it uses; needs torch and transformers only.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    logits = model(input_ids, attention_mask=attention_mask).logits
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_llada import LLaDAConfig
from .modeling_illada import RMSNorm, attention, rotation, soft_cap, visible_positions, without_mask


class LLaDABlock(nn.Module):
    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, queries, groups = config.d_model, config.n_heads * self.head_dim, config.n_kv_heads * self.head_dim
        self.attn_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.q_proj = nn.Linear(hidden, queries, bias=config.include_qkv_bias)
        self.k_proj = nn.Linear(hidden, groups, bias=config.include_qkv_bias)
        self.v_proj = nn.Linear(hidden, groups, bias=config.include_qkv_bias)
        self.attn_out = nn.Linear(queries, hidden, bias=False)
        self.ff_norm = RMSNorm(hidden, config.rms_norm_eps)
        self.ff_proj = nn.Linear(hidden, config.mlp_hidden_size, bias=False)  # the gate
        self.up_proj = nn.Linear(hidden, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor | None) -> Tensor:
        normed = self.attn_norm(x)
        q, k, v = self.q_proj(normed), self.k_proj(normed), self.v_proj(normed)
        x = x + self.attn_out(attention(q, k, v, self.head_dim, cos, sin, visible))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


class LLaDAModel(nn.Module):
    """Only holds the modules under their names in the layout."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        modules = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            modules["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(modules)


class LLaDAModelLM(PreTrainedModel):
    """p(token | all others) at each position, named as in the released checkpoints."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ["LLaDABlock"]  # noqa: RUF012
    _supports_sdpa = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.wte = value

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.weight_tying else self.model.transformer.ff_out

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer.ff_out = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> MaskedLMOutput:
        """input_ids [b, s] or inputs_embeds [b, s, h]; attention_mask [b, s], 0 at padding on either side -> logits
        [b, s, vocab_size], at each position for the token at this position."""
        parts = self.model.transformer
        x = parts.wte(input_ids) if inputs_embeds is None else inputs_embeds
        cos, sin = rotation(self.config, x.shape[1], x.device)
        visible = visible_positions(attention_mask)
        for block in parts.blocks:
            x = block(x, cos, sin, visible)
        head = parts.wte if self.config.weight_tying else parts.ff_out
        logits = F.linear(parts.ln_f(x), head.weight)[..., : self.config.vocab_size]
        return MaskedLMOutput(logits=without_mask(soft_cap(logits, self.config.logit_softcap), self.config))
