"""The run's configuration in megatron-core's words."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from illada_megatron.config import RunConfig
from illada_megatron.model.rotary import attention_scale
from illada_megatron.runtime.device import Device, has_apex, has_transformer_engine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: RunConfig, device: Device, implementation: str) -> TransformerConfig:
    """megatron-core's TransformerConfig for the model, layout, precision, layers of `implementation` (layer_specs.py)
    and the fusions that `device` has."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.training.precision]
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    overlaps_p2p = parallel.overlaps_p2p(device.is_cuda)
    recompute = config.training.recompute
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
        # Weights come from `initial_weights`; megatron-core only has to mark the parameters as parallel.
        init_method=_untouched,
        output_layer_init_method=_untouched,
        embedding_init_method=_untouched,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
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
        # In fp32, over micro-batches: TE's linears add to main_grad themselves, megatron-core's need Apex's GEMM
        gradient_accumulation_fusion=device.is_cuda and (implementation == "transformer_engine" or has_apex()),
    )


def _untouched(weight: Tensor) -> Tensor:
    return weight
