"""The simulation of failures against what can be computed by hand, and the command over it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launch import Illada

from illada_megatron.planning import (
    FaultModel,
    best_interval,
    daly_interval,
    expected_goodput,
    simulate,
    young_interval,
)

DAY = 86400.0
# 16,384 GPUs: a failure every three hours
LARGE = FaultModel(
    gpus=16384,
    gpu_mtbf_seconds=16384 * 3 * 3600.0,
    save_stall_seconds=2.0,
    save_seconds=60.0,
    detect_seconds=60.0,
    restart_seconds=240.0,
)
BLOCKING = replace(LARGE, save_stall_seconds=60.0, detect_seconds=0.0)
YEARS = 20 * 365 * DAY


def _parts(run) -> float:
    return run.goodput + run.saving + run.repeated + run.down + run.fewer


def test_without_failures_only_the_stall_costs() -> None:
    """tau / (tau + s); and where saves take longer than the interval, tau / d: each waits for the one before."""
    model = replace(LARGE, gpu_mtbf_seconds=1e30)
    for interval, cycle in ((600.0, 602.0), (30.0, 60.0)):
        run = simulate(model, interval, 10000 * cycle, seed=1)
        assert run.failures == 0
        assert run.goodput == pytest.approx(interval / cycle, rel=1e-3)
        assert expected_goodput(model, interval) == pytest.approx(interval / cycle, rel=1e-3)


@pytest.mark.parametrize("interval", [120.0, 600.0, 3600.0])
def test_blocking_saves_are_dalys(interval: float) -> None:
    """Daly's own formula, written out; the simulation is within four standard errors of it."""
    mtbf, delta, outage = BLOCKING.mtbf_seconds, BLOCKING.save_seconds, BLOCKING.restart_seconds
    daly = interval / (mtbf * math.exp(outage / mtbf) * (math.exp((interval + delta) / mtbf) - 1))
    assert expected_goodput(BLOCKING, interval) == pytest.approx(daly, rel=1e-12)
    parts = [simulate(BLOCKING, interval, YEARS / 16, seed).goodput for seed in range(16)]
    mean = sum(parts) / 16
    error = math.sqrt(sum((part - mean) ** 2 for part in parts) / 15 / 16)
    assert error < 2e-3
    assert abs(mean - daly) < 4 * error


@pytest.mark.parametrize("interval", [20.0, 60.0, 300.0, 3600.0])
def test_asynchronous_saves_are_as_expected(interval: float) -> None:
    """Also where a save takes longer than the interval."""
    run = simulate(LARGE, interval, YEARS, seed=3)
    assert run.goodput == pytest.approx(expected_goodput(LARGE, interval), rel=2e-3)
    assert _parts(run) == pytest.approx(1.0, abs=1e-6)


def test_a_checkpoint_that_is_not_durable_does_not_count() -> None:
    """Writing for ten minutes instead of one costs the nine minutes at each failure, on average nine of 180."""
    slow = replace(LARGE, save_seconds=600.0)
    lost = expected_goodput(LARGE, 900.0) - expected_goodput(slow, 900.0)
    assert lost == pytest.approx(540 / LARGE.mtbf_seconds, rel=0.15)
    found = simulate(LARGE, 900.0, YEARS, 5).goodput - simulate(slow, 900.0, YEARS, 5).goodput
    assert found == pytest.approx(lost, rel=0.05)


def test_the_best_interval_is_near_dalys_for_cheap_saves() -> None:
    model = replace(LARGE, save_stall_seconds=10.0, save_seconds=10.0)
    daly = daly_interval(10.0, model.mtbf_seconds)
    assert daly == pytest.approx(young_interval(10.0, model.mtbf_seconds), rel=0.03)
    interval, run = best_interval(model, YEARS / 4, 7, np.geomspace(daly / 8, daly * 8, 30).tolist())
    assert daly / 1.5 < interval < daly * 1.5
    assert run.goodput >= simulate(model, daly / 8, YEARS / 4, 7).goodput + 0.01
    assert run.goodput >= simulate(model, daly * 8, YEARS / 4, 7).goodput + 0.01


@pytest.mark.parametrize(("mtbf_minutes", "interval_minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_dalys_interval_as_published(mtbf_minutes: float, interval_minutes: float) -> None:
    """Figures 3 to 5 of the paper: saves of 5 minutes, failures every 24 hours, 6 hours, 15 minutes."""
    assert daly_interval(5.0, mtbf_minutes) == pytest.approx(interval_minutes, rel=0.006)


def test_dalys_interval_where_saves_cost_more_than_failures() -> None:
    assert daly_interval(7.0, 3.0) == 3.0
    assert daly_interval(6.0, 3.0) == 3.0


def test_going_on_with_fewer() -> None:
    """128 machines, replaced after four hours, one fails every six: waiting loses four of ten hours, going on about
    one machine in 128 for two thirds of the time, and two starts for each failure."""
    model = replace(
        LARGE, gpus=1024, gpu_mtbf_seconds=1024 * 6 * 3600.0, replacement_seconds=4 * 3600.0, goes_on_with_fewer=True
    )
    fewer = simulate(model, 600.0, YEARS, 11)
    waiting = simulate(replace(model, goes_on_with_fewer=False), 600.0, YEARS, 11)
    assert waiting.goodput < 0.55
    assert fewer.goodput > 0.9
    assert fewer.fewer == pytest.approx(4 / 6 / 128, rel=0.1)
    outages = (model.outage_seconds + model.save_seconds + model.restart_seconds) / (6 * 3600.0)
    assert outages * 0.7 < fewer.down < outages * 1.05
    assert _parts(fewer) == pytest.approx(1.0, abs=1e-6)
    # a smaller and smaller run, but never none
    assert simulate(replace(model, replacement_seconds=1e9), 600.0, YEARS, 11).goodput > 0.0


def test_the_same_seed_gives_the_same_run() -> None:
    assert simulate(LARGE, 300.0, 30 * DAY, 1) == simulate(LARGE, 300.0, 30 * DAY, 1)
    assert simulate(LARGE, 300.0, 30 * DAY, 1) != simulate(LARGE, 300.0, 30 * DAY, 2)
    failures = {simulate(LARGE, interval, 30 * DAY, 1).failures for interval in (100.0, 300.0, 2000.0)}
    assert len(failures) == 1  # all intervals of a sweep meet the same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": 0}, "gpus 0"),
        ({"gpu_mtbf_seconds": -1.0}, "gpu_mtbf_seconds -1.0"),
        ({"gpu_mtbf_seconds": math.nan}, "gpu_mtbf_seconds nan"),
        ({"detect_seconds": -1.0}, "detect_seconds -1.0"),
        ({"restart_seconds": math.inf}, "restart_seconds inf"),
        ({"save_seconds": 1.0}, "save_seconds 1.0 is below save_stall_seconds 2.0"),
        ({"gpus": 8, "goes_on_with_fewer": True}, "one machine cannot go on with fewer"),
    ],
)
def test_bad_models(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(LARGE, **changes)
    with pytest.raises(ValueError, match="interval_seconds 0"):
        simulate(LARGE, 0.0, DAY, 1)


def test_command_shows_the_intervals_of_both_sizes(illada: Illada, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["plan", "--failures", "--save-stall", 2, "--save", 60, "--restart", 240, "--days", 60]
    outcome = illada(*arguments)
    assert outcome.code == 0, outcome.err
    assert "1,024 GPUs, a failure every 48.00 h" in outcome.out
    assert "16,384 GPUs, a failure every 3.00 h" in outcome.out
    for mtbf in (48 * 3600.0, 3 * 3600.0):
        assert f"{young_interval(2.0, mtbf):,.0f} s" in outcome.out
        assert f"{daly_interval(2.0, mtbf):,.0f} s" in outcome.out
    assert f"{expected_goodput(LARGE, daly_interval(2.0, 3 * 3600.0)):.2%}" in outcome.out
    assert illada(*arguments).out == outcome.out


def test_command_reads_a_log(illada: Illada, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians; an option goes before the log; a line that is being written is left out."""
    monkeypatch.setenv("COLUMNS", "160")
    log = tmp_path / "steps.jsonl"
    lines: list[dict] = [{"step": step, "seconds": 4.0} for step in range(1, 8)]
    lines[0]["start_seconds"] = 150.0
    for step, stall, seconds in ((2, 1.0, 9.0), (4, 3.0, 11.0), (6, 90.0, 90.0)):
        lines[step] |= {"save_stall_seconds": stall, "save_seconds": seconds}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 8, "sec')
    outcome = illada("plan", "--failures", "--gpus", 16384, "--log", log, "--days", 30)
    assert outcome.code == 0, outcome.err
    flat = re.sub(r"\s+", " ", outcome.out)
    assert "the run waits 3.00 s, durable after 11.0 s" in flat
    assert "starts in 150 s" in flat
    young = young_interval(3.0, 3 * 3600.0)
    assert f"{young:,.0f} s = {round(young / 4):,} steps" in flat
    changed = illada("plan", "--failures", "--gpus", 16384, "--log", log, "--days", 30, "--save", 20)
    assert "the run waits 3.00 s, durable after 20.0 s" in re.sub(r"\s+", " ", changed.out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "3"], "say what to plan: --config for its layouts, or --failures"),
        (["--failures", "--save", "3", "--restart", "9"], "--save-stall is not known: give --save-stall SECONDS"),
        (["--failures", "--log", "nowhere.jsonl"], "nowhere.jsonl: cannot be read"),
        (["--failures", "--log", "EMPTY"], "empty, expected the lines of a run's logging.jsonl_path"),
        (["--failures", "--log", "BROKEN"], ":2: not a line of logging.jsonl_path"),
        (["--failures", "--log", "NO_SAVES", "--restart", "9"], "has no save_stall_seconds: give --save-stall SECONDS"),
        (["--failures", "--save-stall", "4", "--save", "3", "--restart", "9"], "save_seconds 3.0 is below"),
        (["--failures", "--save-stall", "1", "--save", "3", "--restart", "9", "--days", "0"], "--days 0.0"),
        (["--failures", "--save-stall", "1", "--save", "3", "--restart", "9", "--gpus", "0"], "gpus 0"),
    ],
)
def test_command_refuses(arguments: list[str], message: str, illada: Illada, tmp_path: Path) -> None:
    files = {"EMPTY": "", "BROKEN": '{"step": 1}\n[1]\n', "NO_SAVES": '{"step": 1, "seconds": 2.0}\n'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    outcome = illada("plan", *(tmp_path / one if one in files else one for one in arguments))
    assert outcome.code == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
