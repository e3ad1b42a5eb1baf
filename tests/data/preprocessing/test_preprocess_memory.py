"""Memory does not grow with the file or the line: peak of a real command's whole process tree."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]


def _peak_bytes(command: list[str]) -> int:
    """Peak of the proportional set size, all processes together: shared pages count once."""
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_pss, _tree(process.pid))))
        time.sleep(0.02)
    assert process.stderr is not None
    assert process.returncode == 0, process.stderr.read().decode()
    return peak


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:
        return 0


def _command(path: Path, tokenizer: Path, prefix: Path, *options: str) -> list[str]:
    arguments = [str(path), "--output-prefix", str(prefix), "--tokenizer", str(tokenizer), *options]
    return [sys.executable, str(ROOT / "tools/preprocess_data.py"), *arguments]


def test_a_line_of_200_mb_is_dropped_unread(sentencepiece_path: Path, tmp_path: Path) -> None:
    """Between good lines: what is dropped takes no more memory than a line that is kept could."""
    peaks = {}
    for name, long in (("short", 0), ("long", 200_000_000)):
        path = tmp_path / f"{name}.jsonl"
        with path.open("w") as stream:
            stream.write('{"text": "before"}\n')
            if long:
                stream.write('{"text": "')
                for _ in range(200):
                    stream.write("x" * (long // 200))
                stream.write('"}\n')
            stream.write('{"text": "after"}\n')
        prefix = tmp_path / name
        peaks[name] = _peak_bytes(_command(path, sentencepiece_path, prefix, "--tokenizer-engine", "reference"))
        counts = json.loads(prefix.with_suffix(".job.json").read_text())["finished"]
        assert counts["documents"] == 2
        assert counts["dropped"] == ({"too long": 1} if long else {})
    # up to the limit a line could still be one that is kept
    assert peaks["long"] < peaks["short"] + 2 * 64e6


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--workers", "1", "--shuffle-seed", "1"], ["--workers", "2"]])
def test_a_file_of_1_gb_takes_600_mb_at_most(
    options: list[str], huggingface_path: Path, texts: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "large.jsonl"
    with path.open("w") as stream:
        number = 0
        while stream.tell() < 1_000_000_000:
            for text in texts:
                stream.write(json.dumps({"text": f"{number}\n{text}"}) + "\n")
                number += 1
    peak = _peak_bytes(_command(path, huggingface_path, tmp_path / "out", *options))
    print(f"peak {peak / 1e6:.0f} MB with {' '.join(options)}")
    assert peak < 600e6
