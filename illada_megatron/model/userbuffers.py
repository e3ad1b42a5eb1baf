"""Transformer Engine's userbuffers: memory of tensor-parallel neighbours, which products write to and read from while
they run (parallel.tp_comm_overlap)."""

from megatron.core.transformer.transformer_config import TransformerConfig

from illada_megatron.config import ConfigError


def start_userbuffers(config: TransformerConfig, implementation: str, tokens: int) -> None:
    """Let the ranks of each tensor-parallel group share buffers of the `tokens` of a micro-batch that they have
    together, before the layers are made. All ranks of the run call it, once (as megatron-core's training/initialize.py
    does).

    Raises ConfigError where Transformer Engine is not there.
    """
    if implementation != "transformer_engine":
        raise ConfigError(
            "parallel.tp_comm_overlap true needs Transformer Engine's layers, and this run has its own "
            "(see `illada doctor`): install it, or set tp_comm_overlap=false"
        )
    from transformer_engine.pytorch import UserBufferQuantizationMode as Mode
    from transformer_engine.pytorch import initialize_ub

    modes = [Mode.FP8 if config.fp8 else Mode.NONE]
    if config.fp8 and config.first_last_layers_bf16:
        modes.append(Mode.NONE)
    initialize_ub(
        shape=[tokens, config.hidden_size],
        tp_size=config.tensor_model_parallel_size,
        quantization_modes=modes,
        ub_cfgs={},
        # over gloo each rank would be connected to every other, a socket each
        bootstrap_backend="nccl",
    )
