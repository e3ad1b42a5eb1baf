"""What is said of samples' work is what is drawn for them."""

import itertools

import numpy as np
import pytest

from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.masking import sample_masks
from illada_megatron.diffusion.noise import uniforms, uniforms_of_many, words, words_of_many
from illada_megatron.diffusion.segments import sample_boundary, sample_spans
from illada_megatron.diffusion.work import work_of_samples

LENGTH, SEED = 512, 2**63 + 5
CONFIGS = [
    {"attention_boundary": boundary, "t_sampling": sampling, "t_per": t_per, "mask_sampling": masks}
    for boundary, sampling, t_per, masks in itertools.product(
        ("split", "truncate", "none"),
        ("uniform", "stratified", "antithetic"),
        ("sequence", "segment"),
        ("bernoulli", "exact_count"),
    )
]
MORE = [
    {"complementary_masks": True, "split_probability": 0.7, "t_per": "segment", "t_group_size": 5},
    {"noise_schedule": "cosine", "mask_sampling": "exact_count", "t_min": 0.1, "t_max": 0.9},
    {"attention_boundary": "truncate", "truncate_probability": 0.6},
]


class Text:
    sequence_length = LENGTH

    def document_starts(self, sample_index: int) -> np.ndarray:
        raise AssertionError(f"the index was asked for the documents of {sample_index}")


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_streams_of_many_are_those_of_one(count: int) -> None:
    indices = np.array([0, 1, 7, 2**31, 2**40 + 3, 2**62], dtype=np.int64)
    for found, index in zip(words_of_many(SEED, "diffusion.t", indices, count), indices, strict=True):
        assert found.tolist() == words(SEED, "diffusion.t", int(index), count).tolist()
    drawn = uniforms_of_many(SEED, "diffusion.t", indices, count)
    assert drawn[3].tolist() == uniforms(SEED, "diffusion.t", 2**31, count).tolist()


@pytest.mark.parametrize("fields", CONFIGS + MORE, ids=str)
def test_work_is_what_is_drawn(fields: dict[str, object]) -> None:
    config = DiffusionConfig(**fields)  # type: ignore[arg-type]
    first, count = 10**9 + 3, 60
    work = work_of_samples(first, count, LENGTH, config, SEED)
    off = 0.0
    for masked, squared, index in zip(*work, range(first, first + count), strict=True):
        boundary = sample_boundary(index, Text(), config, SEED)
        assert squared == sum(one**2 for one in boundary.segment_tokens)
        lengths, times = sample_spans(index, boundary, config, SEED)
        spans = list(sample_masks(index, lengths, times, config, SEED))
        drawn = sum(np.arange(LENGTH)[span.tokens][span.positions].size for span in spans)
        if config.mask_sampling == "exact_count":
            assert masked == drawn
        variance = sum(span.p * (1 - span.p) * length for span, length in zip(spans, lengths, strict=True))
        assert abs(masked - drawn) < 5 * variance**0.5 + 3
        off += masked - drawn
    assert abs(off) < 5 * (count * LENGTH / 4) ** 0.5


def test_documents_are_not_looked_up() -> None:
    config = DiffusionConfig(attention_boundary="document")
    work = work_of_samples(0, 16, LENGTH, config, SEED)
    assert set(work.squared_lengths) == {LENGTH**2}
    assert len(set(work.masked_tokens)) == 16
    work = work_of_samples(0, 16, LENGTH, DiffusionConfig(attention_boundary="document", t_per="segment"), SEED)
    assert len(set(work.masked_tokens)) == 1
