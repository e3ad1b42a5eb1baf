"""Checkpoints that are half-written, damaged, hostile or of another model: nothing of them runs, nothing is lost."""

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from launch import Illada
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.owner import OWNER
from illada_megatron.checkpoint.predictor import find_checkpoint, saved_config
from illada_megatron.checkpoint.sharded import check_model
from illada_megatron.checkpoint.store import _own_checksum, newest_complete

NEWEST, OLDER = "step_00000002", "step_00000001"


@pytest.fixture
def save_dir(two_steps: Path, tmp_path: Path) -> Path:
    """The checkpoints of steps 1 and 2, to be damaged."""
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def _contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != OWNER)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _replace_text(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new, 1))


def _data_file(directory: Path) -> Path:
    return next(iter(sorted(directory.glob("*.distcp"))))


DAMAGES = {
    "interrupted": (lambda path: (path / "checkpoint.json").unlink(), "interrupted while it was written"),
    "truncated": (lambda path: _truncate(_data_file(path)), "bytes, expected"),
    "empty": (lambda path: _data_file(path).write_bytes(b""), "has 0 bytes, expected"),
    "bit flipped": (lambda path: _flip(_data_file(path)), "its bytes have changed: checksum"),
    "bit of the metadata flipped": (lambda path: _flip(path / ".metadata"), ".metadata: its bytes have changed"),
    "record changed": (
        lambda path: _replace_text(path / "checkpoint.json", '"lr": ', '"lr": 1'),
        "checkpoint.json: its bytes have changed",
    ),
    "missing file": (lambda path: _data_file(path).unlink(), "is missing, expected"),
    "missing metadata": (lambda path: (path / ".metadata").unlink(), ".metadata: is missing, expected"),
    "record cut": (lambda path: _truncate(path / "checkpoint.json"), "checkpoint.json: not JSON"),
    "record of a later version": (
        lambda path: (path / "checkpoint.json").write_text('{"version": 99}'),
        "version 99, this program reads 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_previous_checkpoint_is_used_and_said(
    damage: str, save_dir: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """It goes on from step 1, says why not from step 2, and saves a good step 2 and 3 afterwards."""
    do, reason = DAMAGES[damage]
    do(save_dir / NEWEST)
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}", "checkpoint.interval_steps=1")
    said = outcome.out.replace("\n", "")
    assert outcome.code == 0, outcome.err
    assert f"refused {save_dir}/{NEWEST}" in said
    assert reason in said
    assert f"continues from {save_dir}/{OLDER}: step 1, 4 samples consumed" in said
    assert "step       2/3" not in said  # interval 10: only the last is printed
    assert (save_dir / "latest").read_text() == "step_00000003\n"
    again = illada("train", *tiny_run, "training.exit_steps=2", f"checkpoint.load_dir={save_dir / NEWEST}")
    assert again.code == 0, again.err
    assert "finished at step 2 (" in again.out.replace("\n", "")


def test_no_intact_checkpoint_is_an_error_and_deletes_nothing(
    save_dir: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """Starting anew over a damaged run would overwrite what could still be repaired."""
    for name in (NEWEST, OLDER):
        _truncate(_data_file(save_dir / name))
    before = _contents(save_dir)
    for directory in ("save_dir", "load_dir"):
        outcome = illada("train", *tiny_run, f"checkpoint.{directory}={save_dir}")
        assert outcome.code == 2
        assert f"{save_dir}: no intact checkpoint" in outcome.err
        assert NEWEST in outcome.err
        assert OLDER in outcome.err
    assert _contents(save_dir) == before


def test_checksums_may_be_skipped(save_dir: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """A changed bit of a tensor is then not seen."""
    _flip(_data_file(save_dir / NEWEST))
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}", "checkpoint.verify=false")
    assert outcome.code == 0, outcome.err
    assert "refused" not in outcome.out
    assert "continues from" in outcome.out


def test_older_checkpoints_go(save_dir: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """Once a newer one is complete."""
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}", "checkpoint.keep_last=1")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in save_dir.glob("step_*")] == ["step_00000003"]


def test_interrupted_first_save_starts_from_nothing(save_dir: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    """A run killed during its first save has nothing to lose: it starts at step 0, and says so."""
    shutil.rmtree(save_dir / NEWEST)
    (save_dir / OLDER / "checkpoint.json").unlink()
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}", "training.exit_steps=1")
    assert outcome.code == 0, outcome.err
    assert f"refused {save_dir}/{OLDER}: interrupted" in outcome.out.replace("\n", "")
    assert "continues from" not in outcome.out
    assert (save_dir / "latest").read_text() == f"{OLDER}\n"


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_directory_without_checkpoint(command: str, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada) -> None:
    (tmp_path / "empty").mkdir()
    for directory, message in ((tmp_path / "empty", "holds no checkpoint"), (tmp_path / "none", "no such directory")):
        arguments = {
            "train": ["train", *tiny_run, f"checkpoint.load_dir={directory}"],
            "evaluate": ["evaluate", "--checkpoint", directory],
            "generate": ["generate", "--checkpoint", directory, "--prompt", "x"],
        }[command]
        outcome = illada(*arguments)
        assert outcome.code == 2
        assert f"{directory}: {message}" in outcome.err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=64", "model.hidden_size is 32 in the checkpoint, 64 in the configuration"),
        ("model.add_qkv_bias=true", "model.add_qkv_bias is False in the checkpoint, True in the configuration"),
        ("model.num_layers=4", "model.num_layers is 2 in the checkpoint, 4 in the configuration"),
        ("model.rotary_base=10000.0", "model.rotary_base is 500000.0 in the checkpoint, 10000.0 in the configuration"),
        ("model.mask_token_id=4", "model.mask_token_id is 5 in the checkpoint, 4 in the configuration"),
    ],
)
def test_checkpoint_of_another_model(
    override: str, message: str, save_dir: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """Also of the same sizes: another rotary base would load, and train something else."""
    before = _contents(save_dir)
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}", override)
    assert outcome.code == 2
    assert str(save_dir / NEWEST) in outcome.err
    assert message in outcome.err
    assert _contents(save_dir) == before


class _Call:
    """Pickles as a call, as every pickle that runs code does."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def _hide(path: Path, data: bytes) -> None:
    """Replace a file of a checkpoint and what the record says of it, as an attacker would."""
    path.write_bytes(data)
    record = json.loads((path.parent / "checkpoint.json").read_text())
    record["files"][path.name] = {"bytes": len(data), "xxh3_128": xxhash.xxh3_128_hexdigest(data)}
    del record["checksum"]
    record["checksum"] = _own_checksum(record)
    (path.parent / "checkpoint.json").write_text(json.dumps(record))


def _refused(illada: Illada, tiny_run: tuple[str, ...], save_dir: Path, file: str) -> None:
    for command in (["train", *tiny_run, f"checkpoint.load_dir={save_dir}"], ["evaluate", "--checkpoint", save_dir]):
        outcome = illada(*command)
        assert outcome.code == 2, outcome
        assert f"{save_dir / NEWEST}{file}" in outcome.err


@pytest.mark.parametrize("how", ["function of os", "builtin", "through an allowed module", "inside real metadata"])
def test_metadata_that_runs_code_is_refused(
    how: str, save_dir: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """torch reads `.metadata` with pickle; a downloaded checkpoint must not be a program."""
    marker = tmp_path / "code_ran"
    path = save_dir / NEWEST / ".metadata"
    if how == "function of os":
        data = pickle.dumps(_Call(os.mkdir, str(marker)))
    elif how == "builtin":
        data = pickle.dumps(_Call(eval, f"__import__('os').mkdir({str(marker)!r})"))
    elif how == "through an allowed module":  # GLOBAL with a dotted walk: metadata.os.mkdir
        walk = b"\x80\x04\x8c\x26torch.distributed.checkpoint.filesystem\x8c\x08os.mkdir\x93"
        walk = walk.replace(b"\x8c\x26", b"\x8c" + bytes([len("torch.distributed.checkpoint.filesystem")]))
        argument = str(marker).encode()
        data = walk + b"X" + len(argument).to_bytes(4, "little") + argument + b"\x85R."
    else:
        metadata = pickle.loads(path.read_bytes())
        metadata.planner_data = _Call(os.mkdir, str(marker))
        data = pickle.dumps(metadata)
    pickle.loads(data)  # the attack works on plain pickle
    assert marker.exists()
    marker.rmdir()
    _hide(path, data)
    _refused(illada, tiny_run, save_dir, "/.metadata")
    assert not marker.exists()


def test_a_field_that_an_earlier_checkpoint_lacks_has_its_default(two_steps: Path) -> None:
    """A run of before model.add_qkv_bias goes on; with biases it is another model."""
    info = find_checkpoint(two_steps)
    del info.config["model"]["add_qkv_bias"]
    config = saved_config(info)
    check_model(info, config)
    biased = config.model_copy(update={"model": config.model.model_copy(update={"add_qkv_bias": True})})
    with pytest.raises(CheckpointError, match=r"model\.add_qkv_bias is False in the checkpoint, True"):
        check_model(info, biased)


def test_weights_declared_as_objects_are_not_read(
    save_dir: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """Harmless metadata can say that a weight is a pickled object; torch would unpickle it without any check."""
    marker, directory = tmp_path / "code_ran", save_dir / NEWEST
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    buffer = io.BytesIO()
    torch.save(_Call(os.mkdir, str(marker)), buffer)
    (directory / "more.distcp").write_bytes(buffer.getvalue())
    name = "embedding.word_embeddings.weight"
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    for index in [index for index in metadata.storage_data if index.fqn == name]:
        del metadata.storage_data[index]
    metadata.storage_data[MetadataIndex(name)] = _StorageInfo("more.distcp", 0, len(buffer.getvalue()))
    _hide(directory / ".metadata", pickle.dumps(metadata))
    _refused(illada, tiny_run, save_dir, f": holds no tensor {name}")
    assert not marker.exists()


def test_files_outside_of_the_checkpoint_are_not_read(
    save_dir: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    directory = save_dir / NEWEST
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = f"../{OLDER}/{info.relative_path}"
    _hide(directory / ".metadata", pickle.dumps(metadata))
    file = _data_file(directory).name
    _refused(illada, tiny_run, save_dir, f"/.metadata: names the file ../{OLDER}/{file}")


@pytest.mark.parametrize("pattern", [".metadata", "*.distcp"])
def test_noise_with_the_right_checksum_is_refused(
    pattern: str, save_dir: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """The record agrees (or checksums are skipped), the content is nonsense."""
    (path,) = (save_dir / NEWEST).glob(pattern)
    _hide(path, bytes(7 * i % 251 for i in range(path.stat().st_size)))
    _refused(illada, tiny_run, save_dir, f"/{path.name}")


def test_save_that_cannot_be_written(
    tmp_path: Path, two_steps: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """A directory below a file: the operating system's words and the path, and the run that was loaded is untouched."""
    (tmp_path / "file").write_text("in the way")
    before = _contents(two_steps)
    arguments = (*tiny_run, f"checkpoint.load_dir={two_steps}", f"checkpoint.save_dir={tmp_path / 'file' / 'below'}")
    outcome = illada("train", *arguments)
    assert outcome.code == 2
    assert str(tmp_path / "file") in outcome.err
    assert _contents(two_steps) == before


def test_disk_that_fails_while_saving_keeps_the_older_checkpoint(
    save_dir: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    """The name of step 3 is taken by a file that cannot be a directory: the pointer still names step 2, whole."""
    (save_dir / "step_00000003").write_text("in the way")
    before = _contents(save_dir / NEWEST)
    outcome = illada("train", *tiny_run, f"checkpoint.save_dir={save_dir}")
    assert outcome.code == 1  # a launcher may try again
    assert str(save_dir / "step_00000003") in outcome.err
    assert (save_dir / "latest").read_text() == f"{NEWEST}\n"
    assert _contents(save_dir / NEWEST) == before


def test_every_file_truncated_changed_or_removed(save_dir: Path) -> None:
    """One at a time: the older checkpoint is found, and the refusal names the file."""
    before = _contents(save_dir / NEWEST)
    assert len(before) == 5
    for name, content in before.items():
        for do in (_truncate, _flip, Path.unlink):
            do(save_dir / NEWEST / name)
            info, refused = newest_complete(save_dir)
            assert info is not None
            assert info.step == 1, (name, do)
            assert name in refused[0], (name, do)
            (save_dir / NEWEST / name).write_bytes(content)
    info, refused = newest_complete(save_dir)
    assert info is not None
    assert (info.step, refused) == (2, [])
