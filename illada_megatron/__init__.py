"""illada-megatron: a Megatron-style 3D-parallel trainer for iLLaDA, a masked-diffusion language model."""

__version__ = "0.1.0"
