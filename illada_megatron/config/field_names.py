"""Where a name that somebody typed for a field belongs: to another section, or to another program."""

import difflib
import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from illada_megatron.config.layout import RunConfig
from illada_megatron.config.megatron_names import OPTIONS, find_option, spelled
from illada_megatron.config.schema.data import blend_override, weighted_paths

# Names of transformers' configurations, of its TrainingArguments and of LLaDA's and OLMo's config.json -> the field,
# or, with a space, what to do
_HUGGING_FACE = {
    "num_hidden_layers": "model.num_layers",
    "n_layers": "model.num_layers",
    "n_layer": "model.num_layers",
    "d_model": "model.hidden_size",
    "n_embd": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "mlp_hidden_size": "model.ffn_hidden_size",
    "n_heads": "model.num_attention_heads",
    "n_head": "model.num_attention_heads",
    "num_key_value_heads": "model.num_query_groups",
    "n_kv_heads": "model.num_query_groups",
    "head_dim": "model.kv_channels",
    "rope_theta": "model.rotary_base",
    "rms_norm_eps": "model.norm_epsilon",
    "layer_norm_eps": "model.norm_epsilon",
    "max_position_embeddings": "model.max_sequence_length",
    "initializer_range": "model.init_method_std",
    "attention_bias": "model.add_qkv_bias",
    "weight_tying": "model.tie_word_embeddings",
    "final_logit_softcapping": "model.logit_softcap",
    "hidden_act": "leave it out: the activation is always SwiGLU's silu",
    "torch_dtype": "training.precision",
    "dtype": "training.precision",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "fp8": "training.precision",
    "learning_rate": "training.lr",
    "per_device_train_batch_size": "training.micro_batch_size",
    "train_batch_size": "training.global_batch_size",
    "gradient_accumulation_steps": "set training.global_batch_size = micro_batch_size * this * data-parallel size",
    "max_steps": "training.train_steps",
    "num_train_epochs": "set training.train_steps; data.max_epochs bounds how often a corpus is read",
    "gradient_checkpointing": "training.recompute",
    "warmup_ratio": "set schedule.warmup_steps = this * training.train_steps",
    "lr_scheduler_type": "schedule.decay_style",
    "max_grad_norm": "optimizer.clip_grad",
    "adam_epsilon": "optimizer.adam_eps",
    "beta1": "optimizer.adam_beta1",
    "beta2": "optimizer.adam_beta2",
    "output_dir": "checkpoint.save_dir",
    "save_steps": "checkpoint.interval_steps",
    "save_total_limit": "checkpoint.keep_last",
    "resume_from_checkpoint": "checkpoint.load_dir",
    "eval_steps": "validation.interval_steps",
    "logging_steps": "logging.interval_steps",
    "logging_dir": "logging.tensorboard_dir",
    "max_seq_length": "data.sequence_length",
    "max_length": "data.sequence_length",
    "train_file": "data.train_paths",
    "validation_file": "data.validation_paths",
    "tokenizer_name": "data.tokenizer_path",
    "dataloader_num_workers": "data.loader_threads",
}


def field_paths() -> list[str]:
    """All fields, in the schema's order: `section.field`, and those that no section has."""
    sections = dict(_sections())
    alone = [name for name in RunConfig.model_fields if name not in sections]
    return alone + [f"{name}.{field}" for name, section in sections.items() for field in section.model_fields]


def hint_for(name: str, known: list[str], own: str = "") -> str:
    """What to write instead of the unknown field `name`, to follow a semicolon.

    known: names that stand where it was typed. own: where that is, as `training.` or, at the top, nothing."""
    typed = name.lstrip("-").replace("-", "_")
    if typed in known:
        return f"did you mean {own}{typed}?"
    if same := [path for path in field_paths() if path.rpartition(".")[2] == typed]:
        return f"did you mean {_listed(same)}?"
    if elsewhere := _of_other_programs(typed):
        return elsewhere
    others = {option.name.lstrip("-").replace("-", "_") for option in OPTIONS} | _HUGGING_FACE.keys()
    near = difflib.get_close_matches(typed, [*others.difference(ends := _ends()), *ends], n=1, cutoff=0.85)
    if near and near[0] not in ends and (meant := _of_other_programs(near[0])):
        return f"did you mean {near[0]}? {meant}"
    if close := difflib.get_close_matches(typed, known, n=1):
        return f"did you mean {close[0]}?"
    if close := difflib.get_close_matches(typed, ends, n=1, cutoff=0.75):
        return f"did you mean {_listed([path for path in field_paths() if path.rpartition('.')[2] == close[0]])}?"
    return f"known: {', '.join(known)}"


def hint_for_option(name: str, values: Sequence[str]) -> str | None:
    """What to write instead of `--name values`, typed where overrides belong; None: nothing like it is known."""
    typed = spelled(name).removeprefix("--").replace("-", "_")
    option = find_option(name)
    same = [path for path in field_paths() if path.rpartition(".")[2] == typed]
    paths = [option.field] if option is not None and option.field in field_paths() else same
    here = _HUGGING_FACE.get(typed)
    if not paths and here in field_paths():
        paths = [here]
    if len(values) > 1 and option is not None and option.kind == "list" and (blend := weighted_paths(values)):
        return f"write {blend_override(blend)}"
    if not paths:
        return here if here is not None else _of_other_programs(typed)
    value = ",".join(values) if values else "true"
    listed = option is not None and option.kind == "list"
    written = " or ".join(f"{path}={f'[{value}]' if listed else value}" for path in paths)
    note = f" ({option.note})" if option is not None and option.computed and option.note else ""
    return f"write {written}{note}"


def _of_other_programs(name: str) -> str | None:
    option = find_option(name)
    if option is not None and option.field in field_paths():
        note = f": {option.note}" if option.note else ""
        return f"Megatron's {option.name} is {option.field} here{note}"
    here = _HUGGING_FACE.get(name)
    if here is not None:
        return here if " " in here else f"here it is {here}"
    if option is not None and option.field == "model":
        return f"Megatron's {option.name} has no field here: {option.note}"
    return f"Megatron's {spelled(name)} is {option.group}: {option.note}" if option is not None else None


def _ends() -> list[str]:
    """The fields' names without their sections."""
    return sorted({path.rpartition(".")[2] for path in field_paths()})


def _listed(paths: list[str]) -> str:
    *before, last = paths
    return f"{', '.join(before)} or {last}" if before else last


def _sections() -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in RunConfig.model_fields.items():
        section = section_class(field.annotation)
        if section is not None:
            yield name, section


def section_class(annotation: Any) -> type[BaseModel] | None:
    """The class of a section, of a list's items, or of what may be null."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (list, Union, types.UnionType):
        return next(filter(None, map(section_class, get_args(annotation))), None)
    return None
