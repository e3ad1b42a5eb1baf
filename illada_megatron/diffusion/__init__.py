"""The noising process: t, masks, segments and loss weights, all pure functions of (seed, purpose, sample index).

In: tokens of samples, a seed.
Out: a `MaskedBatch`.
Never imported here: megatron-core, models, generators with a state.
"""

from illada_megatron.diffusion.batch import Corpus, MaskedBatch, make_masked_batch
from illada_megatron.diffusion.noise import philox, uniforms, words
from illada_megatron.diffusion.schedule import mask_probability, sample_t, sample_times
from illada_megatron.diffusion.segments import Boundary, make_segments, sample_boundary, sample_spans

__all__ = [
    "Boundary",
    "Corpus",
    "MaskedBatch",
    "make_masked_batch",
    "make_segments",
    "mask_probability",
    "philox",
    "sample_boundary",
    "sample_spans",
    "sample_t",
    "sample_times",
    "uniforms",
    "words",
]
