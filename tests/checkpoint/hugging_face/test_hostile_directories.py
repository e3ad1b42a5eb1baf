"""Directories that are damaged, hostile or of another model: refused, with the name of what is wrong."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import change_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.hugging_face.importing import import_weights, open_source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected one of illada, llada, llama, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model knows only 'silu'"),
        ({"attention_bias": True}, r"has no tensor model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'"),
        ({"qkv_bias": "yes"}, "qkv_bias is 'yes': Input should be a valid boolean"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling is .* knows only the default rotary"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters is .*: factor Field required"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "beta Extra inputs are not permitted"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_type llama3 needs original_max_position"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": "4", "mscale": 1, "mscale_all_dim": 1}},
            "rope_scaling is .*'<=' not supported",
        ),
        (
            {
                "rope_scaling": {
                    **{"rope_type": "yarn", "factor": 4, "truncate": False},
                    "original_max_position_embeddings": 16,
                }
            },
            "truncate Extra inputs are not permitted",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "rope_scaling is .*int too large"),
        ({"rope_scaling": {"rope_type": "linear", "factor": math.inf}}, "rope_scaling is .* finite"),
        ({"qk_layernorm": True}, r"has no tensor model\.layers\.0\.self_attn\.q_norm\.weight"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"hidden_size": "left out"}, "has no key hidden_size"),
        ({"hidden_size": "32"}, "hidden_size is '32': Input should be a valid integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_hidden_layers": 4}, r"has no tensor model\.layers\.3\.input_layernorm\.weight"),
        ({"num_hidden_layers": 2}, r"has a tensor model\.layers\.2\.\S+, which this model does not know"),
        ({"intermediate_size": 40}, r"mlp\.gate_proj\.weight has shape \(48, 32\), config\.json makes it \(40, 32\)"),
        ({"tie_word_embeddings": False}, r"has no tensor lm_head\.weight"),
        ({"mask_token_id": 300}, "the mask is 300, the embedding has 250 rows"),
    ],
)
def test_another_model_is_refused(changes: dict[str, Any], message: str, exported: Path) -> None:
    change_config(exported, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_source(exported)


def _index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = directory / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    change(values["weight_map"])
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("../outside.safetensors", r"names the file '\.\./outside\.safetensors', expected a name"),
        ("/etc/passwd", "names the file '/etc/passwd'"),
        ("sub/x.safetensors", "names the file 'sub/x.safetensors'"),
        ("..", r"names the file '\.\.'"),
        ("x\0.safetensors", "names the file"),
        ("config.json", "names the file 'config.json'"),
        (5, "names the file 5|expected JSON with a weight_map"),
        ("missing.safetensors", "names the file 'missing.safetensors', which is missing"),
        ("model-00001-of-00011.safetensors", "says lm_norm is in .*, which does not have it"),
    ],
)
def test_hostile_index(file: Any, message: str, exported: Path, tmp_path: Path) -> None:
    save_file({"lm_norm": torch.zeros(1)}, tmp_path / "outside.safetensors")
    first = sorted(path.name for path in exported.glob("*.safetensors"))[0]
    name = first if str(file).startswith("model-") else file
    _index(exported, lambda weights: weights.update(lm_norm=name))
    with pytest.raises(CheckpointError, match=message):
        open_source(exported)


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "{}"])
def test_index_that_is_none(content: str, exported: Path) -> None:
    (exported / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json: expected JSON with a weight_map"):
        open_source(exported)


def test_damaged_files(exported: Path, tmp_path: Path) -> None:
    file = sorted(exported.glob("*.safetensors"))[-1]
    content = file.read_bytes()
    for damaged in (content[:-1], content[:5], b"", content + b"x", b"\xff" * 8 + content[8:]):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{file.name}: not a whole safetensors file"):
            open_source(exported)
    tensors = load_file_of(content, tmp_path)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=r"has dtype I8, expected one of F32, BF16"):
        open_source(exported)
    name, tensor = next(iter(tensors.items()))
    tensor.view(-1)[3] = float("nan")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} has a value that is no number in row"):
        import_weights(open_source(exported), tmp_path / "back")
    assert not list((tmp_path / "back").glob("step_*"))
    file.unlink()
    with pytest.raises(CheckpointError, match="which is missing: fetch the whole checkpoint"):
        open_source(exported)


def load_file_of(content: bytes, folder: Path) -> dict[str, Tensor]:
    (folder / "whole.safetensors").write_bytes(content)
    return load_file(folder / "whole.safetensors")


def test_pickled_weights_are_refused(exported: Path) -> None:
    for file in exported.glob("model*"):
        if file.suffix in (".safetensors", ".json"):
            file.unlink()
    torch.save({}, exported / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors .*\.bin is read with pickle"):
        open_source(exported)
