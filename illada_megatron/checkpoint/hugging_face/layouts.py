"""The layouts of published models: one table of names, read in both directions.

Every tensor of a layout is a choice of whole rows of one parameter (config/parameters.py), in order: megatron-core
keeps q, k and v of a query group side by side in one matrix, SwiGLU's gate above its up projection in another, and pads
the vocabulary. So a conversion copies rows, and never computes.

Sources of the names: the released iLLaDA and LLaDA checkpoints; iLLaDA's are Llama's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, FINAL_NORM, HEAD, parameters

LayoutName = Literal["illada", "llada"]
Part = Literal["q", "k", "v", "q bias", "k bias", "v bias", "gate", "up"]

_PARTS: dict[str, tuple[Part, ...]] = {
    "self_attention.linear_qkv.weight": ("q", "k", "v"),
    "self_attention.linear_qkv.bias": ("q bias", "k bias", "v bias"),
    "mlp.linear_fc1.weight": ("gate", "up"),
}
"""Parameters of a layer that a layout keeps in several tensors."""


@dataclass(frozen=True)
class Layout:
    """The names of a published model."""

    model_type: LayoutName
    """Of its config.json."""
    architecture: str
    """Class in its modeling file."""
    files: tuple[str, ...]
    """Of this folder, that go beside the weights."""
    auto_map: Mapping[str, str]
    """Where transformers finds its classes."""
    default_mask_token_id: int
    """Of the released model, whose config.json may not say it."""
    outside: Mapping[str, str]
    """Parameter -> tensor, for what belongs to no layer."""
    layer: str
    """What a layer's names begin with; {} is its number."""
    in_layer: Mapping[str, str]
    """Parameter of a layer, or a part of one -> tensor."""
    lacks: tuple[str, ...] = ()
    """Fields of ModelConfig that its names and keys cannot say."""


ILLADA = Layout(
    model_type="illada",
    architecture="ILLaDAForCausalLM",
    files=("configuration_illada.py", "modeling_illada.py"),
    auto_map={
        "AutoConfig": "configuration_illada.ILLaDAConfig",
        "AutoModel": "modeling_illada.ILLaDAForCausalLM",
        "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
    },
    default_mask_token_id=5,
    outside={EMBEDDING: "model.embed_tokens.weight", FINAL_NORM: "model.norm.weight", HEAD: "lm_head.weight"},
    layer="model.layers.{}.",
    in_layer={
        "input_layernorm.weight": "input_layernorm.weight",
        "q": "self_attn.q_proj.weight",
        "k": "self_attn.k_proj.weight",
        "v": "self_attn.v_proj.weight",
        "q bias": "self_attn.q_proj.bias",
        "k bias": "self_attn.k_proj.bias",
        "v bias": "self_attn.v_proj.bias",
        # Qwen3's
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "gate": "mlp.gate_proj.weight",
        "up": "mlp.up_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    },
)

LLADA = Layout(
    model_type="llada",
    architecture="LLaDAModelLM",
    files=("configuration_llada.py", "modeling_llada.py", "configuration_illada.py", "modeling_illada.py"),
    auto_map={
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    default_mask_token_id=126336,
    outside={
        EMBEDDING: "model.transformer.wte.weight",
        FINAL_NORM: "model.transformer.ln_f.weight",
        HEAD: "model.transformer.ff_out.weight",
    },
    layer="model.transformer.blocks.{}.",
    in_layer={
        "input_layernorm.weight": "attn_norm.weight",
        "q": "q_proj.weight",
        "k": "k_proj.weight",
        "v": "v_proj.weight",
        "q bias": "q_proj.bias",
        "k bias": "k_proj.bias",
        "v bias": "v_proj.bias",
        "self_attention.linear_proj.weight": "attn_out.weight",
        "pre_mlp_layernorm.weight": "ff_norm.weight",
        "gate": "ff_proj.weight",
        "up": "up_proj.weight",
        "mlp.linear_fc2.weight": "ff_out.weight",
    },
    # OLMo's attention_layer_norm is over all heads together
    lacks=("qk_layernorm", "rope_scaling"),
)

LAYOUTS: dict[LayoutName, Layout] = {"illada": ILLADA, "llada": LLADA}


@dataclass(frozen=True)
class LayoutTensor:
    """A tensor of a layout."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    """Whose rows it has."""
    runs: tuple[tuple[int, int], ...]
    """(first row, rows) in the parameter, in the tensor's order."""


def layout_tensors(layout: Layout, model: ModelConfig, vocab_size: int | None = None) -> list[LayoutTensor]:
    """All tensors of the model in a layout. vocab_size: rows of the embedding and the head; None: the model's. Raises
    CheckpointError where the layout has no names for it."""
    if missing := [name for name in layout.lacks if getattr(model, name)]:
        raise CheckpointError(
            f"the layout {layout.model_type} has no {' and no '.join(missing)}, which this model has: export it as "
            "--layout illada"
        )
    found = []
    for parameter in parameters(model):
        rest = parameter.shape[1:]
        if parameter.name in layout.outside:
            rows = (vocab_size or model.vocab_size) if parameter.name in (EMBEDDING, HEAD) else parameter.shape[0]
            found.append(LayoutTensor(layout.outside[parameter.name], (rows, *rest), parameter.name, ((0, rows),)))
            continue
        number, within = parameter.name.removeprefix("decoder.layers.").split(".", maxsplit=1)
        for part in _PARTS.get(within, (within,)):
            runs = _runs(part, parameter.shape[0], model)
            name = layout.layer.format(number) + layout.in_layer[part]
            found.append(LayoutTensor(name, (sum(rows for _, rows in runs), *rest), parameter.name, runs))
    return found


def _runs(part: str, rows: int, model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Where a part of a parameter of `rows` rows lies in it."""
    if part in ("gate", "up"):
        return ((0 if part == "gate" else rows // 2, rows // 2),)
    kind = part.removesuffix(" bias")
    if kind not in ("q", "k", "v"):
        return ((0, rows),)
    head = model.head_dim
    queries = model.num_attention_heads // model.num_query_groups * head
    start, length = {"q": (0, queries), "k": (queries, head), "v": (queries + head, head)}[kind]
    return tuple((group * (queries + 2 * head) + start, length) for group in range(model.num_query_groups))
