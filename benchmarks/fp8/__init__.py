"""FP8 without a GPU: Transformer Engine's own Python over stand-ins for its kernels."""
