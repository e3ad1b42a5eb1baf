"""A run's configuration in the names of Megatron's arguments, which its checkpoints carry, and back."""

from argparse import Namespace
from typing import Any

import torch

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.megatron.stage_parameters import Implementation
from illada_megatron.config import RunConfig
from illada_megatron.config.layout import pipeline_split
from illada_megatron.config.pipeline_split import UNEVEN_OPTIONS, is_even, megatron_layout, split_of_megatron
from illada_megatron.config.schema import RopeScaling

# our field -> Megatron's argument, where they mean the same
_SAME = {
    "model": {
        "num_layers": "num_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_attention_heads": "num_attention_heads",
        "kv_channels": "kv_channels",
        "add_qkv_bias": "add_qkv_bias",
        "qk_layernorm": "qk_layernorm",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "rotary_base": "rotary_base",
        "norm_epsilon": "norm_epsilon",
        "init_method_std": "init_method_std",
    },
    "parallel": {
        "tensor_model_parallel_size": "tensor_model_parallel_size",
        "pipeline_model_parallel_size": "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size": "virtual_pipeline_model_parallel_size",
        "context_parallel_size": "context_parallel_size",
        "data_parallel_size": "data_parallel_size",
        "sequence_parallel": "sequence_parallel",
        "use_distributed_optimizer": "use_distributed_optimizer",
        "overlap_grad_reduce": "overlap_grad_reduce",
        "overlap_param_gather": "overlap_param_gather",
        "ddp_bucket_size": "ddp_bucket_size",
    },
    "data": {"sequence_length": "seq_length"},
    "optimizer": {
        "weight_decay": "weight_decay",
        "adam_beta1": "adam_beta1",
        "adam_beta2": "adam_beta2",
        "adam_eps": "adam_eps",
        "clip_grad": "clip_grad",
    },
    "schedule": {"min_lr": "min_lr", "warmup_steps": "lr_warmup_iters"},
    "training": {
        "lr": "lr",
        "micro_batch_size": "micro_batch_size",
        "global_batch_size": "global_batch_size",
        "train_steps": "train_iters",
        "seed": "seed",
    },
}
_FLOATS = {"rotary_base", "norm_epsilon", "init_method_std", "weight_decay", "adam_eps", "clip_grad", "min_lr", "lr"}
# what this model is, in arguments that leave no trace in the tensors' names and shapes
_MEANING = {
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "swiglu": True,
    "add_bias_linear": False,
    "multi_latent_attention": False,
}


def namespace(config: RunConfig, iteration: int, consumed_samples: int, implementation: Implementation) -> Namespace:
    """The arguments that Megatron compares and takes over when it loads a checkpoint."""
    values: dict[str, Any] = dict(_MEANING)
    dumped = config.model_dump(mode="python")
    for section, fields in _SAME.items():
        values |= {argument: dumped[section][field] for field, argument in fields.items()}
    model, precision, split = config.model, config.training.precision, pipeline_split(config)
    return Namespace(
        **values
        | _rope_arguments(model.rope_scaling)
        | {
            "kv_channels": model.head_dim,
            "group_query_attention": model.num_query_groups != model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            "padded_vocab_size": model.padded_vocab_size,
            "make_vocab_size_divisible_by": model.make_vocab_size_divisible_by,
            "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
            "add_position_embedding": True,
            "bf16": precision != "fp32",
            "fp16": False,
            "params_dtype": torch.bfloat16 if precision != "fp32" else torch.float32,
            "transformer_impl": implementation,
            "pipeline_model_parallel_layout": None if is_even(split) else megatron_layout(split),
            "ckpt_format": "torch",
            "iteration": iteration,
            "consumed_train_samples": consumed_samples,
            "no_save_rng": True,
            "tokenizer_type": None,
            "data_parallel_random_init": False,
        }
    )


def _rope_arguments(scaling: RopeScaling | None) -> dict[str, Any]:
    """Megatron scales rotary frequencies as llama3 with the numbers of Llama 3, and linearly. Raises CheckpointError
    where it has no such scaling."""
    values: dict[str, Any] = {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    if scaling is None:
        return values
    if scaling.rope_type == "linear":
        return values | {"rotary_seq_len_interpolation_factor": scaling.factor}
    if scaling == _llama3(scaling.factor):
        return values | {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}
    raise CheckpointError(
        f"model.rope_scaling is {scaling.model_dump(exclude_none=True)}: Megatron's arguments have only linear scaling "
        f"and {_llama3(scaling.factor).model_dump(exclude_none=True)} with any factor: its format cannot say this model"
    )


def _rope_scaling(args: Any) -> dict[str, Any] | None:
    """model.rope_scaling of Megatron's arguments."""
    if getattr(args, "use_rope_scaling", False):
        return _llama3(float(getattr(args, "rope_scaling_factor", 8.0))).model_dump()
    factor = getattr(args, "rotary_seq_len_interpolation_factor", None)
    return None if factor is None else RopeScaling(rope_type="linear", factor=float(factor)).model_dump()


def _llama3(factor: float) -> RopeScaling:
    """With the defaults of megatron-core's RotaryEmbedding, which Megatron does not change."""
    return RopeScaling(
        rope_type="llama3",
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def config_values(args: Any, where: object) -> dict[str, Any]:
    """The configuration, as values for `load_config`, of a checkpoint with Megatron's arguments `args`.

    `model.mask_token_id` is not among them: Megatron's models have none. Raises CheckpointError where the model is
    another than ours.
    """
    if not isinstance(args, Namespace):
        raise CheckpointError(f"{where}: has no `args`, expected Megatron's arguments: its model is not known")
    for name, expected in _MEANING.items():
        if (found := getattr(args, name, expected)) != expected:
            raise CheckpointError(f"{where}: args.{name} is {found!r}, expected {expected!r}: another kind of model")
    values: dict[str, Any] = {
        section: {
            field: float(value) if field in _FLOATS else value
            for field, argument in fields.items()
            if (value := getattr(args, argument, None)) is not None
        }
        for section, fields in _SAME.items()
    }
    if not values["parallel"].get("overlap_grad_reduce"):
        values["parallel"].pop("ddp_bucket_size", None)  # Megatron does not look at it then
    model, tensor = values["model"], getattr(args, "tensor_model_parallel_size", 1)
    if "num_layers" not in model or "num_attention_heads" not in model:
        raise CheckpointError(f"{where}: args lack num_layers or num_attention_heads, expected Megatron's arguments")
    values["parallel"]["pipeline_layout"] = _pipeline_layout(args, values, where)
    if model.get("kv_channels", 0) * model["num_attention_heads"] == model.get("hidden_size"):
        del model["kv_channels"]  # ours is None where it follows from the others
    padded = getattr(args, "padded_vocab_size", None)
    model.setdefault("vocab_size", padded)
    # Megatron's padding depends on tensor parallel: this multiple leads to the same size
    multiple = getattr(args, "make_vocab_size_divisible_by", 128) * tensor
    if padded is not None and -(-model["vocab_size"] // multiple) * multiple != padded:
        multiple = padded
    grouped = getattr(args, "group_query_attention", False)
    model |= {
        "make_vocab_size_divisible_by": multiple,
        "num_query_groups": args.num_query_groups if grouped else model["num_attention_heads"],
        "rope_scaling": _rope_scaling(args),
        "tie_word_embeddings": not getattr(args, "untie_embeddings_and_output_weights", False),
    }
    model["max_sequence_length"] = max(
        model.get("max_sequence_length", 0), values["data"].get("sequence_length", 0)
    ) or model.pop("max_sequence_length", 1)
    if getattr(args, "fp16", False):
        raise CheckpointError(f"{where}: args.fp16 is True, expected bf16 or fp32")
    values["training"]["precision"] = "bf16" if getattr(args, "bf16", False) else "fp32"
    return values


def _pipeline_layout(args: Any, values: dict[str, Any], where: object) -> str:
    """parallel.pipeline_layout of Megatron's arguments."""
    written = getattr(args, "pipeline_model_parallel_layout", None)
    if isinstance(written, str):
        return written
    asked = {name: value for name in UNEVEN_OPTIONS if (value := getattr(args, name, None))}
    parallel, layers = values["parallel"], values["model"].get("num_layers")
    pipeline, virtual = (parallel.get(f"{name}pipeline_model_parallel_size", 1) for name in ("", "virtual_"))
    numbers = (layers, pipeline, virtual, *asked.values())
    if written is not None or not all(isinstance(one, int) and one > 0 for one in numbers):
        raise CheckpointError(
            f"{where}: args.pipeline_model_parallel_layout is {written!r}, of {layers} layers, {pipeline} stages of "
            f"{virtual} chunks and {asked or 'no other option'}: expected Megatron's notation or whole numbers"
        )
    try:
        split = split_of_megatron(layers, pipeline, virtual, asked)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return "even" if is_even(split) else megatron_layout(split)


def progress(args: Any, iteration: int, optimizer_step: int) -> dict[str, Any]:
    """Where Megatron's run was, as a checkpoint's record has it. Its learning-rate schedule is the configuration's."""
    return {
        "step": iteration,
        "consumed_samples": int(getattr(args, "consumed_train_samples", 0)),
        "schedule": {"decay_start": "never", "decay_start_step": None, "plateau": None},
        "optimizer_step": optimizer_step,
    }
