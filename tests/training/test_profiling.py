"""training.profile: traces of real steps, in the code's own words, and what cannot be recorded."""

import gzip
import json
from pathlib import Path

import pytest
from launch import run_warm

from illada_megatron.config import ConfigError, load_config
from illada_megatron.runtime import runtime

SPANS = {
    *("wait for a micro-batch", "forward pass of a micro-batch", "embedding", "layers", "head and masked loss"),
    *("forward and backward passes", "gradient norm", "sums of the step", "optimizer"),
}


def test_a_trace_of_two_steps_of_one_rank(small: tuple[str, ...], tmp_path: Path) -> None:
    profile = "training.profile={steps: [3, 4], ranks: [1], memory: true}"
    arguments = [*small, f"run_dir={tmp_path}", "training.exit_steps=5", profile]
    run = run_warm("train", [*arguments, "parallel.pipeline_model_parallel_size=2"], 2)
    assert run.process.returncode == 0, run.output
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name == "profile_rank_00001_steps_3_4.json.gz"
    assert f"rank 1 has written {trace}" in run.output
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert SPANS - set(named) == {"embedding"}  # the first stage has it
    assert named.count("optimizer") == 2
    assert named.count("forward pass of a micro-batch") == 2 * 8
    names = {event["name"] for event in events}
    assert "gloo:recv" in names or any("recv" in name for name in names)
    assert "[memory]" in names


def test_nothing_is_recorded_unasked(small: tuple[str, ...], tmp_path: Path) -> None:
    run = run_warm("train", [*small, f"run_dir={tmp_path}", "training.exit_steps=2"])
    assert run.process.returncode == 0, run.output
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("{steps: [4, 3]}", "steps [4, 3]: the first one is behind the last"),
        ("{steps: [3, 4]}", "training.profile needs run_dir, found null"),
        ("{steps: [3, 4], tool: nsys, memory: true}", "memory true needs tool torch, found nsys"),
    ],
)
def test_what_cannot_be_recorded(profile: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [f"training.profile={profile}"])
    assert said in str(error.value)


def test_what_this_run_cannot_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A run that has fewer ranks than before goes on."""
    from illada_megatron.training.profiling import Profiler

    fields = ["runtime.device=cpu", f"run_dir={tmp_path}"]
    nsys = load_config(None, [*fields, "training.profile={steps: [3, 4], tool: nsys}"])
    fewer = load_config(None, [*fields, "training.profile={steps: [3, 4], ranks: [0, 1]}"])
    with runtime(nsys) as run:
        with pytest.raises(ConfigError, match=r"training\.profile\.tool nsys needs a GPU"):
            Profiler(nsys.training.profile, run, tmp_path)
        Profiler(fewer.training.profile, run, tmp_path)
    assert "ranks [0, 1] has ranks that are not there: the run has 1" in capfd.readouterr().err
