"""The demo: its figures, its prompts, what it does when a stage fails, and all of it in miniature."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from illada_megatron.config import load_config
from illada_megatron.training.reporter import StepRecord

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "examples" / "demo"
METHOD = "    def close(self, force=False):"
DOCUMENT = "\n".join(
    [
        *(f"import module_{number}" for number in range(10)),
        METHOD,
        "        for channel in self.channels:",
        "            channel.close()",
        *(f"            # {number}" for number in range(20)),
    ]
)


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The demo's modules, which are scripts beside each other and not a package."""
    monkeypatch.syspath_prepend(str(DEMO))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return SimpleNamespace(fragments=load("fragments"), report=load("report"), run=load("run"))


def _log(path: Path, losses: list[float]) -> Path:
    """steps.jsonl as the trainer writes it."""
    records = (
        StepRecord(
            step=step,
            loss=loss,
            bound=loss,
            masked_cross_entropy=loss,
            cross_entropy_by_t=[None] * 10,
            grad_norm=1.0,
            lr=1e-3,
            tokens_per_second=1000.0 if step <= 150 else 500.0,
            tflops=0.1,
            mfu=None,
            first_sample=8 * (step - 1),
            consumed_samples=8 * step,
            consumed_tokens=800 * step,
            epochs={"": 0.0},
            seconds=0.8,
            data_wait_seconds=0.0,
            skipped=False,
            skipped_steps=0,
            bad_samples=[],
            spike=None,
        )
        for step, loss in enumerate(losses, start=1)
    )
    path.write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return path


def test_summary_and_picture_of_a_log(demo: SimpleNamespace, tmp_path: Path) -> None:
    losses = [9.0] * 50 + [7.0] * 50 + [6.0] * 50 + [5.5] * 50 + [5.0] * 50
    steps = demo.report.read_steps(_log(tmp_path / "steps.jsonl", losses))
    bound = demo.report.Bound
    held_out = {0: bound(9.1, 0.2, "x"), 50: bound(6.2, 0.1, "x"), 250: bound(5.2, 0.05, "1.8000 +- 0.0200")}
    rows = dict(demo.report.summary_rows(steps, 150, 1234567, 6.5, held_out))
    assert rows["parameters"] == "1,234,567"
    assert rows["tokens seen"] == "200,000"
    assert rows["first loss"].startswith("9.000 nats/token")
    assert rows["last loss"].startswith("5.000 nats/token")
    assert rows["unigram entropy"] == "6.500 nats/token of the held-out text, 1.300 above"
    assert rows["at the change"].startswith("6.000 -> 5.500")
    assert rows["held-out bound"] == (
        "9.100 nats/token before training, 5.200 +- 0.050 after: 1.8000 +- 0.0200 bits/byte"
    )
    assert rows["tokens/s"].startswith("1,000 on 2 processes, 500 on 4")
    demo.report.draw_loss(steps, 150, 6.5, held_out, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_bounds_are_read_from_what_the_commands_print(demo: SimpleNamespace) -> None:
    printed = (
        "step     100/800  loss   6.1000 nats/token\n"
        "step     100  held-out bound 6.2345 +- 0.0500 nats/token, 1.9000 +- 0.0200 bits/byte  (512 tokens)\n"
    )
    bound = demo.report.Bound
    assert demo.run._bounds(printed) == {100: bound(6.2345, 0.05, "1.9000 +- 0.0200")}
    printed = "demo/run: held-out bound 5.1000 +- 0.0100 nats/token, 1.6000 +- 0.0100 bits/byte"
    assert demo.run._bound(printed) == bound(5.1, 0.01, "1.6000 +- 0.0100")
    with pytest.raises(SystemExit, match="no held-out bound"):
        demo.run._bound("")


def test_prompts_are_held_out_code_and_know_the_truth(demo: SimpleNamespace, tmp_path: Path) -> None:
    corpus = tmp_path / "heldout.jsonl"
    texts = [("short.py", "x = 1"), ("lib/channel.py", DOCUMENT)]
    corpus.write_text("".join(json.dumps({"text": text, "path": path}) + "\n" for path, text in texts))
    tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()), decode=lambda ids: bytes(ids).decode())
    continuation, infilling = demo.fragments.choose(corpus, tokenizer)
    assert continuation.path == infilling.path == "lib/channel.py"
    assert continuation.prompt.endswith(METHOD + "\n")
    assert continuation.prompt in DOCUMENT
    gaps = [text for text, hidden in infilling.truth if hidden]
    filled = infilling.prompt
    for text in gaps:
        assert f"<mask:{len(text)}>" in filled
        filled = filled.replace(f"<mask:{len(text)}>", text, 1)
    assert len(gaps) > 5
    assert filled == infilling.styled_truth().plain
    assert filled.startswith(METHOD)
    assert filled in DOCUMENT
    corpus.write_text(json.dumps({"text": "x = 1", "path": "short.py"}) + "\n")
    with pytest.raises(RuntimeError, match="no document has a method"):
        demo.fragments.choose(corpus, tokenizer)


def test_failing_stage_ends_the_demo_with_its_status(
    demo: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = demo.run.Demo(tmp_path, load_config("tiny"))
    with pytest.raises(SystemExit) as exit_status, running.stage("Shards"):
        running.illada("preprocess", "missing.jsonl", "--output-prefix", "a", "--tokenizer", "none.model")
    assert exit_status.value.code == 2
    printed = capsys.readouterr().out
    assert "$ illada preprocess missing.jsonl" in printed
    assert "none.model: no such file" in printed
    assert "stage 1 failed: exit code 2" in printed


@pytest.mark.slow
def test_demo_runs_from_nothing_and_again(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(DEMO / "run.py"), "--quick", "--directory", str(tmp_path)]

    def run() -> str:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    printed = run()
    assert "continues from demo/run/checkpoints/step_00000005: step 5" in printed
    assert "tensor 2, pipeline 2, data 1" in printed
    lines = [json.loads(line) for line in (tmp_path / "demo/run/steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert [one["step"] for line in lines for one in line.get("held_out", ())] == [4, 8]
    for name in ("loss.png", "denoising.svg", "run/config.yaml", "run/checkpoints/latest", "run/tensorboard"):
        assert (tmp_path / "demo" / name).exists(), name
    kept = (tmp_path / "demo/shards/train.bin").stat().st_mtime_ns
    assert "demo/shards/train is there already: kept" in run()
    assert (tmp_path / "demo/shards/train.bin").stat().st_mtime_ns == kept
