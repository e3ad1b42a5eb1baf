"""What to-gguf writes, read back by the package gguf: every weight bit for bit, and what llama.cpp is told of them."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Illada
from random_weights import random_checkpoint, small_config
from source_tokenizers import byte_level, trained_sentencepiece
from tokenizers import pre_tokenizers
from torch import Tensor

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.gguf import exporting
from illada_megatron.checkpoint.gguf.exporting import export_gguf
from illada_megatron.checkpoint.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, vocabulary
from illada_megatron.checkpoint.predictor import find_checkpoint
from illada_megatron.config.parameters import EMBEDDING, FINAL_NORM, HEAD
from illada_megatron.data.errors import DataError
from illada_megatron.data.tokenizers.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keys and tensors of a file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    tensors = {}
    for one in reader.tensors:
        rows = torch.frombuffer(bytearray(one.data.tobytes()), dtype=kinds[one.tensor_type.name])
        tensors[one.name] = rows.view([int(size) for size in reversed(one.shape)])
    return keys, tensors


def _turned(rows: Tensor, heads: int) -> Tensor:
    """Rows of heads of 8 in the order 0, 4, 1, 5, ..."""
    order = [8 * head + half + i for head in range(heads) for i in range(4) for half in (0, 4)]
    return rows[order]


@pytest.mark.parametrize(("precision", "main"), [("fp32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_comes_once_and_rounded_once(
    precision: str, main: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the rows that pad the vocabulary; queries and keys in llama.cpp's order; blocks smaller than a head."""
    monkeypatch.setattr("illada_megatron.checkpoint.hugging_face.exporting.BLOCK_BYTES", 2 * 32 * 4)
    config = small_config(
        f"training.precision={precision}", "model.tie_word_embeddings=false", "model.add_qkv_bias=true"
    )
    weights = random_checkpoint(tmp_path / "run", config, main)
    told: list[int] = []
    done = export_gguf(find_checkpoint(tmp_path / "run"), tmp_path / "m.gguf", dtype, progress=told.append)  # type: ignore[arg-type]
    assert done.from_main_weights == (main and dtype != "bf16")
    keys, tensors = _read(tmp_path / "m.gguf")
    assert done.tensors == len(tensors) == 3 + 3 * 12
    assert done.nbytes == sum(tensor.nbytes for tensor in tensors.values()) == sum(told)
    assert keys["general.file_type"] == {"fp32": 0, "fp16": 1, "bf16": 32}[dtype]

    def rounded(weight: Tensor) -> Tensor:
        weight = weight if main and dtype != "bf16" else weight.to(DTYPES[precision])
        return weight.to(DTYPES[dtype]) if weight.dim() == 2 else weight.float()

    expected = {
        "token_embd.weight": weights[EMBEDDING][:250],
        "output.weight": weights[HEAD][:250],
        "output_norm.weight": weights[FINAL_NORM],
    }
    for layer in range(3):
        of = {
            name.removeprefix(f"decoder.layers.{layer}."): weight
            for name, weight in weights.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        for kind in ("weight", "bias"):
            # two groups, each of two query heads, a key head and a value head, of 8 rows each
            groups = of[f"self_attention.linear_qkv.{kind}"].unflatten(0, (2, 32))
            q, k, v = groups[:, :16].flatten(0, 1), groups[:, 16:24].flatten(0, 1), groups[:, 24:].flatten(0, 1)
            expected[f"blk.{layer}.attn_q.{kind}"] = _turned(q, 4)
            expected[f"blk.{layer}.attn_k.{kind}"] = _turned(k, 2)
            expected[f"blk.{layer}.attn_v.{kind}"] = v
        expected[f"blk.{layer}.attn_output.weight"] = of["self_attention.linear_proj.weight"]
        expected[f"blk.{layer}.attn_norm.weight"] = of["input_layernorm.weight"]
        expected[f"blk.{layer}.ffn_norm.weight"] = of["pre_mlp_layernorm.weight"]
        expected[f"blk.{layer}.ffn_gate.weight"] = of["mlp.linear_fc1.weight"][:48]
        expected[f"blk.{layer}.ffn_up.weight"] = of["mlp.linear_fc1.weight"][48:]
        expected[f"blk.{layer}.ffn_down.weight"] = of["mlp.linear_fc2.weight"]
    assert tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert tensors[name].dtype == rounded(weight).dtype, name
        assert torch.equal(tensors[name], rounded(weight)), name


def test_what_llama_cpp_is_told(tmp_path: Path) -> None:
    """Sizes and settings; without a tokenizer ids alone. A tied head is not there."""
    scaling = ("rope_type=yarn", "factor=2.0", "original_max_position_embeddings=32", "attention_factor=1.5")
    config = small_config(
        *("model.kv_channels=12", "model.norm_epsilon=1e-6", "model.rotary_base=10000"),
        *(f"model.rope_scaling.{one}" for one in scaling),
    )
    random_checkpoint(tmp_path / "run", config)
    export_gguf(find_checkpoint(tmp_path / "run"), tmp_path / "m.gguf")
    keys, tensors = _read(tmp_path / "m.gguf")
    assert "output.weight" not in tensors
    of_architecture = {
        "llada.vocab_size": 250,
        "llada.context_length": 64,
        "llada.embedding_length": 32,
        "llada.feed_forward_length": 48,
        "llada.block_count": 3,
        "llada.attention.head_count": 4,
        "llada.attention.head_count_kv": 2,
        "llada.attention.key_length": 12,
        "llada.attention.value_length": 12,
        "llada.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llada.rope.dimension_count": 12,
        "llada.rope.freq_base": 10000.0,
        "llada.rope.scaling.type": "yarn",
        "llada.rope.scaling.factor": 2.0,
        "llada.rope.scaling.original_context_length": 32,
        "llada.rope.scaling.attn_factor": pytest.approx(1.5 / 1.0693147),
        "llada.attention.causal": False,
    }
    assert {name: value for name, value in keys.items() if name.startswith("llada.")} == of_architecture
    assert keys["general.architecture"] == "llada"
    assert keys["diffusion.shift_logits"] is False
    assert {name: value for name, value in keys.items() if name.startswith("tokenizer.")} == {
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.mask_token_id": 5,
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.qk_layernorm=true"], "model.qk_layernorm is True, .*no norms of queries and keys"),
        (["model.logit_softcap=5"], "model.logit_softcap is 5.0, .*it leaves logits as they are"),
        (["model.exclude_mask_logit=true"], "model.exclude_mask_logit is True, .*the mask takes part in its softmax"),
        (
            [
                f"model.rope_scaling.{one}"
                for one in (
                    *("rope_type=llama3", "factor=2.0", "original_max_position_embeddings=32"),
                    *("low_freq_factor=1.0", "high_freq_factor=4.0"),
                )
            ],
            "model.rope_scaling is {'rope_type': 'llama3', .*no factor for each frequency",
        ),
        (
            [
                f"model.rope_scaling.{one}"
                for one in ("rope_type=yarn", "factor=2.0", "original_max_position_embeddings=32", "beta_fast=16")
            ],
            "model.rope_scaling is {'rope_type': 'yarn', .*its beta_fast and beta_slow are 32 and 1",
        ),
    ],
)
def test_what_the_architecture_cannot_hold_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "run", small_config(*overrides))
    with pytest.raises(CheckpointError, match=message):
        export_gguf(find_checkpoint(tmp_path / "run"), tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    info, target = find_checkpoint(tmp_path / "run"), tmp_path / "new" / "m.gguf"
    with pytest.raises(CheckpointError, match=r"m.bin: ends in '.bin', expected the name of a file that ends in .gguf"):
        export_gguf(info, tmp_path / "m.bin")
    (tmp_path / "mine.gguf").write_text("precious")
    with pytest.raises(CheckpointError, match=r"mine.gguf: exists, and is not replaced"):
        export_gguf(info, tmp_path / "mine.gguf")

    def full(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "bytes_of", full)
        with pytest.raises(OSError, match="No space left"):
            export_gguf(info, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.gguf", "run"]
    with monkeypatch.context() as patch:  # somebody else is faster
        patch.setattr(exporting, "_check_end", lambda *_: target.touch())
        with pytest.raises(CheckpointError, match=r"m.gguf: exists, and is not replaced"):
            export_gguf(info, target)
    assert [path.name for path in target.parent.iterdir()] == ["m.gguf"]
    assert (tmp_path / "mine.gguf").read_text() == "precious"


def test_a_weight_beyond_fp16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    read = exporting.TensorReader.read
    monkeypatch.setattr(exporting.TensorReader, "read", lambda *arguments: read(*arguments) * 1e6)
    info = find_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"embedding.*: has a value of .*, fp16 ends at 65504: take --dtype bf16"):
        export_gguf(info, tmp_path / "m.gguf", "fp16")
    export_gguf(info, tmp_path / "m.gguf", "bf16")


def test_the_command(sentencepiece_model: Path, tmp_path: Path, illada: Illada) -> None:
    """With the run's tokenizer, another or none."""
    config = small_config("model.vocab_size=610", f"data.tokenizer_path={sentencepiece_model}")
    random_checkpoint(tmp_path / "run", config)
    outcome = illada("convert", "to-gguf", tmp_path / "run", tmp_path / "m.gguf", "--dtype", "fp32")
    assert outcome.code == 0, outcome.err
    assert "m.gguf: 29 tensors of " in outcome.out
    assert "bytes in fp32, architecture llada" in outcome.out
    assert f"tokenizer {sentencepiece_model}, 600 ids" in outcome.out
    keys, _ = _read(tmp_path / "m.gguf")
    words = load_tokenizer(sentencepiece_model)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert keys["tokenizer.ggml.model"] == "llama"
    assert tokens[:600] == [words.spelled(token_id) for token_id in range(600)]
    assert tokens[600:] == [f"[PAD{token_id}]" for token_id in range(600, 610)]
    assert (types[5], types[9], types[609], len(types)) == (CONTROL, BYTE, UNUSED, 610)
    ids = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "unknown", "mask")}
    assert ids == {"bos": 1, "eos": 2, "unknown": 0, "mask": 5}
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        assert keys[f"tokenizer.ggml.{name}"] is False

    outcome = illada("convert", "to-gguf", tmp_path / "run", tmp_path / "n.gguf", "--no-tokenizer")
    assert outcome.code == 0, outcome.err
    assert "no tokenizer: llama.cpp runs it on ids alone" in outcome.out
    random_checkpoint(tmp_path / "small", small_config())
    outcome = illada("convert", "to-gguf", tmp_path / "small", tmp_path / "o.gguf", "--tokenizer", sentencepiece_model)
    assert outcome.code == 2
    assert "the tokenizer has 600 ids, the model's embedding has 250 rows" in outcome.err
    assert not (tmp_path / "o.gguf").exists()


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, illada: Illada, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    monkeypatch.setitem(sys.modules, "gguf", None)
    outcome = illada("convert", "to-gguf", tmp_path / "run", tmp_path / "m.gguf", "--no-tokenizer")
    assert outcome.code == 2
    assert "pip install 'illada-megatron[gguf]'" in outcome.err


def test_a_byte_level_tokenizer_with_holes(tmp_path: Path) -> None:
    """Ids that nothing has, and tokens that were added to it."""
    path = byte_level(tmp_path / "tokenizer.json", pre_tokenizers.ByteLevel(add_prefix_space=False))
    definition = json.loads(path.read_text())
    last = next(name for name, token_id in definition["model"]["vocab"].items() if token_id == 697)
    definition["model"]["vocab"][last] = 703
    path.write_text(json.dumps(definition))
    found = vocabulary(path)
    assert (found.model, found.pre, found.vocab_size, found.notes) == ("gpt2", "trillion", 704, ())
    assert found.tokens[697:] == ["", "<user>", "===", "", "", "", last]
    assert found.types[697:] == [UNUSED, USER_DEFINED, USER_DEFINED, UNUSED, UNUSED, UNUSED, NORMAL]
    assert found.types[:2] == [CONTROL, CONTROL]


def test_what_would_give_other_ids_is_refused(tmp_path: Path) -> None:
    settings: dict[str, object] = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}
    for changes, message in (
        ({"model_type": "unigram"}, r"its model_type is 1, expected 2 \(BPE\)"),
        ({"normalization_rule_name": "nfkc"}, "it normalises text by the rule 'nfkc'"),
        ({}, "it takes runs of spaces together"),
        ({"remove_extra_whitespaces": False, "byte_fallback": False}, "it has no pieces for the 256 bytes"),
        (
            {"remove_extra_whitespaces": False, "user_defined_symbols": ["==="]},
            r"a space comes before the text behind \['==='\] there",
        ),
    ):
        path = trained_sentencepiece(tmp_path / "t.model", **{**settings, **changes})
        with pytest.raises(DataError, match=f"t.model: llama.cpp would give other ids .*: {message}.*--no-tokenizer"):
            vocabulary(path)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for pre_tokenizer, changes, message in (
        (pre_tokenizers.ByteLevel(add_prefix_space=True), {}, "no name for how its pre_tokenizer cuts text"),
        (plain, {"ignore_merges": True}, "no name for how its pre_tokenizer cuts text: .*, ignore_merges"),
        (plain, {"normalizer": {"type": "NFKC"}}, "its normalizer is NFKC, expected none or NFC"),
    ):
        with pytest.raises(DataError, match=f"tokenizer.json: llama.cpp would give other ids .*: .*{message}"):
            vocabulary(byte_level(tmp_path / "tokenizer.json", pre_tokenizer, **changes))
