"""Text from a mask predictor: continuation, infilling, and how they look while they happen."""

from illada_megatron.generation.denoise import DenoiseConfig, Denoised, Predict, denoise_block, generate, infill
from illada_megatron.generation.render import render

__all__ = ["DenoiseConfig", "Denoised", "Predict", "denoise_block", "generate", "infill", "render"]
