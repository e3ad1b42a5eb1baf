"""What is exported, transformers loads; it is the same model, and every weight is there bit for bit."""

import json
import socket
from pathlib import Path

import pytest
import torch
from launch import Illada
from random_weights import logits_of, random_checkpoint, small_config
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel

from illada_megatron.checkpoint.files.errors import CheckpointError
from illada_megatron.checkpoint.hugging_face import exporting
from illada_megatron.checkpoint.hugging_face.config_json import read_config_json
from illada_megatron.checkpoint.hugging_face.exporting import export
from illada_megatron.checkpoint.hugging_face.verifying import verify
from illada_megatron.checkpoint.predictor import find_checkpoint
from illada_megatron.config import ModelConfig
from illada_megatron.config.parameters import EMBEDDING, HEAD

MODELS = {
    "grouped queries, tied": (),
    "untied, softcap": ("model.tie_word_embeddings=false", "model.logit_softcap=5.0"),
    "heads of another size": ("model.kv_channels=12", "model.num_query_groups=4"),
    "biases": ("model.add_qkv_bias=true",),
    "one group, tied, softcap": ("model.num_query_groups=1", "model.logit_softcap=3.0"),
    "no mask in the softmax, softcap": ("model.exclude_mask_logit=true", "model.logit_softcap=3.0"),
}


def _tokens(model: ModelConfig) -> Tensor:
    tokens = torch.randint(0, model.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    tokens[:, ::3] = model.mask_token_id
    return tokens


@pytest.mark.parametrize("layout", ["illada", "llada"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS.keys())
def test_transformers_gives_the_same_logits(layout: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    """AutoModel and AutoModelForCausalLM, through the directory's own code."""
    config = small_config(*overrides)
    random_checkpoint(tmp_path / "run", config)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", layout, "fp32")  # type: ignore[arg-type]
    tokens = _tokens(config.model)
    expected = logits_of(tmp_path / "run", tokens)
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path / "hf", trust_remote_code=True)
        assert model.dtype == torch.float32
        assert type(model).__module__.startswith("transformers_modules.")
        with torch.no_grad():
            logits = model(tokens).logits
        assert logits.shape == (3, 40, config.model.vocab_size)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["illada", "llada"])
def test_a_mask_that_is_no_answer_goes_along(layout: str, tmp_path: Path) -> None:
    """Its row of the head was never trained: in a softmax elsewhere it would be noise. What comes back excludes it."""
    config = small_config("model.exclude_mask_logit=true")
    random_checkpoint(tmp_path / "run", config)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", layout, "fp32")  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    with torch.no_grad():
        logits = model(_tokens(config.model)).logits
    assert (logits.isinf().nonzero()[:, -1] == config.model.mask_token_id).all()
    assert logits.isinf().sum() == 3 * 40
    verify(find_checkpoint(tmp_path / "run"), tmp_path / "hf").check()
    assert read_config_json(tmp_path / "hf").fields["exclude_mask_logit"] is True
    plain = small_config()
    random_checkpoint(tmp_path / "plain", plain)
    export(find_checkpoint(tmp_path / "plain"), tmp_path / "plain_hf", layout, "fp32")  # type: ignore[arg-type]
    assert "exclude_mask_logit" not in (tmp_path / "plain_hf" / "config.json").read_text()


@pytest.mark.parametrize("layout", ["illada", "llada"])
def test_padding_on_either_side_changes_nothing(layout: str, tmp_path: Path) -> None:
    config = small_config()
    random_checkpoint(tmp_path / "run", config)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", layout, "fp32")  # type: ignore[arg-type]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    short = _tokens(config.model)[:1, :25]
    batch, mask = torch.full((2, 40), 3), torch.zeros(2, 40, dtype=torch.int64)
    batch[0, :25], batch[1, 15:] = short[0], short[0]
    mask[0, :25], mask[1, 15:] = 1, 1
    with torch.no_grad():
        alone = model(short).logits[0]
        both = model(batch, attention_mask=mask).logits
        unmasked = model(batch).logits
    torch.testing.assert_close(both[0, :25], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1, 15:], alone, rtol=1e-5, atol=1e-5)
    assert (unmasked[0, :25] - alone).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 40, 40\), expected \[batch, sequence\]"):
        model(batch, attention_mask=torch.ones(2, 1, 40, 40))


def test_weights_are_llamas_under_llamas_names(tmp_path: Path) -> None:
    """transformers' own Llama, told that everything is visible, has the same hidden states: q, k, v, gate and up are
    what their names say."""
    config = small_config("model.tie_word_embeddings=false")
    random_checkpoint(tmp_path / "run", config)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "illada", "fp32", max_shard_bytes=20_000)
    ours = AutoModel.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    model = config.model
    llama = LlamaModel(
        LlamaConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            vocab_size=model.vocab_size,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rotary_base},
            attn_implementation="eager",
        )
    )
    weights: dict[str, Tensor] = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        weights |= load_file(file)
    head = weights.pop("lm_head.weight")
    llama.load_state_dict({name.removeprefix("model."): weight for name, weight in weights.items()})
    tokens = _tokens(model)
    with torch.no_grad():
        hidden = llama(tokens, attention_mask=torch.zeros(3, 1, 40, 40)).last_hidden_state
        torch.testing.assert_close(ours.model(tokens).last_hidden_state, hidden, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(tokens).logits, hidden @ head.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("precision", "main"), [("fp32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_weight_comes_once_and_rounded_once(precision: str, main: bool, dtype: str, tmp_path: Path) -> None:
    """fp32 of a run in bf16: the optimizer's main weights; bf16: those the model computes with. Without the rows that
    pad the vocabulary."""
    config = small_config(f"training.precision={precision}", "model.tie_word_embeddings=false")
    weights = random_checkpoint(tmp_path / "run", config, main)
    done = export(find_checkpoint(tmp_path / "run"), tmp_path / "hf", "llada", dtype)  # type: ignore[arg-type]
    assert done.from_main_weights == (main and dtype == "fp32")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert {tensor.dtype for tensor in exported.values()} == {wanted}
    assert done.nbytes == sum(tensor.nbytes for tensor in exported.values())
    expected = {name: weight.to(wanted) for name, weight in weights.items()}
    assert sum(tensor.numel() for tensor in exported.values()) == sum(
        weight.numel() - (6 * 32 if name in (EMBEDDING, HEAD) else 0) for name, weight in expected.items()
    )
    assert torch.equal(exported["model.transformer.wte.weight"], expected[EMBEDDING][:250])
    assert torch.equal(exported["model.transformer.ff_out.weight"], expected[HEAD][:250])
    # group 1 of 2: its two query heads, its key head, its value head, of 8 rows each
    qkv = expected["decoder.layers.2.self_attention.linear_qkv.weight"][32:]
    block = "model.transformer.blocks.2"
    assert torch.equal(exported[f"{block}.q_proj.weight"][16:], qkv[:16])
    assert torch.equal(exported[f"{block}.k_proj.weight"][8:], qkv[16:24])
    assert torch.equal(exported[f"{block}.v_proj.weight"][8:], qkv[24:])
    assert torch.equal(exported[f"{block}.ff_proj.weight"], expected["decoder.layers.2.mlp.linear_fc1.weight"][:48])
    assert torch.equal(exported[f"{block}.up_proj.weight"], expected["decoder.layers.2.mlp.linear_fc1.weight"][48:])
    verify(find_checkpoint(tmp_path / "run"), tmp_path / "hf").check()


def test_shards_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks smaller than a run of rows, shards smaller than some tensors: the same tensors as in one file."""
    random_checkpoint(tmp_path / "run", small_config())
    info = find_checkpoint(tmp_path / "run")
    export(info, tmp_path / "one", "illada", "bf16")
    monkeypatch.setattr(exporting, "BLOCK_BYTES", 3 * 32 * 4)
    export(info, tmp_path / "many", "illada", "bf16", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = load_file(tmp_path / "one" / "model.safetensors"), {}
    for file in sorted((tmp_path / "many").glob("*.safetensors")):
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 10_000 or len(tensors) == 1
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        many |= tensors
    assert index["weight_map"].keys() == one.keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_config_has_the_keys_of_the_released_models(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    info = find_checkpoint(tmp_path / "run")
    export(info, tmp_path / "illada", "illada")
    values = json.loads((tmp_path / "illada" / "config.json").read_text())
    keys = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rms_norm_eps", "layer_norm_eps"),
        *("attention_bias", "mlp_bias", "hidden_act", "attention_dropout", "resid_pdrop", "initializer_range"),
        *("pad_token_id", "tie_word_embeddings"),
    )
    assert set(keys) <= values.keys()
    assert (values["model_type"], values["architectures"]) == ("illada", ["ILLaDAForCausalLM"])
    assert (values["vocab_size"], values["rope_theta"], values["mask_token_id"]) == (250, 500000.0, 5)
    assert not {"head_dim", "qkv_bias"} & values.keys()
    export(info, tmp_path / "llada", "llada")
    values = json.loads((tmp_path / "llada" / "config.json").read_text())
    keys = (
        *("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "embedding_size", "weight_tying"),
        *("rope_theta", "rms_norm_eps", "mask_token_id"),
    )
    assert set(keys) <= values.keys()
    loaded = AutoConfig.from_pretrained(tmp_path / "llada", trust_remote_code=True)
    assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.weight_tying) == (32, 3, True)


def test_nothing_is_overwritten_and_nothing_half_done_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random_checkpoint(tmp_path / "run", small_config())
    info, target = find_checkpoint(tmp_path / "run"), tmp_path / "hf"
    target.mkdir()
    (target / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match="hf: exists and is not empty"):
        export(info, target, "illada")
    assert [path.name for path in target.iterdir()] == ["mine"]
    (target / "mine").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("illada_megatron.checkpoint.files.local_files._LocalSink.write", full)
        with pytest.raises(OSError, match="No space left"):
            export(info, target, "illada")
    assert not list(target.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]
    elsewhere = ".hf@another-machine.01234567.unfinished"  # its lock is not seen from here: it may be at work
    for name in (f".hf@{socket.gethostname()}.01234567.unfinished", elsewhere):  # the first was killed
        (tmp_path / name).mkdir()
    export(info, target, "illada")
    assert (target / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == [elsewhere, "hf", "run"]


def test_verification_finds_another_model(tmp_path: Path, illada: Illada) -> None:
    """One weight of the export is changed: the command fails and says by how much the logits differ."""
    random_checkpoint(tmp_path / "run", small_config())
    outcome = illada("convert", "to-hf", tmp_path / "run", tmp_path / "hf", "--no-tokenizer", "--verify")
    assert outcome.code == 0, outcome.err
    assert "verified in fp32 on weights in bfloat16: largest difference of logits" in outcome.out
    file = tmp_path / "hf" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40  # the exponent of the last element
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"the logits differ by up to .* these are two models"):
        verify(find_checkpoint(tmp_path / "run"), tmp_path / "hf").check()
