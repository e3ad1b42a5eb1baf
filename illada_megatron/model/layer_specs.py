"""Which modules make a layer: Transformer Engine's, or megatron-core's own with this package's norm, attention core and
activation."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from illada_megatron.config import ConfigError, RunConfig, RuntimeConfig
from illada_megatron.model.activation import SwiGLU
from illada_megatron.model.attention import SegmentAttention, SegmentSelfAttention
from illada_megatron.model.main_grad import bind_weight_gradient
from illada_megatron.model.norm import RMSNorm
from illada_megatron.model.remade_input import ColumnLinear, RowLinear
from illada_megatron.runtime.device import (
    Device,
    fp8_problem,
    has_transformer_engine,
    transformer_engine_problem,
    transformer_engine_version,
)

# Bidirectional: with packed segments no_mask means "every position of the segment".
_BIDIRECTIONAL = {"attn_mask_type": AttnMaskType.no_mask}


def choose_implementation(settings: RuntimeConfig, device: Device) -> str:
    """ "transformer_engine" or "local" for `runtime.transformer_impl`; auto takes TE on a GPU where it is installed.

    Raises ConfigError where TE is asked for and cannot be used.
    """
    wanted = settings.transformer_impl
    usable = device.is_cuda and has_transformer_engine()
    if wanted == "transformer_engine" and not usable:
        problem = transformer_engine_problem()
        missing = f"is not usable, because {problem}" if problem else "is not installed"
        if not device.is_cuda:
            missing = "needs a GPU, and this rank computes on a CPU"
        raise ConfigError(f"runtime.transformer_impl: transformer_engine {missing}; use auto or local")
    return "transformer_engine" if usable and wanted != "local" else "local"


def check_context(config: RunConfig, implementation: str) -> None:
    """Raises ConfigError where the layers of `implementation` cannot share sequences as the configuration wants."""
    ranks, precision = config.parallel.context_parallel_size, config.training.precision
    if ranks == 1 or implementation != "transformer_engine":
        return
    if transformer_engine_version() < (2, 20):
        # 2.11 (context_parallel.py) leaves in padding's gradients what lay in memory, and it goes into the weights'
        raise ConfigError(
            f"parallel.context_parallel_size {ranks}: needs Transformer Engine 2.20 or newer, which clears the "
            "gradients of padding; install it, or set runtime.transformer_impl=local"
        )
    if config.training.deterministic:
        raise ConfigError(
            f"parallel.context_parallel_size {ranks} with training.deterministic true: Transformer Engine has no "
            "deterministic attention over ranks with packed segments; set one of them back, or "
            "runtime.transformer_impl=local"
        )
    if precision == "fp32":
        raise ConfigError(
            f"parallel.context_parallel_size {ranks}: Transformer Engine shares sequences in fused attention, which "
            "takes bf16, found training.precision fp32: set training.precision=bf16, or runtime.transformer_impl=local"
        )


def check_precision(config: RunConfig, device: Device) -> None:
    """Raises ConfigError where training.precision fp8 finds no Transformer Engine or a device without this FP8."""
    if config.training.precision != "fp8":
        return
    mend = "set training.precision=bf16"
    if choose_implementation(config.runtime, device) == "local":
        found = f"{transformer_engine_problem() or 'it is not installed'}" if device.is_cuda else f"found {device.name}"
        raise ConfigError(
            f"training.precision fp8 needs Transformer Engine on a GPU: {found}; install it (README.md), or {mend}"
        )
    if (problem := fp8_problem(config.fp8.recipe)) is not None:
        raise ConfigError(f"fp8.recipe {config.fp8.recipe} cannot run on {device.name}: {problem}, or {mend}")


def block_spec(config: TransformerConfig, implementation: str, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage (chunk `vp_stage`) and the final norm."""
    if implementation == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
        layer.submodules.self_attention.params = dict(_BIDIRECTIONAL)
    else:
        layer, norm = _local_layer(config.qk_layernorm), RMSNorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=vp_stage), layer_norm=norm
    )


def _local_layer(qk_layernorm: bool) -> ModuleSpec:
    bind_weight_gradient()
    qk_norm = RMSNorm if qk_layernorm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnLinear,
        core_attention=SegmentAttention,
        linear_proj=RowLinear,
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=SegmentSelfAttention, params=dict(_BIDIRECTIONAL), submodules=attention),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnLinear, activation_func=SwiGLU, linear_fc2=RowLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
