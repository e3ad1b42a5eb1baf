"""`illada checkpoint reshard`: training goes on from what it writes; nothing is lost when it is killed or misled."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from corpus import write_corpus
from launch import ROOT, SMALL, Illada, read_steps, run_warm
from random_checkpoint import random_tensors, write_checkpoint

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.megatron.stage_parameters import parameters_of_stages
from illada_megatron.checkpoint.tools.compare import compare
from illada_megatron.checkpoint.tools.copying import blocks
from illada_megatron.checkpoint.tools.opening import open_checkpoint
from illada_megatron.checkpoint.tools.reshard import LayoutChange, reshard
from illada_megatron.config import load_config
from illada_megatron.config.layout import pipeline_split
from illada_megatron.config.parameters import parameters

TINY = (
    *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "model.max_sequence_length=64", "data.sequence_length=32"),
)
# 100 MB of weights, moments and main weights, most of them in two tensors
LARGE = (
    *("model.num_layers=2", "model.hidden_size=256", "model.ffn_hidden_size=512", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=20000", "model.max_sequence_length=64", "data.sequence_length=32"),
)
COMPUTED = ("step", "loss", "masked_cross_entropy", "grad_norm", "lr", "consumed_samples")


def _contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _random(directory: Path, *overrides: str) -> Path:
    config = load_config(None, [*TINY, *overrides])
    write_checkpoint(directory, config, random_tensors(config))
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...]]:
    """The checkpoints of a run of two steps under TP2 x PP2, and the run's arguments."""
    directory = tmp_path_factory.mktemp("trained")
    arguments = (*SMALL, f"data.train_paths=[{write_corpus(directory / 'corpus')}]", "training.train_steps=4")
    layout = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    stop = ["training.exit_steps=2", f"checkpoint.save_dir={directory / 'checkpoints'}"]
    run = run_warm("train", [*arguments, *layout, *stop], nproc=4)
    assert run.process.returncode == 0, run.output
    return directory / "checkpoints", arguments


def _goes_on(illada: Illada, arguments: tuple[str, ...], load_dir: Path, jsonl: Path) -> list[dict[str, Any]]:
    outcome = illada("train", *arguments, f"checkpoint.load_dir={load_dir}", f"logging.jsonl_path={jsonl}")
    assert outcome.code == 0, outcome.err
    assert "step 2, 16 samples consumed" in outcome.out.replace("\n", "")
    steps = read_steps(jsonl)
    assert [step["step"] for step in steps] == [3, 4]
    return [{name: step[name] for name in COMPUTED} for step in steps]


def test_training_goes_on_as_from_the_source(
    trained: tuple[Path, tuple[str, ...]], tmp_path: Path, illada: Illada
) -> None:
    """Saved by four ranks; resharded to one stage, to interleaved stages of Megatron's legacy files and back: a run
    that continues computes the same numbers, to the last bit."""
    saved, arguments = trained
    expected = _goes_on(illada, arguments, saved, tmp_path / "source.jsonl")
    before = _contents(saved)
    one = illada("checkpoint", "reshard", saved, tmp_path / "one", "--tp", 1, "--pp", 1, "--dp", 4)
    assert one.code == 0, one.err
    assert "step 2, 78 tensors" in one.out
    layout = ["--tp", 1, "--pp", 2, "--vpp", 2, "--format", "legacy"]
    legacy = illada("checkpoint", "reshard", tmp_path / "one", tmp_path / "legacy", *layout)
    assert legacy.code == 0, legacy.err
    back = illada("checkpoint", "reshard", tmp_path / "legacy", tmp_path / "back", "--tp", 2, "--pp", 1)
    assert back.code == 0, back.err
    for name in ("one", "back"):
        assert _goes_on(illada, arguments, tmp_path / name, tmp_path / f"{name}.jsonl") == expected
    assert _contents(saved) == before
    parallel = json.loads((tmp_path / "one/step_00000002/checkpoint.json").read_text())["config"]["parallel"]
    assert (parallel["tensor_model_parallel_size"], parallel["pipeline_model_parallel_size"]) == (1, 1)
    assert parallel["data_parallel_size"] == 4


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_are_every_element_once_in_the_order_of_the_ranks(size: int) -> None:
    """Small blocks, so that each kind of tensor is cut in the middle; checked with numbered elements."""
    config = load_config(None, [*TINY, "model.num_query_groups=4", "model.add_qkv_bias=true"])
    for parameter in parameters(config.model):
        whole = torch.arange(torch.Size(parameter.shape).numel()).view(parameter.shape)
        locals_ = [torch.full(parameter.held_shape(size), -1) for _ in range(size)]
        rows = [0] * size
        for block in blocks(parameter, size, itemsize=4, block_bytes=1000):
            box = whole[tuple(slice(low, low + n) for low, n in zip(block.offset, block.shape, strict=True))]
            assert box.numel() * 4 <= max(1000, 4 * torch.Size(parameter.shape[1:]).numel())
            for target in block.targets:
                part = box if target.columns is None else box[:, slice(*target.columns)]
                assert target.row == rows[target.rank]
                rows[target.rank] += len(part)
                locals_[target.rank][target.row : target.row + len(part)] = part
        for rank in range(size):
            expected = torch.full_like(locals_[rank], -1)
            for first_row, shape, offset in parameter.held(rank, size):
                box = whole[tuple(slice(low, low + n) for low, n in zip(offset, shape, strict=True))]
                expected[first_row : first_row + shape[0]] = box
            assert torch.equal(locals_[rank], expected), parameter.name


def test_ranks_read_their_files_from_front_to_back(tmp_path: Path) -> None:
    """A rank finds its part of each tensor, in its model's order, further back in files that no other rank reads."""
    source = _random(tmp_path / "source")
    reshard(open_checkpoint(str(source)), tmp_path / "new", LayoutChange(tensor=2, pipeline=2), processes=1)
    opened = open_checkpoint(str(tmp_path / "new"))
    tensors = opened.source.tensors
    readers: dict[str, set[tuple[int, int]]] = {}
    for stage, held in enumerate(parameters_of_stages(opened.config.model, pipeline_split(opened.config))):
        for rank in range(2):
            places = []
            for prefix in ("", "optimizer.exp_avg."):
                for parameter in held:
                    for _, shape, offset in parameter.held(rank, 2) if parameter.split else ():
                        places += [
                            (piece.file, piece.start)
                            for piece in tensors[prefix + parameter.name].pieces
                            if (piece.offset, piece.shape) == (offset, shape)  # nothing is cut at this size
                        ]
            assert len(places) == 2 * sum(len(one.held(rank, 2)) for one in held if one.split)
            assert places == sorted(places)
            for file, _ in places:
                readers.setdefault(file, set()).add((stage, rank))
    assert sorted(map(len, readers.values())) == [1] * len(readers) == [1] * 4


DELAYED = ("training.precision=fp8", "fp8.recipe=delayed", "fp8.amax_history_len=8", "model.ffn_hidden_size=64")


def test_delayed_scalings_state_goes_along(tmp_path: Path, illada: Illada) -> None:
    """Without it the continued run would begin with factors of 1. Megatron's files hold none, which is said."""
    source = _random(tmp_path / "source", *DELAYED)
    assert illada("checkpoint", "reshard", source, tmp_path / "new", "--tp", 2, "--pp", 2).code == 0
    both = [open_checkpoint(str(place)) for place in (source, tmp_path / "new")]
    assert sum(name.startswith("fp8.") for name in both[1].source.tensors) == 2 * 4 * 4
    assert compare(*both, processes=1).identical
    legacy = illada("checkpoint", "reshard", source, tmp_path / "legacy", "--format", "legacy")
    assert legacy.code == 0, legacy.err
    assert "delayed scaling's state (fp8.*) is left out of Megatron's format" in " ".join(legacy.out.split())


def test_a_bit_changed_in_the_source_is_refused(tmp_path: Path, illada: Illada) -> None:
    """And nothing is left of the attempt; with --no-verify it is copied as it is."""
    source = _random(tmp_path / "source")
    file = next(iter(sorted(source.rglob("*.distcp"))))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    outcome = illada("checkpoint", "reshard", source, tmp_path / "new")
    assert outcome.code == 2
    assert f"{file}: its bytes have changed" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    outcome = illada("checkpoint", "reshard", source, tmp_path / "new", "--no-verify")
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "3"], "is not a multiple of parallel.tensor_model_parallel_size 3"),
        (["--pp", "4"], "model.num_layers 2 is not a multiple of"),
        (["--dp", "3"], "is not a multiple of micro_batch_size * data parallel size"),
        (["model.hidden_size=64"], "a reshard leaves the model as it is"),
        (["training.precision=fp32"], "a reshard leaves training.precision as it is"),
    ],
)
def test_layouts_that_cannot_work_are_refused(
    arguments: list[str], message: str, tmp_path: Path, illada: Illada
) -> None:
    source = _random(tmp_path / "source")
    outcome = illada("checkpoint", "reshard", source, tmp_path / "new", *arguments)
    assert outcome.code == 2
    assert message in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_target_is_not_named_like_a_checkpoint(tmp_path: Path, illada: Illada) -> None:
    """It would be taken for one, without a record, by whoever names it to load."""
    outcome = illada("checkpoint", "reshard", _random(tmp_path / "source"), tmp_path / "step_00000001")
    assert outcome.code == 2
    assert f"{tmp_path / 'step_00000001'}: is named like one checkpoint" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("place", ["step_00000001", "run/step_00000009/resharded"])
def test_a_target_that_a_runs_retention_would_delete(place: str, tmp_path: Path, illada: Illada) -> None:
    """A legacy directory has no record where a run looks for one: it would go as interrupted, at the next save. What
    lies within a checkpoint goes with it."""
    source = _random(tmp_path / "source")
    outcome = illada("checkpoint", "reshard", source, tmp_path / place, "--format", "legacy")
    assert outcome.code == 2
    assert f"{tmp_path / place}: is named as, or lies in, a run's checkpoint (step_0000000" in outcome.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_source_that_retention_deletes_meanwhile(tmp_path: Path) -> None:
    source = _random(tmp_path / "source")
    opened = open_checkpoint(str(source))
    shutil.rmtree(str(opened.info.path))
    with pytest.raises(CheckpointError, match="was deleted while it was read"):
        reshard(opened, tmp_path / "new", LayoutChange(), processes=1)
    assert not (tmp_path / "new").exists()


def test_a_target_that_exists_is_left_alone(tmp_path: Path, illada: Illada) -> None:
    source = _random(tmp_path / "source")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("x")
    outcome = illada("checkpoint", "reshard", source, tmp_path / "new")
    assert outcome.code == 2
    assert f"{tmp_path / 'new'}: exists already" in outcome.err
    assert _contents(tmp_path / "new") == {"precious": b"x"}


def test_object_storage_is_read_but_not_written(s3: str, tmp_path: Path, illada: Illada) -> None:
    config = load_config(None, [*TINY])
    tensors = random_tensors(config)
    write_checkpoint(f"{s3}/reshard", config, tensors)
    outcome = illada("checkpoint", "reshard", f"{s3}/reshard", tmp_path / "new", "--tp", 2)
    assert outcome.code == 0, outcome.err
    found = open_checkpoint(str(tmp_path / "new")).source
    assert all(torch.equal(found.read(name), tensor) for name, tensor in tensors.items())
    outcome = illada("checkpoint", "reshard", f"{s3}/reshard", f"{s3}/new")
    assert outcome.code == 2
    assert "name a directory, and upload it" in outcome.err


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("exp_avg.decoder.layers.1.mlp.linear_fc1.weight", "holds none of optimizer.exp_avg.decoder.layers.1.mlp"),
        ("main.", "no fp32 main weights"),
    ],
)
def test_missing_state_is_refused(missing: str, message: str, tmp_path: Path, illada: Illada) -> None:
    """A checkpoint that lacks a moment would begin it with zeros, one without main weights with rounded ones, and
    nobody would know."""
    config = load_config(None, [*TINY])
    tensors = {
        name: value for name, value in random_tensors(config).items() if not name.startswith(f"optimizer.{missing}")
    }
    write_checkpoint(tmp_path / "source", config, tensors)
    outcome = illada("checkpoint", "reshard", tmp_path / "source", tmp_path / "new")
    assert outcome.code == 2
    assert message in outcome.err


def _start(*arguments: object) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "tools" / "reshard_checkpoint.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 MB."""
    config = load_config(None, LARGE)
    return write_checkpoint(tmp_path_factory.mktemp("large") / "source", config, random_tensors(config)).parent


@pytest.mark.parametrize("format_", ["torch_dist", pytest.param("legacy", marks=pytest.mark.slow)])
def test_killed_in_the_middle(format_: str, large: Path, tmp_path: Path) -> None:
    """kill -9 while files are written: the source is as it was, there is no target, no process stays, and the next
    attempt removes what is left and succeeds."""
    target = tmp_path / "new"
    before = {path: path.stat().st_mtime_ns for path in large.rglob("*")}
    arguments = (large, target, "--tp", 2, "--format", format_, "--memory-mb", 2, "--processes", 2)
    process = _start(*arguments)
    deadline = time.monotonic() + 300
    while not (files := [path for path in tmp_path.rglob("*") if path.suffix in (".distcp", ".pt")]):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists()
    assert all(".unfinished" in str(path) for path in files)
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    process = _start(*arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
    assert compare(open_checkpoint(str(large)), open_checkpoint(str(target)), processes=1).identical
    assert {path: path.stat().st_mtime_ns for path in large.rglob("*")} == before


def test_another_reshard_at_work_is_not_disturbed(tmp_path: Path) -> None:
    """What looks like a leftover is another's directory while its process lives."""
    from illada_megatron.checkpoint.files.new_directory import staged

    source = _random(tmp_path / "source")
    with staged(tmp_path / "new", 0) as directory:
        (directory / "file").write_text("x")
        reshard(open_checkpoint(str(source)), tmp_path / "other", LayoutChange(1, 1), processes=1)
        with pytest.raises(CheckpointError, match="room"), staged(tmp_path / "new", 10**18):
            pass
        assert (directory / "file").read_text() == "x"
    assert (tmp_path / "new" / "file").read_text() == "x"


@pytest.mark.slow
def test_memory_is_bounded_by_the_field_and_not_by_the_model(large: Path, tmp_path: Path) -> None:
    """Peaks of all processes together (proportional set sizes) for a checkpoint and one that is four times larger."""
    config = load_config(None, [*LARGE, "model.vocab_size=100000"])
    larger = write_checkpoint(tmp_path / "source", config, random_tensors(config)).parent
    sizes = [sum(path.stat().st_size for path in source.rglob("*.distcp")) for source in (large, larger)]
    peaks = []
    for number, source in enumerate((large, larger)):
        process = _start(source, tmp_path / f"new{number}", "--memory-mb", 32, "--processes", 2, "--tp", 2)
        peaks.append(_peak_bytes(process))
        assert process.returncode == 0, process.communicate()
    assert sizes[1] - sizes[0] > 250e6
    assert peaks[1] - peaks[0] < 60e6, (sizes, peaks)


def _peak_bytes(process: subprocess.Popen[str]) -> int:
    """Of a process and all below it, sampled until it ends."""
    peak = 0
    while process.poll() is None:
        total = 0
        try:
            parent = psutil.Process(process.pid)
            for one in (parent, *parent.children(recursive=True)):
                text = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
                found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
                total += int(found[1]) * 1024 if found else 0
        except (psutil.Error, OSError):
            continue
        peak = max(peak, total)
        time.sleep(0.02)
    return peak


def test_another_copy_of_the_embedding_in_the_last_stage(tmp_path: Path, illada: Illada) -> None:
    """Megatron keeps both the same; where they differ, one of them is wrong."""
    source = _random(tmp_path / "source")
    layout = ["--pp", 2, "--format", "legacy", "--transformer-impl", "local"]
    assert illada("checkpoint", "reshard", source, tmp_path / "legacy", *layout).code == 0
    directory = tmp_path / "legacy" / "iter_0000007"
    file = directory / "mp_rank_00_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model"]["output_layer.weight"][3, 4] += 1
    torch.save(state, file)
    (directory / "checkpoint.json").unlink()  # as Megatron leaves it, without checksums
    arguments = [tmp_path / "legacy", tmp_path / "new", "--pp", 1, "model.mask_token_id=5"]
    outcome = illada("checkpoint", "reshard", *arguments)
    assert outcome.code == 2
    assert f"{file}: its copy of embedding.word_embeddings.weight is not that of" in outcome.err
    shutil.rmtree(tmp_path / "legacy")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_weights_average_goes_with_them(precision: str, illada: Illada, tmp_path: Path) -> None:
    """To the last bit; Megatron's format has no place for it, which is said, and nothing of it stays in the files."""
    source = _random(tmp_path / "run", "optimizer.ema_decay=0.9", f"training.precision={precision}")
    resharded = illada("checkpoint", "reshard", source, tmp_path / "new", "--tp", "2", "--pp", "2")
    assert resharded.code == 0, resharded.err
    assert "left out" not in resharded.out
    assert compare(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "new"))).identical
    assert "EMA of the weights" in illada("checkpoint", "inspect", tmp_path / "new").out
    legacy = illada("checkpoint", "reshard", source, tmp_path / "megatron", "--format", "legacy")
    assert legacy.code == 0, legacy.err
    assert "the moving average of the weights is left out" in legacy.out
    found = compare(open_checkpoint(str(source)), open_checkpoint(str(tmp_path / "megatron")))
    assert found.differences == found.only_in_second == []
    assert all(name.startswith("optimizer.ema.") for name in found.only_in_first)
    assert len(found.only_in_first) == len(parameters(load_config(None, TINY).model))
