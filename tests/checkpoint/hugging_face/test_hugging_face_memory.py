"""A conversion holds blocks of rows, never the model: its peak memory does not grow with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_weights import random_checkpoint, small_config

from illada_megatron.checkpoint.files.tensors import PIECE_BYTES

ROOT = Path(__file__).parents[3]
# VmHWM: the most that the process itself has held so far; what is read of a mapped file counts, too.
COMMANDS = """
import json, re, sys
from pathlib import Path
from illada_megatron.cli.convert_command import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
    print("peak_kb", re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.slow
def test_a_model_of_240_mb_takes_less_than_half_of_it(tmp_path: Path) -> None:
    """In fp32; a block has 16 MB and a piece of a checkpoint 32 MB, and there are a handful of them."""
    shapes = {
        "small": (),
        "large": (
            *("model.hidden_size=1024", "model.ffn_hidden_size=2048", "model.num_layers=2", "model.vocab_size=40000"),
        ),
    }
    commands = []
    for name, shape in shapes.items():
        run, hf, back = (str(tmp_path / name / part) for part in ("run", "hf", "back"))
        random_checkpoint(Path(run), small_config(*shape), piece_bytes=PIECE_BYTES)
        commands += [["to-hf", run, hf, "--no-tokenizer", "--dtype", "fp32"], ["from-hf", hf, back]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", COMMANDS, json.dumps(commands)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peaks = [1024 * int(text.split()[1]) for text in done.stdout.splitlines() if text.startswith("peak_kb")]
    size = sum(file.stat().st_size for file in (tmp_path / "large" / "hf").glob("*.safetensors"))
    print(f"{size / 1e6:.0f} MB of weights; peaks {[round(peak / 1e6) for peak in peaks]} MB")
    assert size > 230e6
    assert peaks[3] - peaks[1] < size / 2
