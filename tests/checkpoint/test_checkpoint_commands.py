"""`illada checkpoint inspect`, `diff`, `average`, and checkpoints that megatron-core's dist_checkpointing wrote."""

import re
from pathlib import Path

import pytest
import torch
from launch import Illada
from random_checkpoint import STEP, random_tensors, write_checkpoint
from torch import Tensor

from illada_megatron.checkpoint.tools.compare import compare
from illada_megatron.checkpoint.tools.opening import open_checkpoint
from illada_megatron.config import RunConfig, load_config
from illada_megatron.runtime import runtime

MODEL = (
    *("model.num_layers=2", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=250", "model.max_sequence_length=64", "data.sequence_length=32"),
    *("runtime.device=cpu", "runtime.num_threads=1", "training.micro_batch_size=1"),
)
NORM = "decoder.layers.1.input_layernorm.weight"


def _config(*overrides: str) -> RunConfig:
    return load_config(None, [*MODEL, *overrides])


def _write(directory: Path, tensors: dict[str, Tensor], config: RunConfig | None = None, step: int = STEP) -> Path:
    return write_checkpoint(directory, config or _config(), tensors, step)


def test_inspect_shows_what_is_there(tmp_path: Path, illada: Illada) -> None:
    tensors = random_tensors(_config())
    path = _write(tmp_path / "run", tensors)
    outcome = illada("checkpoint", "inspect", tmp_path / "run", "--norms", "--optimizer", "--memory-mb", 1)
    assert outcome.code == 0, outcome.err
    for name, tensor in tensors.items():
        line = next(line for line in outcome.out.splitlines() if f" {name} " in line)
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        shape, dtype = " x ".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")
        assert cells[1:4] == [shape, dtype, f"{tensor.nbytes:,}"]
        assert float(cells[4]) == pytest.approx(float(tensor.double().norm()), rel=1e-5)
    facts = dict(re.findall(r"│ (\S.*?)\s*│ (.*?)\s*│\n", outcome.out))
    assert facts["checkpoint"] == str(path)
    assert facts["step"] == str(STEP)
    assert "checksums compared" in facts["on disk"]
    assert facts["optimizer step"] == "6"
    weights = sum(tensor.nbytes for name, tensor in tensors.items() if not name.startswith("optimizer."))
    assert facts["weights"] == f"{weights:,} bytes"
    assert facts["tokens"].startswith(f"{28 * _config().data.sequence_length:,} in 28 consumed samples")
    # without --optimizer: the model's tensors, and how many are not listed; what follows from all of them stays
    outcome = illada("checkpoint", "inspect", tmp_path / "run")
    listed = [name for name in tensors if f" {name} " in outcome.out]
    assert listed == [name for name in tensors if not name.startswith("optimizer.")]
    assert f"{len(tensors) - len(listed)} tensors of the optimizer not listed: --optimizer" in outcome.out
    short = dict(re.findall(r"│ (\S.*?)\s*│ (.*?)\s*│\n", outcome.out))
    assert {key: short[key] for key in ("parameters", "optimizer", "weights")} == {
        key: facts[key] for key in ("parameters", "optimizer", "weights")
    }


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing file"])
def test_inspect_names_the_damage_and_fails(damage: str, tmp_path: Path, illada: Illada) -> None:
    path = _write(tmp_path / "run", random_tensors(_config()))
    file = path / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
        assert illada("checkpoint", "inspect", path, "--no-verify").code == 0
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        file.unlink()
    for named in (path, tmp_path / "run"):
        outcome = illada("checkpoint", "inspect", named)
        assert outcome.code in (1, 2)
        assert str(file) in outcome.out + outcome.err


def test_diff_is_silent_about_layouts_and_precise_about_values(tmp_path: Path, illada: Illada) -> None:
    """0 for other files of the same tensors; one changed element, a NaN and a missing tensor are found."""
    tensors = random_tensors(_config())
    first = _write(tmp_path / "a", tensors)
    layout = ["--pp", 2, "--format", "legacy"]
    assert illada("checkpoint", "reshard", tmp_path / "a", tmp_path / "legacy", *layout).code == 0
    same = illada("checkpoint", "diff", first, tmp_path / "legacy")
    assert (same.code, same.err) == (0, "")
    assert f"{len(tensors)} tensors are the same, 0 differ" in same.out

    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    state = "optimizer.exp_avg.decoder.layers.0.mlp.linear_fc2.weight"
    changed[state][3, 5] += 2.0
    relative = 2.0 / float(max(changed[state][3, 5].abs(), tensors[state][3, 5].abs()))
    changed[NORM][7] = float("nan")
    del changed["optimizer.main.decoder.final_layernorm.weight"]
    second = _write(tmp_path / "b", changed)
    outcome = illada("checkpoint", "diff", first, second)
    assert outcome.code == 1
    assert f"only in {first}: optimizer.main.decoder.final_layernorm.weight" in outcome.out
    assert f"{len(tensors) - 3} tensors are the same, 2 differ" in outcome.out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in outcome.out.splitlines() if "│" in line]
    assert rows[0][:4] == [NORM, "32", "1", "inf"]
    assert rows[1][:4] == [state, "1,536", "1", "2"]
    assert float(rows[1][4]) == pytest.approx(relative, rel=1e-4)
    assert illada("checkpoint", "diff", first, second, "--no-optimizer").code == 1
    # the same NaN in both is no difference
    assert compare(open_checkpoint(str(second)), open_checkpoint(str(second)), processes=1).identical
    other = _config("training.precision=fp32")
    third = _write(tmp_path / "c", random_tensors(other), other)
    outcome = illada("checkpoint", "diff", first, third)
    assert outcome.code == 1
    assert f"{NORM}: [32] torch.bfloat16 in the first, [32] torch.float32 in the second" in outcome.out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_average(precision: str, tmp_path: Path, illada: Illada) -> None:
    """The mean in fp64 of the main weights, rounded once; the newest's step, no optimizer state."""
    config = _config(f"training.precision={precision}")
    all_tensors = [random_tensors(config, seed) for seed in range(3)]
    paths = [_write(tmp_path / f"{seed}", all_tensors[seed], config, 10 + seed) for seed in range(3)]
    outcome = illada("checkpoint", "average", *paths, tmp_path / "averaged", "--weights", "1,1,2")
    assert outcome.code == 0, outcome.err
    found = open_checkpoint(str(tmp_path / "averaged"))
    assert found.info.step == 12
    assert found.info.progress is None
    assert found.config == config
    names = [name for name in all_tensors[0] if not name.startswith("optimizer.")]
    assert sorted(found.source.tensors) == sorted(names)
    for name in names:
        main = name if precision == "fp32" else f"optimizer.main.{name}"
        parts = [tensors[main].double() for tensors in all_tensors]
        expected = (parts[0] / 4 + parts[1] / 4 + parts[2] / 2).to(all_tensors[0][name].dtype)
        assert torch.equal(found.source.read(name), expected), name


def test_average_begins_a_run_and_evaluates(
    two_steps: Path, tiny_run: tuple[str, ...], tmp_path: Path, illada: Illada
) -> None:
    """The average of a checkpoint with itself is the checkpoint; a run begins at step 0 with its weights."""
    two = two_steps / "step_00000002"
    outcome = illada("checkpoint", "average", two, two, tmp_path / "same")
    assert outcome.code == 0, outcome.err
    assert illada("checkpoint", "diff", two, tmp_path / "same", "--no-optimizer").code == 0
    outcome = illada("checkpoint", "average", two_steps / "step_00000001", two, tmp_path / "averaged")
    assert outcome.code == 0, outcome.err
    bounds = [
        re.search(r"held-out bound (\S+) ", illada("evaluate", "--checkpoint", path).out)
        for path in (two, tmp_path / "same", tmp_path / "averaged")
    ]
    assert all(bounds)
    values = [float(found[1]) for found in bounds if found]
    assert values[0] == values[1] != values[2]
    begun = illada("train", *tiny_run, f"checkpoint.load_dir={tmp_path / 'averaged'}")
    assert begun.code == 0, begun.err
    assert f"begins with the weights of {tmp_path}/averaged/step_00000002" in begun.out.replace("\n", "")


def test_average_refuses(tmp_path: Path, illada: Illada) -> None:
    first = _write(tmp_path / "a", random_tensors(_config()))
    other = _config("model.rotary_base=10000.0")
    second = _write(tmp_path / "b", random_tensors(other), other)
    for arguments, message in (
        ([first, second, tmp_path / "new"], "different models: model.rotary_base is 500000.0 and 10000.0"),
        ([first, tmp_path / "new"], "two checkpoints or more and a new directory"),
        ([first, first, tmp_path / "new", "--weights", "1"], "one for each of the 2 checkpoints"),
        ([first, first, tmp_path / "new", "--weights", "1,-1"], "positive sum"),
        ([first, first, tmp_path / "new", "--weights", "1,a"], "expected numbers and commas"),
    ):
        outcome = illada("checkpoint", "average", *arguments)
        assert outcome.code == 2
        assert message in outcome.err
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("precision", "distributed", "bias"), [("fp32", True, "false"), ("bf16", True, "true"), ("bf16", False, "true")]
)
def test_checkpoints_of_megatron_cores_dist_checkpointing_are_read(
    precision: str, distributed: bool, bias: str, tmp_path: Path, illada: Illada
) -> None:
    """Written by megatron-core's own code: layers stacked, norms under Transformer Engine's names, moments fully
    reshardable. Every value is where it was."""
    from megatron.core import dist_checkpointing

    from illada_megatron.checkpoint.megatron.args import namespace
    from illada_megatron.checkpoint.sharded import load_checkpoint
    from illada_megatron.model import build_model_chunks
    from illada_megatron.training.gradient_reduction import wrap_data_parallel
    from illada_megatron.training.optimizer import build_optimizer

    plain = f"parallel.use_distributed_optimizer={str(distributed).lower()}"
    config = _config(f"training.precision={precision}", f"model.add_qkv_bias={bias}", plain)
    ours = open_checkpoint(str(_write(tmp_path / "ours", random_tensors(config), config)))
    theirs = tmp_path / "theirs" / f"iter_{STEP:07d}"
    theirs.mkdir(parents=True)
    with runtime(config) as run:
        chunks = wrap_data_parallel(config.parallel, build_model_chunks(config, run.device))
        optimizer = build_optimizer(config, chunks)
        load_checkpoint(ours.info, config, chunks, optimizer)
        metadata = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False  # type: ignore[assignment]
        weights = chunks[0].module.sharded_state_dict(metadata=dict(metadata))
        state = {"model": {key: value for key, value in weights.items() if not key.endswith("_extra_state")}}
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=dict(metadata))
        common = {"args": namespace(config, STEP, 28, "local"), "iteration": STEP, "checkpoint_version": 3.0}
        dist_checkpointing.save({**state, **common}, str(theirs))
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text(f"{STEP}\n")
    opened = open_checkpoint(str(tmp_path / "theirs"), ["model.mask_token_id=5"])
    assert opened.kind == "megatron-core torch_dist"
    assert opened.info.progress is not None
    assert (opened.info.progress["optimizer_step"], opened.info.progress["consumed_samples"]) == (6, 28)
    assert compare(ours, opened, memory_mb=1, processes=1).identical
    outcome = illada("checkpoint", "reshard", tmp_path / "theirs", tmp_path / "in", "--tp", 2, "model.mask_token_id=5")
    assert outcome.code == 0, outcome.err
    assert compare(ours, open_checkpoint(str(tmp_path / "in")), processes=1).identical
