"""Loss spikes: what is one, and that a run names it with the t of its samples."""

import json
from pathlib import Path

import numpy as np
import pytest
from launch import Illada

from illada_megatron.config import load_config
from illada_megatron.config.schema import FaultsConfig
from illada_megatron.diffusion import sample_t
from illada_megatron.training.spikes import SpikeDetector


def _losses(count: int) -> list[float]:
    """A falling, noisy loss with a heavy tail upwards."""
    random = np.random.default_rng(3)
    return list(6.0 - 2.0 * np.arange(count) / count + 0.1 * random.gamma(2.0, 1.0, count))


def test_no_spike_in_noise_and_each_one_beyond_it() -> None:
    """A mean and a variance that have just seen a spike do not see the next; a median does. The window fills first."""
    detector = SpikeDetector(FaultsConfig(spike_window_steps=50, spike_threshold=8.0))
    spikes = {10: 40.0, 200: 9.0, 201: 9.0, 203: 50.0, 204: 9.0}
    found = {step: detector.observe(spikes.get(step, loss)) for step, loss in enumerate(_losses(400))}
    assert [step for step, one in found.items() if one is not None] == [200, 201, 203, 204]
    assert found[200] is not None
    middle, deviation = found[200]
    assert middle == pytest.approx(np.median(_losses(400)[150:200]))
    assert 0.05 < deviation < 0.3


def test_a_lower_loss_or_equal_losses_are_none() -> None:
    detector = SpikeDetector(FaultsConfig(spike_window_steps=10))
    assert all(detector.observe(5.0) is None for _ in range(15))
    assert detector.observe(6.0) is None  # of equal losses nothing is known
    noisy = SpikeDetector(FaultsConfig(spike_window_steps=10))
    assert all(noisy.observe(5.0 + 0.01 * (step % 3)) is None for step in range(20))
    assert noisy.observe(0.0) is None
    off = SpikeDetector(FaultsConfig(spike_window_steps=None))
    assert all(off.observe(loss) is None for loss in [*range(20), 1000.0])


def test_goes_on_after_a_restart() -> None:
    """The window is part of a checkpoint; a shorter one in the configuration takes the newest."""
    straight, first = (SpikeDetector(FaultsConfig(spike_window_steps=20)) for _ in range(2))
    losses = [*_losses(30), 30.0]
    for loss in losses[:25]:
        straight.observe(loss)
        first.observe(loss)
    second = SpikeDetector(FaultsConfig(spike_window_steps=20))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    shorter = SpikeDetector(FaultsConfig(spike_window_steps=10))
    shorter.load_state_dict(first.state_dict())
    assert shorter.state_dict()["losses"] == losses[15:25]
    for loss in losses[25:]:
        expected = straight.observe(loss)
        assert second.observe(loss) == expected
    assert expected is not None


def test_a_run_names_its_spike(tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada) -> None:
    """A threshold that any higher loss passes: the line names samples and t, the log has every t."""
    jsonl = tmp_path / "steps.jsonl"
    options = ["training.train_steps=20", "faults.spike_window_steps=10", "faults.spike_threshold=0.5"]
    tensorboard = tmp_path / "tensorboard"
    outcome = illada(
        "train", *tiny_run, *options, f"logging.jsonl_path={jsonl}", f"logging.tensorboard_dir={tensorboard}"
    )
    assert outcome.code == 0, outcome.err
    steps = [json.loads(line) for line in jsonl.read_text().splitlines()]
    spikes = [one for one in steps if one["spike"] is not None]
    assert spikes
    config = load_config(None, tiny_run)
    for one in spikes:
        before = [other["loss"] for other in steps[one["step"] - 11 : one["step"] - 1]]
        spike = one["spike"]
        assert spike["loss"] == one["loss"] > np.median(before) == pytest.approx(spike["median"])
        samples = range(4 * one["step"] - 4, 4 * one["step"])
        assert (spike["first_sample"], spike["end_sample"]) == (samples.start, samples.stop)
        assert spike["t"] == [sample_t(sample, config.diffusion, config.training.seed) for sample in samples]
        assert f"samples {samples.start} to {samples.stop - 1}, t {min(spike['t']):.3f}" in outcome.out
    assert b"loss spike" in b"".join(path.read_bytes() for path in tensorboard.iterdir())
