"""The run's configuration in megatron-core's words."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.config.layout import pipeline_split, row_tokens
from illada_megatron.config.pipeline_split import is_even, megatron_layout
from illada_megatron.model.rotary import attention_scale
from illada_megatron.runtime.device import Device, has_transformer_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of weights and activations, by training.precision; with fp8 that of what the products in FP8 take and give."""


def transformer_config(config: RunConfig, device: Device, implementation: str) -> TransformerConfig:
    """megatron-core's TransformerConfig for the model, layout, precision, layers of `implementation` (layer_specs.py)
    and the fusions that `device` has."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.precision]
    virtual = parallel.model_chunks
    overlaps_p2p = parallel.overlaps_p2p(device.is_cuda)
    recompute = config.training.recompute
    # Weights come from `initial_weights`; megatron-core only has to mark the parameters as parallel. Those made in FP8
    # are quantised at once, and delayed scaling would remember the largest value of fresh memory.
    kept_in_fp8 = config.training.precision == "fp8" and config.fp8.param_gather
    initial = torch.nn.init.zeros_ if kept_in_fp8 else _untouched
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        softmax_scale=attention_scale(model),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=initial,
        output_layer_init_method=initial,
        embedding_init_method=_untouched,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **_fp8_options(config),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout=_uneven_layout(config),
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # stages then ask each other how long a micro-batch's row is; megatron-core wants the dispatcher of its experts,
        # which this model has none of, to allow it
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1 and row_tokens(config) is None,
        moe_token_dispatcher_type="alltoall",
        deterministic_mode=config.training.deterministic,
        # not while gloo is sending it: NCCL's streams keep memory until they have read it
        deallocate_pipeline_outputs=device.is_cuda or not overlaps_p2p,
        tp_comm_overlap=parallel.tp_comm_overlap,
        overlap_p2p_comm=overlaps_p2p,
        batch_p2p_comm=device.is_cuda and not overlaps_p2p,  # gloo sends and receives one by one
        batch_p2p_sync=False,  # for a race of older versions of torch: the host would wait at each exchange
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        # megatron-core's fusions go through torch.compile or TE; on a CPU they cost a compiler run in every process.
        bias_activation_fusion=device.is_cuda and implementation != "local",
        # megatron-core's name for "take the spec's activation": ours is in activation.py
        use_te_activation_func=implementation == "local",
        bias_dropout_fusion=device.is_cuda,
        masked_softmax_fusion=False,
        apply_rope_fusion=device.is_cuda and has_transformer_engine(),
        # In fp32, over micro-batches: TE's linears add to main_grad themselves, the local ones too (main_grad.py)
        gradient_accumulation_fusion=implementation == "transformer_engine",
    )


def _uneven_layout(config: RunConfig) -> str | None:
    """Megatron's notation of the layers of each stage; None: all have the same number."""
    split = pipeline_split(config)
    return None if is_even(split) else megatron_layout(split)


def _fp8_options(config: RunConfig) -> dict[str, Any]:
    """fp8: megatron-core's name of the format; None is its default, and means that nothing is done in FP8. Its
    attention stays bf16 (fp8_dot_product_attention), and its head in 0.19 (fp8_output_proj)."""
    if config.training.precision != "fp8":
        return {}
    fp8 = config.fp8
    first, last = fp8.bf16_layers
    return {
        "fp8": "e4m3" if fp8.recipe in ("blockwise", "mxfp8") else "hybrid",
        "fp8_recipe": fp8.recipe,
        "fp8_param": fp8.param_gather,
        "fp8_amax_history_len": fp8.amax_history_len,
        "fp8_amax_compute_algo": fp8.amax_compute_algo,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def _untouched(weight: Tensor) -> Tensor:
    return weight
