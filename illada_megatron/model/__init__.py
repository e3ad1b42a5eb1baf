"""The mask predictor: a bidirectional Llama-like Transformer made of megatron-core's parallel layers.

In: a configuration, a device.
Out: pipeline stages that give the masked loss or logits.
Never imported here: checkpoints, training, data.
"""

from illada_megatron.model.initial_weights import fill_initial_weights
from illada_megatron.model.mask_predictor import MaskPredictor, build_model_chunks
from illada_megatron.model.packing import equal_segments, pack
from illada_megatron.model.transformer_config import transformer_config

__all__ = [
    "MaskPredictor",
    "build_model_chunks",
    "equal_segments",
    "fill_initial_weights",
    "pack",
    "transformer_config",
]
