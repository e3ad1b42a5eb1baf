"""What is imported is what was exported, bit for bit; what is not this model is refused with its name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Illada
from random_weights import DTYPES, change_config, logits_of, random_checkpoint, small_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.files.tensors import TensorReader
from illada_megatron.checkpoint.hugging_face import exporting
from illada_megatron.checkpoint.hugging_face.exporting import export
from illada_megatron.checkpoint.hugging_face.importing import import_weights, open_source
from illada_megatron.checkpoint.hugging_face.layouts import LAYOUTS, layout_tensors
from illada_megatron.checkpoint.hugging_face.verifying import verify
from illada_megatron.checkpoint.predictor import find_checkpoint
from illada_megatron.config.parameters import EMBEDDING, HEAD, canonical_name, parameters

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def _read(path: Any) -> dict[str, Tensor]:
    reader = TensorReader(path)
    return {name: reader.read(name) for name in reader.tensors}


@pytest.mark.parametrize("layout", ["illada", "llada"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_there_and_back_is_the_same_checkpoint(
    layout: str, precision: str, tied: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor bit for bit, padded rows of zeros restored, and all of the model's configuration."""
    monkeypatch.setattr(exporting, "BLOCK_BYTES", 5 * 32 * 4)
    config = small_config(
        *(f"training.precision={precision}", f"model.tie_word_embeddings={tied}", "model.logit_softcap=7.0"),
        *("model.kv_channels=12", "model.rotary_base=10000.0", "model.norm_epsilon=1e-6", "model.mask_token_id=249"),
    )
    weights = random_checkpoint(tmp_path / "run", config)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", layout, precision, 9_000)  # type: ignore[arg-type]
    source = open_source(tmp_path / "hf")
    read = []
    path = import_weights(source, tmp_path / "back", read.append)
    assert sum(read) == source.nbytes
    back = _read(path)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert back[name].dtype == DTYPES[precision]
        assert torch.equal(back[name], weight), name
    info = find_checkpoint(tmp_path / "back")
    assert info.progress is None
    assert info.config["model"] == config.model.model_dump()
    assert info.config["training"]["precision"] == precision
    verify(info, tmp_path / "hf").check()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_row_of_every_parameter_has_one_place(layout: Any) -> None:
    """In both directions, and under the names of Transformer Engine's layers, too."""
    norms = ["model.qk_layernorm=true"] if layout is LAYOUTS["illada"] else []
    model = small_config("model.tie_word_embeddings=false", "model.add_qkv_bias=true", *norms).model
    rows: dict[str, list[int]] = {}
    names = []
    for tensor in layout_tensors(layout, model):
        names.append(tensor.name)
        assert tensor.shape[0] == sum(count for _, count in tensor.runs)
        for first, count in tensor.runs:
            rows.setdefault(tensor.parameter, []).extend(range(first, first + count))
    assert len(set(names)) == len(names)
    for parameter in parameters(model):
        wanted = model.vocab_size if parameter.name in (EMBEDDING, HEAD) else parameter.shape[0]
        assert sorted(rows[parameter.name]) == list(range(wanted)), parameter.name
    for fused in ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"):
        assert canonical_name(f"decoder.layers.0.{fused}", 2, False) in rows


def test_training_begins_with_the_weights(
    exported: Path, tmp_path: Path, tiny_run: tuple[str, ...], illada: Illada
) -> None:
    outcome = illada("convert", "from-hf", exported, tmp_path / "start", "--verify")
    assert outcome.code == 0, outcome.err
    assert re.search(r"verified in fp32 on weights in float32: largest difference of logits \S+e-0[67]", outcome.out)
    shape = ("model.num_layers=3", "training.train_steps=1", f"checkpoint.load_dir={tmp_path / 'start'}")
    outcome = illada("train", *tiny_run, *shape)
    assert outcome.code == 0, outcome.err
    assert f"begins with the weights of {tmp_path / 'start' / 'step_00000000'}" in re.sub(r"\s*\n\s*", "", outcome.out)
    # the held-out bound is that of the checkpoint that was exported
    held_out = [argument for argument in tiny_run if argument.startswith(("data.validation", "validation", "data.seq"))]
    bounds = []
    for checkpoint in ("run", "start"):
        outcome = illada("evaluate", "--checkpoint", tmp_path / checkpoint, *held_out)
        assert outcome.code == 0, outcome.err
        bounds.append(re.findall(r"bound (\S+) nats", outcome.out))
    assert bounds[0] == bounds[1]


def test_a_save_dir_with_checkpoints_is_left_alone(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run: has checkpoints already \(step_00000007\)"):
        import_weights(open_source(exported), tmp_path / "run")
    assert find_checkpoint(tmp_path / "run").step == 7
    # what a killed import leaves is no checkpoint
    left = tmp_path / "start" / "step_00000000"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    import_weights(open_source(exported), tmp_path / "start")
    with pytest.raises(CheckpointError, match=r"start: has checkpoints already \(step_00000000\)"):
        import_weights(open_source(exported), tmp_path / "start")


def test_a_released_config_does_not_say_the_mask(exported: Path) -> None:
    change_config(exported, mask_token_id="left out")
    assert open_source(exported).model.mask_token_id == 5
    assert open_source(exported, mask_token_id=9).model.mask_token_id == 9
    with pytest.raises(CheckpointError, match="the mask is 250, the embedding has 250 rows"):
        open_source(exported, mask_token_id=250)
    change_config(exported, mask_token_id=5)
    with pytest.raises(CheckpointError, match="mask_token_id is 5, --mask-token-id is 9"):
        open_source(exported, mask_token_id=9)


def test_an_lm_head_beside_tied_embeddings_has_to_be_the_embedding(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    directory = export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "illada", "fp32").directory
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, directory / "model.safetensors")
    open_source(directory)
    tensors["lm_head.weight"][7, 3] += 1
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but they differ"):
        open_source(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_gets_a_mask(tied: bool, tmp_path: Path) -> None:
    """A row behind the vocabulary, the mean of the others; the logits of all others are those of the model with
    bidirectional attention, whose modeling file verification uses."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied, rms_norm_eps=1e-6))
    llama.save_pretrained(tmp_path / "llama")
    source = open_source(tmp_path / "llama")
    assert (source.model.mask_token_id, source.model.vocab_size, source.model.padded_vocab_size) == (200, 201, 256)
    assert (source.model.rotary_base, source.model.tie_word_embeddings) == (10000.0, tied)
    weights = _read(import_weights(source, tmp_path / "start"))
    theirs = llama.model.embed_tokens.weight.detach()
    assert torch.equal(weights[EMBEDDING][:200], theirs)
    torch.testing.assert_close(weights[EMBEDDING][200], theirs.mean(0))
    assert not weights[EMBEDDING][201:].any()
    if not tied:
        torch.testing.assert_close(weights[HEAD][200], llama.lm_head.weight.detach().mean(0))
    verify(find_checkpoint(tmp_path / "start"), tmp_path / "llama").check()
    # exported again it is an iLLaDA with the mask in its vocabulary
    export(find_checkpoint(tmp_path / "start"), tmp_path / "illada", "illada", "fp32")
    verify(find_checkpoint(tmp_path / "start"), tmp_path / "illada").check()


def test_an_unused_id_as_mask_and_an_untied_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(tmp_path / "llama")
    source = open_source(tmp_path / "llama", None, ["model.tie_word_embeddings=false"], mask_token_id=150)
    assert (source.model.mask_token_id, source.model.vocab_size) == (150, 200)
    weights = _read(import_weights(source, tmp_path / "start"))
    assert torch.equal(weights[HEAD], weights[EMBEDDING])
    verify(find_checkpoint(tmp_path / "start"), tmp_path / "llama").check()
    with pytest.raises(
        CheckpointError, match=r"--mask-token-id is 201, expected an id below the 200 rows .* or 200 for"
    ):
        open_source(tmp_path / "llama", mask_token_id=201)


def test_the_configuration_of_the_runs_to_come(exported: Path, tmp_path: Path) -> None:
    """Everything but the model is theirs; of the model what does not change the weights' meaning."""
    source = open_source(exported, "tiny", ["training.precision=bf16", "data.sequence_length=16", "training.lr=1e-4"])
    assert (source.config.training.lr, source.config.training.global_batch_size) == (1e-4, 16)
    assert source.model.hidden_size == 32
    weights = _read(import_weights(source, tmp_path / "start"))
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    verify(find_checkpoint(tmp_path / "start"), exported).check()
    with pytest.raises(
        CheckpointError, match=r"model\.norm_epsilon is 0\.1 in the configuration, 1e-05 in the directory"
    ):
        open_source(exported, None, ["model.norm_epsilon=0.1"])
    padded = open_source(exported, None, ["model.make_vocab_size_divisible_by=100"])
    assert _read(import_weights(padded, tmp_path / "padded"))[EMBEDDING].shape == (300, 32)


def _random_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("tied", [True, False])
def test_qwen2_comes_with_its_biases(tied: bool, tmp_path: Path) -> None:
    """The same logits as transformers' Qwen2, told that everything is visible; out again in both layouts, loaded by
    AutoModel, and in again bit for bit."""
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied, attn_implementation="eager"))
    _random_biases(qwen)
    qwen.save_pretrained(tmp_path / "qwen")
    source = open_source(tmp_path / "qwen", mask_token_id=150)
    assert source.model.add_qkv_bias
    weights = _read(import_weights(source, tmp_path / "start"))
    # group 1 of 2: its two query heads, its key head, its value head, of 8 elements each
    bias, theirs = weights["decoder.layers.1.self_attention.linear_qkv.bias"][32:], qwen.model.layers[1].self_attn
    assert torch.equal(bias[:16], theirs.q_proj.bias[16:])
    assert torch.equal(bias[16:24], theirs.k_proj.bias[8:])
    assert torch.equal(bias[24:], theirs.v_proj.bias[8:])
    info = find_checkpoint(tmp_path / "start")
    verify(info, tmp_path / "qwen").check()

    tokens = torch.randint(0, 200, (3, 40))
    with torch.no_grad():
        logits = qwen(tokens, attention_mask=torch.zeros(3, 1, 40, 40)).logits
        causal = qwen(tokens).logits
    assert (causal - logits).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(tmp_path / "start", tokens), logits, rtol=1e-5, atol=1e-5)
    for layout in LAYOUTS:
        directory = export(info, tmp_path / layout, layout, "fp32").directory
        verify(info, directory).check()
        model = AutoModel.from_pretrained(directory, trust_remote_code=True)
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)
        again = open_source(directory)
        assert again.model == source.model
        back = _read(import_weights(again, tmp_path / f"back-{layout}"))
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weight) for name, weight in weights.items())


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn, as DeepSeek": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
        **{"mscale": 0.7, "mscale_all_dim": 0.2},
    },
}


@pytest.mark.parametrize("scaling", [None, *SCALINGS])
def test_qwen3_comes_with_its_norms_and_frequencies(scaling: str | None, tmp_path: Path) -> None:
    """The same logits as transformers' Qwen3, told that everything is visible; out again, loaded by AutoModel, saved by
    transformers, and in again bit for bit. LLaDA's layout has no names for either."""
    torch.manual_seed(0)
    rope = {"rope_parameters": {"rope_theta": 5000.0, **SCALINGS[scaling]}} if scaling else {}
    qwen = Qwen3ForCausalLM(Qwen3Config(**SIZES, **rope, head_dim=12, attn_implementation="eager"))
    for name, parameter in qwen.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    qwen.save_pretrained(tmp_path / "qwen")
    source = open_source(tmp_path / "qwen", mask_token_id=150)
    assert source.model.qk_layernorm
    assert (source.model.rope_scaling is None) == (scaling is None)
    weights = _read(import_weights(source, tmp_path / "start"))
    theirs = qwen.model.layers[1].self_attn.q_norm.weight
    assert torch.equal(weights["decoder.layers.1.self_attention.q_layernorm.weight"], theirs)
    info = find_checkpoint(tmp_path / "start")
    verify(info, tmp_path / "qwen").check()
    tokens = torch.randint(0, 200, (3, 40))
    with torch.no_grad():
        logits = qwen(tokens, attention_mask=torch.zeros(3, 1, 40, 40)).logits
    torch.testing.assert_close(logits_of(tmp_path / "start", tokens), logits, rtol=1e-5, atol=1e-5)
    directory = export(info, tmp_path / "illada", "illada", "fp32").directory
    verify(info, directory).check()
    model = AutoModel.from_pretrained(directory, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "theirs")
    for place in (directory, tmp_path / "theirs"):
        again = open_source(place)
        assert again.model == source.model
        back = _read(import_weights(again, tmp_path / f"back-{place.name}"))
        assert back.keys() == weights.keys()
        assert all(torch.equal(back[name], weight) for name, weight in weights.items())
    with pytest.raises(CheckpointError, match="the layout llada has no qk_layernorm"):
        export(info, tmp_path / "llada", "llada", "fp32")


def test_llamas_attention_bias_is_one_at_the_output_too(tmp_path: Path) -> None:
    """Read where that one is zero; elsewhere nothing here could hold it."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, rms_norm_eps=1e-6))
    _random_biases(llama)
    for layer in llama.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.bias)
    llama.save_pretrained(tmp_path / "llama")
    source = open_source(tmp_path / "llama")
    assert source.model.add_qkv_bias
    import_weights(source, tmp_path / "start")
    verify(find_checkpoint(tmp_path / "start"), tmp_path / "llama").check()
    llama.model.layers[1].self_attn.o_proj.bias.data[3] = 0.1
    llama.save_pretrained(tmp_path / "llama")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.o_proj\.bias is not zero; .* values alone"):
        open_source(tmp_path / "llama")


def test_biases_that_config_json_does_not_name(tmp_path: Path) -> None:
    """Weights of a model with biases under a config.json of one without."""
    torch.manual_seed(0)
    qwen = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    _random_biases(qwen)
    qwen.save_pretrained(tmp_path / "qwen")
    change_config(tmp_path / "qwen", model_type="llama")
    with pytest.raises(CheckpointError, match=r"self_attn\.[qkv]_proj\.bias is not zero"):
        open_source(tmp_path / "qwen")


def test_checkpoints_in_object_storage(s3: str, exported: Path, tmp_path: Path, illada: Illada) -> None:
    """In from a disk, out to a disk, the checkpoint between them in a bucket."""
    place = f"{s3}/converted"
    outcome = illada("convert", "from-hf", exported, place)
    assert outcome.code == 0, outcome.err
    assert "no configuration is written at s3://: --config-out FILE" in outcome.out
    options = ("--dtype", "fp32", "--no-tokenizer", "--max-shard-size", "10KB", "--verify")
    outcome = illada("convert", "to-hf", place, tmp_path / "again", *options)
    assert outcome.code == 0, outcome.err
    files = sorted(path.name for path in exported.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in set(files) - {"README.md"}:  # which says what the checkpoint knows of its past
        assert (exported / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
