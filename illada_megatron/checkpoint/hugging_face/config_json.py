"""config.json of a layout <-> ModelConfig. What the model here does not have is refused, never left out."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.hugging_face.layouts import ILLADA, LLADA, Layout
from illada_megatron.config import ModelConfig
from illada_megatron.config.schema import RopeScaling

CONFIG = "config.json"

# Field of ModelConfig -> key, in the order in which they are written.
_LLAMA_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "max_sequence_length": "max_position_embeddings",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "mask_token_id": "mask_token_id",
    "kv_channels": "head_dim",
    "logit_softcap": "logit_softcap",
    "exclude_mask_logit": "exclude_mask_logit",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_layernorm",
    "rope_scaling": "rope_scaling",
}
_LLADA_KEYS = {
    "vocab_size": "embedding_size",
    "hidden_size": "d_model",
    "ffn_hidden_size": "mlp_hidden_size",
    "num_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_query_groups": "n_kv_heads",
    "max_sequence_length": "max_sequence_length",
    "rotary_base": "rope_theta",
    "norm_epsilon": "rms_norm_eps",
    "init_method_std": "init_std",
    "tie_word_embeddings": "weight_tying",
    "mask_token_id": "mask_token_id",
    "kv_channels": "head_dim",
    "logit_softcap": "logit_softcap",
    "exclude_mask_logit": "exclude_mask_logit",
    "add_qkv_bias": "include_qkv_bias",
}
# What is the same for every model here. A config.json that has another value is of another model; one that lacks the
# key is not.
_LLAMA_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "layer_norm_eps": None,
    "attention_dropout": 0.0,
    "resid_pdrop": 0.0,
}
_LLADA_FIXED: dict[str, Any] = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "residual_dropout": 0.0,
}
# Keys of Llama and Qwen2 beside them, and what leaves the model as it is here.
_LLAMA_NEUTRAL: dict[str, Any] = {"use_sliding_window": False, "partial_rotary_factor": 1.0}
# Keys of OLMo, likewise.
_LLADA_NEUTRAL: dict[str, Any] = {"clip_qkv": None, "rope_scaling": None}
# What a default rotary embedding may say of itself.
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_SCALED = ("linear", "llama3", "yarn")
_DROPOUTS = ("attention_dropout", "resid_pdrop", "embedding_dropout", "residual_dropout")
_AUTOREGRESSIVE = ("llama", "qwen2", "qwen3")
# Defaults of the classes that wrote a config.json, where a key may be missing.
_MISSING: dict[str, dict[str, Any]] = {
    "illada": {"tie_word_embeddings": True},
    "llada": {"weight_tying": False},
    "llama": {"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "qwen2": {"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "qkv_bias": True},
    "qwen3": {
        **{"tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-6},
        **{"head_dim": 128, "qk_layernorm": True},
    },
}
_OPTIONAL = (
    *("init_method_std", "kv_channels", "logit_softcap", "mask_token_id", "num_query_groups", "add_qkv_bias"),
    *("exclude_mask_logit", "qk_layernorm", "rope_scaling"),
)


@dataclass(frozen=True)
class ForeignModel:
    """What a config.json says."""

    layout: Layout
    model_type: str
    fields: dict[str, Any]
    """Of ModelConfig; mask_token_id only where the file has it. vocab_size: rows of the embedding."""

    @property
    def is_autoregressive(self) -> bool:
        """It predicts the next token and knows no mask."""
        return self.model_type in _AUTOREGRESSIVE


def config_json(
    layout: Layout, model: ModelConfig, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The config.json of a model. dtype: as torch names it ("bfloat16"); special_ids: bos, eos and pad of the
    tokenizer, None where there is none."""
    keys = _keys(layout)
    fields = model.model_dump()
    if model.kv_channels is None or model.kv_channels * model.num_attention_heads == model.hidden_size:
        del fields["kv_channels"]
    if not model.logit_softcap:
        del fields["logit_softcap"]
    if not model.exclude_mask_logit:
        del fields["exclude_mask_logit"]
    if layout is ILLADA and not model.add_qkv_bias:
        del fields["add_qkv_bias"]
    if not model.qk_layernorm:
        del fields["qk_layernorm"]
    if model.rope_scaling is not None:
        fields["rope_scaling"] = model.rope_scaling.model_dump(exclude_none=True)
    values = {key: fields[field] for field, key in keys.items() if field in fields}
    if layout is LLADA:
        values["vocab_size"] = model.vocab_size
    return {
        "architectures": [layout.architecture],
        "auto_map": dict(layout.auto_map),
        "model_type": layout.model_type,
        **values,
        **(_LLADA_FIXED if layout is LLADA else _LLAMA_FIXED),
        "use_cache": False,
        **{f"{name}_token_id": special_ids.get(name) for name in ("bos", "eos", "pad")},
        "torch_dtype": dtype,
    }


def read_config_json(directory: Path) -> ForeignModel:
    """What the config.json in `directory` says. Raises CheckpointError naming the key, its value and what was expected
    for a model that this program does not have."""
    path = directory / CONFIG
    values = _read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MISSING:
        raise CheckpointError(
            f"{path}: model_type is {model_type!r}, expected one of {', '.join(_MISSING)}: others have other layers"
        )
    layout = LLADA if model_type == "llada" else ILLADA
    values = {**_MISSING[model_type], **values}
    _flatten_rope(path, values)
    if layout is LLADA:
        _resolve_olmo(path, values)
    if layout is ILLADA and values.get("attention_bias") is True:
        # Llama's: also of the output projection, whose bias has to be zero (importing.py)
        values |= {"attention_bias": False, "qkv_bias": True}
    fixed = _LLADA_FIXED | _LLADA_NEUTRAL if layout is LLADA else _LLAMA_FIXED | _LLAMA_NEUTRAL
    for key, expected in fixed.items():
        # no dropout here: what they had in training is no part of the model
        if key in values and key not in _DROPOUTS and values[key] != expected:
            raise CheckpointError(f"{path}: {key} is {values[key]!r}; this model knows only {expected!r}")
    fields = {}
    for field, key in _keys(layout).items():
        if values.get(key) is not None:
            fields[field] = _typed(path, key, field, values[key])
        elif field not in _OPTIONAL:
            raise CheckpointError(f"{path}: has no key {key}")
    fields.setdefault("num_query_groups", fields["num_attention_heads"])
    fields.setdefault("add_qkv_bias", False)
    fields.setdefault("qk_layernorm", False)
    fields.setdefault("rope_scaling", None)
    if fields.get("kv_channels", 0) * fields["num_attention_heads"] == fields["hidden_size"]:
        del fields["kv_channels"]
    return ForeignModel(layout, model_type, fields)


def model_config(path: Path, layout: Layout, fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a config.json's fields. Raises CheckpointError naming `path` and its keys."""
    try:
        return ModelConfig.model_validate(dict(fields))
    except ValidationError as error:
        # each value is of its type (_typed), so what is left is about how they go together, in ModelConfig's names
        names = re.compile(rf"\b({'|'.join(_keys(layout))})\b")
        reasons = [
            names.sub(lambda name: _keys(layout)[name[1]], one["msg"].removeprefix("Value error, "))
            for one in error.errors()
        ]
        raise CheckpointError(f"{path}: " + "\n".join(reasons)) from error


def _keys(layout: Layout) -> dict[str, str]:
    return _LLADA_KEYS if layout is LLADA else _LLAMA_KEYS


def _typed(path: Path, key: str, field: str, value: Any) -> Any:
    """The value of a key, as its field of ModelConfig has it alone."""
    info = ModelConfig.model_fields[field]
    kind: Any = Annotated[info.annotation, info]
    adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(strict=True))
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {key} is {value!r}: {error.errors()[0]['msg']}") from error


def _resolve_olmo(path: Path, values: dict[str, Any]) -> None:
    """What OLMo's keys, which are LLaDA's, mean by null (`effective_n_kv_heads` and the embedding in OLMo's source)."""
    if values.get("embedding_size") is None:
        values["embedding_size"] = values.get("vocab_size")
    many, groups = values.get("multi_query_attention"), values.get("n_kv_heads")
    if many is None:
        return
    if not isinstance(many, bool):
        raise CheckpointError(f"{path}: multi_query_attention is {many!r}, expected true, false or null")
    meant = 1 if many else values.get("n_heads")
    if groups not in (None, meant):
        raise CheckpointError(
            f"{path}: multi_query_attention is {many}, which means {meant} KV heads, and n_kv_heads is {groups!r}: "
            "leave out the one that is wrong"
        )
    values["n_kv_heads"] = meant


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; give a directory in a Hugging Face layout") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object with keys, found {type(values).__name__}")
    return values


def _flatten_rope(path: Path, values: dict[str, Any]) -> None:
    """transformers 5 writes rope_theta into `rope_parameters`; earlier ones beside `rope_scaling`."""
    found: dict[str, Any] | None = None
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        if kind != "default" and kind not in _SCALED:
            raise CheckpointError(
                f"{path}: {key} is {rope!r}; this model knows only the default rotary embedding and those scaled as "
                f"{', '.join(_SCALED)}, and would read such weights wrongly at every position"
            )
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"{path}: {key} has partial_rotary_factor {rope['partial_rotary_factor']}, expected 1"
            )
        scaled = None if kind == "default" else _scaling(path, key, kind, rope)
        if scaled is None and (more := sorted(rope.keys() - _ROPE_KEYS)):
            raise CheckpointError(
                f"{path}: {key} is {rope!r}: {', '.join(more)} would change the default rotary embedding, which has no "
                f"such parameter: it is another type than it says, or has to be null"
            )
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        values[key] = None
        found = scaled or found
    values["rope_scaling"] = found


def _scaling(path: Path, key: str, kind: str, rope: dict[str, Any]) -> dict[str, Any]:
    """model.rope_scaling of a scaled rotary embedding."""
    fields = {name: value for name, value in rope.items() if name not in _ROPE_KEYS and value is not None}
    try:
        for name, value in fields.items():
            if type(value) is int and name != "original_max_position_embeddings":
                fields[name] = float(value)  # JSON may spell 8.0 as 8
        if kind == "yarn":
            _resolve_yarn(fields)
        return RopeScaling.model_validate({"rope_type": kind, **fields}).model_dump()
    except (ValidationError, OverflowError, TypeError) as error:
        errors = error.errors() if isinstance(error, ValidationError) else [{"loc": (), "msg": str(error)}]
        reasons = [f"{'.'.join(map(str, one['loc']))} {one['msg']}".strip() for one in errors]
        raise CheckpointError(f"{path}: {key} is {rope!r}: {'; '.join(reasons)}") from error


def _resolve_yarn(fields: dict[str, Any]) -> None:
    """What transformers knows beside our fields: a range that is rounded (always here), and DeepSeek's mscale and
    mscale_all_dim, of which it makes the attention factor (`modeling_rope_utils.get_mscale`). Raises TypeError."""
    if fields.get("truncate", True) is True:  # else it stays, and is an unknown field
        fields.pop("truncate", None)
    mscales = fields.pop("mscale", None), fields.pop("mscale_all_dim", None)
    factor = fields.get("factor", 1.0)
    if "attention_factor" not in fields and all(mscales):
        one, all_dim = (1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0 for mscale in mscales)
        fields["attention_factor"] = one / all_dim
