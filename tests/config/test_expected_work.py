"""What a sample takes on average is the mean of what `diffusion/work.py` says of many."""

import pytest

from illada_megatron.config import load_config
from illada_megatron.config.expected_work import mean_attended, mean_masked
from illada_megatron.config.schema import DiffusionConfig
from illada_megatron.diffusion.work import work_of_samples

LENGTH, COUNT = 1024, 4000


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_boundary": "none", "eps": 0.3},
        {"attention_boundary": "none", "eps": 0.3, "mask_sampling": "exact_count"},
        {"attention_boundary": "truncate", "truncate_probability": 0.6},
        {"noise_schedule": "cosine", "t_min": 0.2, "t_max": 0.7, "split_probability": 1.0, "t_per": "segment"},
    ],
    ids=str,
)
def test_means(fields: dict[str, object]) -> None:
    diffusion = DiffusionConfig(**fields)  # type: ignore[arg-type]
    work = work_of_samples(0, COUNT, LENGTH, diffusion, seed=7)
    assert mean_attended(diffusion, LENGTH) == pytest.approx(work.squared_lengths.mean() / LENGTH, rel=0.01)
    assert mean_masked(diffusion) == pytest.approx(work.masked_tokens.mean() / LENGTH, rel=0.01)


def test_the_presets() -> None:
    assert mean_attended(load_config("illada-8b").diffusion, 8192) == pytest.approx(0.9 * 8192)
    assert mean_masked(load_config("illada-8b").diffusion) == pytest.approx(0.5005)
