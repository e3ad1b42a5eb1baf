"""What users get wrong in a conversion is said before anything is written, by name, and leaves nothing behind."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Illada
from random_weights import random_checkpoint, small_config
from safetensors.torch import load_file, save_file

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.new_directory import staged
from illada_megatron.checkpoint.hugging_face.config_json import read_config_json
from illada_megatron.checkpoint.hugging_face.exporting import export
from illada_megatron.checkpoint.hugging_face.importing import import_weights, open_source
from illada_megatron.checkpoint.hugging_face.layouts import LayoutName
from illada_megatron.checkpoint.hugging_face.safetensors_files import SafetensorsReader
from illada_megatron.checkpoint.hugging_face.verifying import verify
from illada_megatron.checkpoint.predictor import find_checkpoint
from illada_megatron.data.errors import DataError

ROOT = Path(__file__).parents[3]


def _exported(folder: Path, layout: LayoutName = "illada", *overrides: str) -> Path:
    random_checkpoint(folder / "run", small_config(*overrides))
    return export(find_checkpoint(folder / "run"), folder / "hf", layout, "fp32").directory


def _config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _words(path: Path, count: int) -> Path:
    """A tokenizer.json of `count` ids."""
    import tokenizers

    model = tokenizers.models.WordLevel({f"w{number}": number for number in range(count)}, unk_token="w0")
    tokenizers.Tokenizer(model).save(str(path))
    return path


def test_a_tokenizer_of_more_ids_than_rows(tmp_path: Path, illada: Illada) -> None:
    """250 rows, padded to 256: the padding is no row. Both ways."""
    random_checkpoint(tmp_path / "run", small_config())
    large, right = _words(tmp_path / "large.json", 251), _words(tmp_path / "right.json", 250)
    message = f"{large}: the tokenizer has 251 ids, the model's embedding has 250 rows"
    outcome = illada("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--tokenizer", large)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "hf").exists()
    outcome = illada("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--tokenizer", right)
    assert outcome.code == 0, outcome.err

    open_source(tmp_path / "hf")
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(tmp_path / "hf", None, [f"data.tokenizer_path={large}"])
    _words(tmp_path / "hf" / "tokenizer.json", 300)
    outcome = illada("convert", "from-hf", tmp_path / "hf", tmp_path / "start")
    assert (outcome.code, "has 300 ids, the model's embedding has 250 rows" in outcome.err) == (2, True), outcome.err
    assert not (tmp_path / "start").exists()
    # a tokenizer of the machine on which the runs are to come
    open_source(tmp_path / "hf", None, ["data.tokenizer_path=/elsewhere/tokenizer.json"])


def test_targets_that_no_directory_can_be_renamed_to(
    tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before a tensor is read and anything is written."""
    random_checkpoint(tmp_path / "run", small_config())
    here, link, dangling = tmp_path / "here", tmp_path / "link", tmp_path / "dangling"
    here.mkdir()
    link.symlink_to(here)
    dangling.symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(here)
    monkeypatch.setattr("illada_megatron.checkpoint.files.tensors.TensorReader.read", None)
    before = sorted(tmp_path.iterdir())
    for target, message in {
        ".": r"error: \.: is the current directory, .*: name a new directory in it, as exported",
        str(here): "here: is the current directory",
        str(link): "link: is a symbolic link to .*here, expected a new directory",
        str(dangling): "dangling: is a symbolic link to .*nowhere, expected a new directory",
        "new/..": r"new/\.\.: ends in `\.\.`",
        "s3://bucket/hf": "s3:/bucket/hf: is written on this machine's disks only",
    }.items():
        outcome = illada("convert", "to-hf", tmp_path / "run", target, "--no-tokenizer")
        assert outcome.code == 2
        assert re.search(message, outcome.err), outcome.err
        # reshard's targets, which may not even be empty directories
        with pytest.raises(CheckpointError), staged(Path(target), 0):
            pass
    assert sorted(tmp_path.iterdir()) == before
    assert not list(here.iterdir())


def test_an_empty_directory_is_a_target_and_a_mount_point_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    (tmp_path / "hf").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda _: True)
        with pytest.raises(
            CheckpointError, match=r"hf: is a mount point, .* name a new directory in it, as .*exported"
        ):
            export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "illada")
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "illada")
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_a_failed_conversion_leaves_no_directory(tmp_path: Path) -> None:
    """Neither the target nor those made above it; what was there before stays, and what another wrote meanwhile."""
    directory = _exported(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "start", tmp_path / "a" / "b" / "c", tmp_path / "there"):
        with pytest.raises(CheckpointError, match="no number in row 3"):
            import_weights(open_source(directory), target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run", "there"]
    assert not list((tmp_path / "there").iterdir())

    def fail_beside_another() -> None:
        with staged(tmp_path / "a" / "b" / "c", 0):
            (tmp_path / "a" / "mine").write_text("precious")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_beside_another()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_an_import_that_fails_in_its_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that no pointer names is one that the next attempt would refuse to overwrite."""
    directory = _exported(tmp_path)

    def full(source: Path, target: Path) -> None:
        if target.name == "latest":
            raise OSError(28, "No space left on device", str(source))
        source.rename(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            import_weights(open_source(directory), tmp_path / "start")
    assert not (tmp_path / "start").exists()
    import_weights(open_source(directory), tmp_path / "start")


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "illada",
            {"rope_scaling": {"type": "default", "factor": 4.0}},
            r"rope_scaling is \{.*4\.0\}: factor would change the default rotary embedding",
        ),
        ("illada", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention would change"),
        (
            "llada",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling is .*; this model knows only None",
        ),
        ("illada", {"rope_scaling": "default"}, "rope_scaling is 'default'; this model knows only"),
        (
            "illada",
            {"num_attention_heads": 8, "num_key_value_heads": 3},
            r"config\.json: num_attention_heads 8 is not a multiple of num_key_value_heads 3: change one of them$",
        ),
        ("llada", {"n_heads": 8, "n_kv_heads": 3}, r"config\.json: n_heads 8 is not a multiple of n_kv_heads 3: "),
        ("llada", {"n_heads": 4, "d_model": 34}, r"d_model 34 is not a multiple of n_heads 4: .* give head_dim$"),
        ("illada", {"vocab_size": "250"}, "vocab_size is '250': Input should be a valid integer"),
        ("illada", {"mask_token_id": "5"}, "mask_token_id is '5': Input should be a valid integer"),
        ("illada", {"num_attention_heads": {}}, r"num_attention_heads is \{\}: Input should be a valid integer"),
        ("illada", {"head_dim": {}}, r"head_dim is \{\}: Input should be a valid integer"),
        ("illada", {"rms_norm_eps": -1}, "rms_norm_eps is -1: Input should be greater than 0"),
        ("illada", {"model_type": []}, r"model_type is \[\], expected one of"),
        ("llada", {"clip_qkv": 8.0}, "clip_qkv is 8.0; this model knows only None"),
        ("llada", {"multi_query_attention": "yes"}, "multi_query_attention is 'yes', expected true, false or null"),
        ("llada", {"multi_query_attention": True}, "is True, which means 1 KV heads, and n_kv_heads is 2"),
        ("llada", {"multi_query_attention": False}, "is False, which means 4 KV heads, and n_kv_heads is 2"),
    ],
)
def test_a_config_json_that_is_refused_by_its_own_keys(
    layout: LayoutName, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    directory = _exported(tmp_path, layout)
    _config(directory, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        open_source(directory)
    assert str(error.value).startswith(f"{directory / 'config.json'}: ")
    assert "{'num_layers'" not in str(error.value)  # all of the model, where one key was meant


def test_config_json_nested_beyond_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_config_json(tmp_path)


def test_a_negative_mask(tmp_path: Path) -> None:
    directory = _exported(tmp_path)
    _config(directory, model_type="llama", mask_token_id=None)
    with pytest.raises(CheckpointError, match="--mask-token-id is -1, expected an id below the 250 rows"):
        open_source(directory, mask_token_id=-1)


@pytest.mark.parametrize("groups", [1, 4])
def test_olmos_multi_query_attention(groups: int, tmp_path: Path) -> None:
    """Where n_kv_heads is null: true is one KV head, false as many as heads. embedding_size null is vocab_size."""
    directory = _exported(tmp_path, "llada", f"model.num_query_groups={groups}")
    _config(directory, multi_query_attention=groups == 1, n_kv_heads=None, embedding_size=None)
    source = open_source(directory)
    assert (source.model.num_query_groups, source.model.vocab_size) == (groups, 250)
    import_weights(source, tmp_path / "start")
    verify(find_checkpoint(tmp_path / "start"), directory).check()
    _config(directory, n_kv_heads=groups)
    assert open_source(directory).model == source.model


@contextmanager
def _as_nobody() -> Iterator[None]:
    """root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_file_that_may_not_be_read_is_not_missing() -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "model.safetensors")
        save_file({"a": torch.zeros(2)}, file)
        Path(name).chmod(0o755)
        file.chmod(0)
        with _as_nobody(), pytest.raises(PermissionError, match=rf"Permission denied: '{file}'"):
            SafetensorsReader(file.parent)


def test_a_file_larger_than_the_system_allows(tmp_path: Path) -> None:
    """`ulimit -f`: out of here the error says what to do, in at least which file it was."""
    directory = _exported(tmp_path)
    resource_limit = 60_000
    assert (directory / "model.safetensors").stat().st_size > resource_limit

    def limited(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "illada_megatron", *map(str, arguments)],
            cwd=ROOT,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource_limit, resource_limit)),
            capture_output=True,
            text=True,
            check=False,
        )

    ended = limited("convert", "to-hf", tmp_path / "run", tmp_path / "out", "--dtype", "fp32", "--no-tokenizer")
    assert ended.returncode == 2, ended.stderr
    assert re.search(r"model\.safetensors: has [\d,]+ bytes, more than .* --max-shard-size", ended.stderr), ended.stderr
    ended = limited("convert", "from-hf", directory, tmp_path / "start")
    assert re.search(rf"File too large: '{tmp_path}/start/step_00000000/\S+\.distcp'", ended.stderr), ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_a_bias_that_is_one_number(tmp_path: Path) -> None:
    directory = _exported(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    save_file({**tensors, "lm_head.bias": torch.tensor(1.0)}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.bias is not zero"):
        open_source(directory)


def test_verification_without_transformers_is_refused_first(
    tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _exported(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for arguments in (
        ("to-hf", tmp_path / "run", tmp_path / "out", "--no-tokenizer"),
        ("from-hf", directory, tmp_path / "out"),
    ):
        outcome = illada("convert", *arguments, "--verify")
        assert (outcome.code, "--verify computes with transformers: pip install" in outcome.err) == (2, True)
        assert not (tmp_path / "out").exists()
