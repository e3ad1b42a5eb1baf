"""Text from a mask predictor: continuation, infilling, and how they look while they happen.

In: a model as a function from tokens to logits; a prompt.
Out: tokens, and the steps in which they came.
Never imported here: megatron-core, checkpoints, training.
"""

from illada_megatron.generation.denoise import DenoiseConfig, Denoised, Predict, denoise_block, generate, infill
from illada_megatron.generation.render import render

__all__ = ["DenoiseConfig", "Denoised", "Predict", "denoise_block", "generate", "infill", "render"]
